"""What a run leaves in its directory, one module a file of it, and what reads a directory or many of them back.

In come records and snapshots, or paths. Out go files, whole or line by line, and what they say. Must not know who asks
for them. A new file of a run is a file beside `timeline_file`.
"""
