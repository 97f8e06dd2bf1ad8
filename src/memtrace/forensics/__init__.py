"""What an allocator's snapshot means, whoever wrote it: its events, what each block was for, and how sure that is.

In come files of `torch.cuda.memory._dump_snapshot`, and what else is known of the same process: a configuration, a
memtrace run. Out go words of `record/`. Must not run anything that a file brings, need a device, nor take more than
2 GB: `history` bounds what is replayed. A new field of torch's goes into `snapshot`, a new way to
tell what a block is for becomes a file in `attribution`.
"""
