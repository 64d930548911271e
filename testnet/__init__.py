"""A whole mesh on one machine: real node processes on loopback, and what breaks them on purpose.

Flow: `mesh testnet` (entry point group `meshnode.commands`), the demo, the tests and the benches
start it. meshnode never imports it.
"""
