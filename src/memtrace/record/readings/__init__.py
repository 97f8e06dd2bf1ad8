"""Words for what an allocator's snapshot says, and their JSON form.

In comes nothing but plain data. Out go moments, holders and sources of a device. Must not know torch or pickles. A new
fact of a snapshot goes into `snapshot_reading` and `document`.
"""
