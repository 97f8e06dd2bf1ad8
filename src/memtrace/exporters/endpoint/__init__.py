"""The metrics endpoint: where it listens, who may read it, and what it answers.

In comes a callable that returns the newest snapshot. Out go a port and its answers. Must not hold up the training
thread, nor be held up by a client. Another page is a path in `server`, its text a file beside `page`.
"""
