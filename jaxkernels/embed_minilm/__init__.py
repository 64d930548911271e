"""embed.minilm: see `api`."""
