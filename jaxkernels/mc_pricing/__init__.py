"""mc.pricing: see `api`."""
