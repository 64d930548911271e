"""One placement at a rendezvous, and where it stands: the table that `rendezvous` keeps to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from .messages import Place
from .objects import Offer
from .types import Peer, TaskId

Key = tuple[TaskId, int]


class Stage(Enum):
    """Where a placement stands; docs/spec/states.md is drawn from EDGES."""

    SOUGHT = "sought"  # a car is looked for; nothing is waited for here
    QUEUED = "queued"  # no token fits: it waits in its requester's line
    ASSIGNED = "assigned"  # a car has it, with the token that was spent on it
    SENT_ON = "sent on"  # another rendezvous has it
    OVER = "over"  # nothing more can come of it here


EDGES: Final[dict[Stage, set[Stage]]] = {
    Stage.SOUGHT: {
        Stage.ASSIGNED,  # a token fits: assign, to its car
        Stage.SENT_ON,  # none, and a neighbour can spare one: place with one hop more, and queued
        Stage.QUEUED,  # none anywhere, and wait_ms and the lines allow it: queued
        Stage.OVER,  # none of these, or four cars have refused: refuse
    },
    Stage.QUEUED: {
        Stage.ASSIGNED,  # a token that fits comes and it is this line's turn: assign
        Stage.SENT_ON,  # a neighbour has tokens now: place with one hop more, and queued
        Stage.OVER,  # wait_ms or its election is over: refuse; cancelled, or its connection ends
    },
    Stage.ASSIGNED: {
        Stage.SOUGHT,  # the car refuses
        Stage.OVER,  # its requester cancels, or places it again: nothing came of it
    },
    Stage.SENT_ON: {
        Stage.SOUGHT,  # that rendezvous refuses
        Stage.OVER,  # its requester cancels, or places it again: nothing came of it
    },
    Stage.OVER: set(),
}


@dataclass(slots=True)
class Placement:
    """One placement that is here, or was, until nothing more can come of it."""

    place: Place
    offer: Offer
    key: Key
    origin: Peer  # whom to answer: its submitter, or the rendezvous that sent it on
    consts: tuple[bytes, ...]
    came_mono_ms: int
    until_mono_ms: int
    said_mono_ms: int = 0  # when its submitter was last told that it waits
    stage: Stage = Stage.SOUGHT
    to: Peer | None = None  # the car, or the rendezvous, that has it now
    refused_by: set[Peer] = field(default_factory=set)  # cars, and who let it drop
    sent: int = 0  # times to another rendezvous
    asked: set[Peer] = field(default_factory=set)  # other rendezvous, since it last waited here
    late: int = 0  # cars that had taken something else when it came
    slow: Peer | None = None  # whoever has it said that its word takes a while

    def move(self, stage: Stage, to: Peer | None = None) -> None:
        assert stage in EDGES[self.stage], f"placement: {self.stage.value} -> {stage.value}"
        self.stage = stage
        self.to = to

    @property
    def submitter(self) -> Peer:
        return self.offer.requester
