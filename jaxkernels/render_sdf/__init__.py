"""render.sdf: see `api`."""
