"""`memtrace plan`: its options, the answers to them, and the tables, text and JSON that they are shown in.

In come arguments. Out goes a plan for people, or as JSON. Must not plan by itself: that is `memtrace.planning`. An
option of all plans goes into `options`, one of simulated plans into `simulation_options`.
"""
