"""Words for what is told of a failed allocation, and their JSON form.

In comes nothing but plain data. Out go reports and the documents that they are kept as. Must not know torch or a file.
A new section of the report goes into `report` and `document`.
"""
