"""Whose storage is it: the ledger, what fills it, and the replay that joins it with events.

In come events of a source, and the model and the optimizers as they are. Out go breakdowns: bytes by category,
component and element type. Must not know when a step is traced, or who reads its record. What a new optimizer keeps
goes into `optimizers`, what a new kind of module keeps into `models`, a new engine into `engines`.
"""
