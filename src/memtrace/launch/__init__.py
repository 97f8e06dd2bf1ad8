"""Tracing without a line of code: `memtrace run SCRIPT` begins the script, and what it trains finds its tracer.

In come the arguments of `memtrace run`, the modules that the script imports, and the steps of its optimizers. Out goes
nothing: the adapters are attached as the user would have attached them. Must not load torch, nor what needs it, before
the script has, and must not change torch, a framework or the script. A new framework is a row in
`startup/sitecustomize.py` and a function in `loaded.py`, or an entry point where the framework has a group for it.
"""
