"""What kind of frame this is, without decoding it: for counting messages by their type.

Conventions of "messages per task": a frame counts once, for who sends it, whether or not it
arrives. A published message counts as many frames as the topic's gossip mesh carries for it,
`(GOSSIP_DEGREE - 1)` for each member (all but the link it came by), fewer in a topic of fewer.
What a car answers its requester (one lease a start, then results), money and upkeep are reported
and not counted: they are the same whoever chose the car.
A type that is in none of those groups is about placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshnode.protocol.messages import NUMBERS
from meshnode.protocol.sealed import TAG_18

RESULT: Final = frozenset({"lease", "inputs", "part", "ended", "heartbeat", "checkpoint", "watch"})
MONEY: Final = frozenset({"receipt", "accept"})
UPKEEP: Final = frozenset(
    {"hello", "goodbye", "terms-request", "terms", "agreement", "decline", "advert"}
)
GROUPS: Final = (("result", RESULT), ("money", MONEY), ("upkeep", UPKEEP))
_TYP_AT: Final = 49  # in the wire of an object sealed by a peer


def _dashed(name: str) -> str:
    return "".join(f"-{char.lower()}" if char.isupper() else char for char in name).lstrip("-")


_NAMES: Final = {number: _dashed(message.__name__) for number, message in NUMBERS.items()}


def kind_of(frame: bytes) -> str:
    """`offer`, `lease`, `refuse`: an object's type without its version, or a message's name."""
    if frame.startswith(TAG_18):
        size = frame[_TYP_AT] & 0x1F  # "mesh-offer/1"
        return frame[_TYP_AT + 6 : _TYP_AT - 1 + size].decode()
    number = frame[2] if frame[2] < 24 else frame[3]
    return _NAMES.get(number, f"message-{number}")


def group_of(kind: str) -> str:
    for group, kinds in GROUPS:
        if kind in kinds:
            return group
    return "placement"


def placement_only(counts: Mapping[str, int]) -> dict[str, int]:
    return {kind: counts[kind] for kind in sorted(counts) if group_of(kind) == "placement"}


def gossip_frames(members: int, degree: int) -> int:
    """Frames that one published message makes in a topic of so many members."""
    return members * min(degree - 1, max(0, members - 1))
