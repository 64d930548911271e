"""Whose cars a person means, in words and in accounts."""

from __future__ import annotations

import pytest

from meshnode.cli.inputs import read_cars
from meshnode.errors import UsageError
from meshnode.node.owners import Owners, owner_of
from meshnode.protocol.types import Account

OWN, OTHER, THIRD = (Account(bytes([n]) * 32) for n in (1, 2, 3))


def test_words_become_accounts() -> None:
    owners = Owners(OWN, (OTHER.hex(),))
    assert owners.accounts(()) == ()
    assert owners.accounts((owner_of("mine"),)) == (OWN,)
    assert owners.accounts((owner_of("fleet"), owner_of(THIRD.hex()))) == (OWN, OTHER, THIRD)


@pytest.mark.parametrize("text", ["", "yours", "12", "zz" * 32, "ab" * 33])
def test_what_is_no_account_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        owner_of(text)


def test_a_fleet_of_words_is_refused() -> None:
    with pytest.raises(UsageError, match="lists accounts"):
        Owners(OWN, ("fleet",))


def test_the_command_line_takes_cars_and_owners_together() -> None:
    assert read_cars(("any",), None) == ((), ())
    assert read_cars(("mine",), None) == ((), ("mine",))
    assert read_cars((f"fleet,{OTHER.hex().upper()}",), None) == ((), ("fleet", OTHER.hex()))
    with pytest.raises(UsageError, match="mine, fleet or any"):
        read_cars(("nobody",), None)
