"""bench.noop: see `api`."""
