"""Peaks of ten models over the releases of transformers: measured by `run`, told by `page`."""
