"""The two commands of the product: `mesh` for who submits work, `meshnode` for the car.

Thin: a command reads its options, calls `client`, `ledger` or `node`, and prints. Result on stdout,
talk on stderr. Modules behind a command are imported when it runs, so `--help` stays fast.
"""
