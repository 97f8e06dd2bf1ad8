"""The model of CUDA's caching allocator: what torch reserves for the blocks that it gives out.

In come the sizes of blocks as they are allocated and freed, of any source. Out come segments and reserved bytes. Must
not know who asked for a block. Another allocator setting becomes a pool of its own, chosen in `caching_allocator`.
"""
