"""md.lj: see `api`."""
