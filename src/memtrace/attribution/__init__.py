"""Whose storage is it: the ledger, what fills it, and the replay that joins it with events."""
