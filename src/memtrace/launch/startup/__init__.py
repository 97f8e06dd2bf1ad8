"""The directory that `memtrace run` puts on PYTHONPATH.

In come the environment and the modules that a process imports. Out go calls of `memtrace.launch.loaded`. Must not
import anything of memtrace before the script has loaded what trains. What Python itself looks for at its start goes
into this directory, and nothing else: its modules can be imported by their bare names.
"""
