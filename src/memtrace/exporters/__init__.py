"""One file for each output: metrics, step log, run file, tables, pages.

In comes a record, a snapshot or a callable that returns one. Out go text, files and a port. Must not know torch,
sources, attribution or the tracer: an exporter imports words only. A new exporter is a file here, and one line in
`adapters.exports` where a live run writes it.
"""
