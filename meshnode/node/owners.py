"""Whose cars may run a job: accounts, and the words `mine` and `fleet` that stand for some.

The client sends what the person said; the node that has the job knows what it means, because it
has the account and the configuration. The machine sees accounts only.
"""

from __future__ import annotations

from typing import Final

from meshnode.errors import UsageError
from meshnode.protocol.types import Account

ACCOUNT_BYTES: Final = 32
MINE: Final = Account(b"mine")
FLEET: Final = Account(b"fleet")


def owner_of(text: str) -> Account:
    """An account's 32 bytes, or the word as it is; UsageError if it is neither."""
    word = Account(text.encode())
    if word in (MINE, FLEET):
        return word
    try:
        account = bytes.fromhex(text)
    except ValueError:
        account = b""
    if len(account) != ACCOUNT_BYTES:
        raise UsageError(f"{text} is no account: 64 hexadecimal digits, mine or fleet")
    return Account(account)


class Owners:
    """What the words mean to this node."""

    def __init__(self, own: Account, fleet: tuple[str, ...]) -> None:
        """`fleet`: accounts in hexadecimal, of the configuration; UsageError if one is none."""
        self._own = own
        self._fleet = tuple(owner_of(text) for text in fleet)
        if MINE in self._fleet or FLEET in self._fleet:
            raise UsageError("[node] fleet lists accounts, 64 hexadecimal digits each")

    def accounts(self, said: tuple[Account, ...]) -> tuple[Account, ...]:
        every: list[Account] = []
        for owner in said:
            if owner == MINE:
                every.append(self._own)
            elif owner == FLEET:
                every += (self._own, *self._fleet)
            else:
                every.append(owner)
        return tuple(every)
