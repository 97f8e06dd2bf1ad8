"""The report that is written when memory runs out: who held it, and what would have helped.

In come a failed allocation, the ledger and the allocator's blocks. Out goes a report, as JSON and as Markdown. Must not
need memory of the device, nor raise. A new remedy goes into `advice`, a new section into `markdown` and into the
report's JSON form.
"""
