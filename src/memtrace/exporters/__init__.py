"""One file for each output. An exporter is handed a callable or a record, and imports words only."""
