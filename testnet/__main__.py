"""`python -m testnet ...`: the same commands as `mesh testnet ...`, from a source tree."""

from __future__ import annotations

from meshnode.cli.frame import enter

from .command import testnet

if __name__ == "__main__":
    enter(testnet, "testnet")
