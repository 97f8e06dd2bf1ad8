"""The `memtrace` command: one file for each subcommand."""
