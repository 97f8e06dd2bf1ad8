"""Runs as traces for Perfetto and Chrome, alone or beside a trace of torch.profiler.

In come records and timelines of each rank, and the profiler's file. Out go the parts of a JSON file. Must not change a
byte count, nor an event of the profiler's. A new track goes into `events`; `readings` has those of snapshots.
"""
