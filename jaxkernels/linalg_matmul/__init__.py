"""linalg.matmul: see `api`."""
