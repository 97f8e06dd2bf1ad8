"""What CUDA's caching allocator says: its history as events, its counters, its segments, cuBLAS's workspaces.

In comes the index of a device. Out go windows of events and readings. Must not know tags or categories. Another
version's form of the history goes into `history`.
"""
