"""bench.spin: see `api`."""
