"""What each block of a snapshot was for: by notes, a run, sizes, stacks and lives, the most trusted first.

In come the history of a device, the sizes of a model and what a run of memtrace has recorded. Out come labels of
blocks, each with its source. Must not know files. Another source becomes a file here, with its place in `joined`.
"""
