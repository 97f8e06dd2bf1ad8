"""The memory gate: cases that are planned again at each change, held against what they took before.

In come a file of cases and a baseline. Out come findings: which category of which module grew, and by how much. Must
not know a live run, nor how a plan is made. A new setting of a case goes into `cases`, a new form of the report into
`reports`.
"""
