"""The words and the plain data that all rooms speak: categories, breakdowns, snapshots, plans, reports, metrics.

In comes nothing: the rooms above make these values. Out go frozen dataclasses and their JSON forms, which are the
public contract. Must not know torch, a device or a file that another room owns. A new category goes into
`categories`, a new metric into `metrics`, a new field of a record into its dataclass and its JSON form together.
"""
