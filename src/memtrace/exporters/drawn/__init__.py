"""Records as a notebook draws them, and the parts that a page of HTML is made of.

In come records, the history of a run and readings of snapshots. Out go pieces of HTML without a script, which any
frontend shows. Must not
know IPython nor need plotly, whose script would add megabytes to every output. Another thing that draws itself goes
into `notebook`.
"""
