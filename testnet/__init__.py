"""A whole mesh on one machine: real node processes on loopback, and what breaks them on purpose.

    mesh testnet up|down|ls|status|kill|logs   command.py
    async with Testnet(nodes=8, seed=7)        testnet.py
            |  requests over a unix socket     link.py
    warden: forks, holds and reaps the nodes   warden.py

Flow: `mesh testnet` (entry point group `meshnode.commands`), the demo, the tests and the benches
start it. meshnode never imports it.
"""
