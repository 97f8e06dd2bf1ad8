"""What each block of a snapshot was for: by notes, sizes, stacks and lives, the most trusted first.

In come the history of a device and the sizes of a model. Out come labels of blocks, each with its source. Must not know
files. Another source becomes a file here, with its place in `joined`.
"""
