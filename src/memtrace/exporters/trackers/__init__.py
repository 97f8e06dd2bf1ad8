"""What trackers (W&B, TensorBoard, MLflow, Trackio) get of a run: few figures with each log, and a summary at the end.

In come records and snapshots. Out go a flat dictionary of floats, a table as text and a page. Must not know any
tracker: `adapters.trackers` hands it to them. Another figure is a row of `figures.CATALOGUE`, which docs/trackers.md
has as a table.
"""
