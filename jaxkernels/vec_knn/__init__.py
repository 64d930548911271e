"""vec.knn: see `api`."""
