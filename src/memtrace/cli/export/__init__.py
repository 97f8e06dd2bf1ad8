"""`memtrace export`: the forms in which other tools take a run.

In come a run directory and the form that is wanted. Out go a file or requests to a collector. Must not hold more than
one rank's records where the form can be written rank by rank. A new form becomes an
option of the command and an exporter.
"""
