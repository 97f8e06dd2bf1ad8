"""The model of CUDA's caching allocator: what torch reserves of the device for the blocks that it gives out.

In come the sizes of blocks as they are allocated and freed, of any source, and recordings to be replayed under other
settings. Out come segments, reserved bytes and a ranking. Must not know who asked for a block, nor need torch. Another
allocator setting becomes a field of `settings` and a rule of a pool, chosen in `caching_allocator`.
"""
