"""meshnode: parked electric cars as one computer.

Layout, in the order data flows: `protocol` decides and never does; `overlay`, `executor`,
`vehicle` and `ledger` do one thing each; `node` carries out what protocol decided; `client` and
`cli` are the faces. `worker` runs in a child process. docs/explanation/architecture.md has the
picture.
"""

__version__ = "0.1.0"
