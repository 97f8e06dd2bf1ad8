"""The versions of torch and transformers that memtrace is run with: environments, runs and their table."""
