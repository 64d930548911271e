"""One attempt: one run of units, on one car, as its requester sees it.

Rule 1: TRANSITIONS is the only place where an attempt changes state; docs/spec/states.md is drawn
from this table.
Rule 2: an attempt ends in exactly one of RETURNED and LOST, and neither has an edge out. Units are
taken while it is LEASED; whatever is missing when it is LOST goes out again under the next number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from ..errors import LocalProtocolError
from .reasons import Reason
from .types import Digest, LeaseId, Peer, TaskId


class State(Enum):
    OFFERED = "offered"  # offer sent, no lease yet
    LEASED = "leased"  # the car promised; parts may come
    RETURNED = "returned"  # terminal: every unit of the run is here
    LOST = "lost"  # terminal: refused, silent, left or failed


class Step(Enum):
    """What can happen to an attempt."""

    GRANTED = "granted"  # a lease comes that cites the offer, again after a reconnect
    RETURNED = "returned"  # the last unit of the run comes
    LOST = "lost"  # refused, ended with units missing, silent too long, or taken back: cancel-task


TRANSITIONS: Final[dict[State, dict[Step, State]]] = {
    State.OFFERED: {Step.GRANTED: State.LEASED, Step.LOST: State.LOST},
    State.LEASED: {
        Step.GRANTED: State.LEASED,  # the car says it again after a reconnect
        Step.RETURNED: State.RETURNED,
        Step.LOST: State.LOST,
    },
    State.RETURNED: {},
    State.LOST: {},
}


@dataclass(frozen=True, slots=True)
class Late:
    """Why a run was started once more while the first went on."""

    attempt: int  # the first one's number
    spent_ms: int  # that it had taken then
    usual_ms: int  # that 95 of 100 such runs take at the most


class Attempt:
    """`next_unit` is the first unit that has not come; parts come in order within a lease."""

    __slots__ = (
        "asked",
        "asked_mono_ms",
        "count",
        "expires_mono_ms",
        "first",
        "frames",
        "from_step",
        "holder",
        "late",
        "lease_id",
        "look_mono_ms",
        "lost_since_mono_ms",
        "next_unit",
        "number",
        "offer",
        "peer",
        "piece",
        "reason",
        "sends",
        "source",
        "started_mono_ms",
        "state",
        "task_id",
    )

    def __init__(
        self,
        task_id: TaskId,
        number: int,
        peer: Peer,
        first: int,
        count: int,
        source: int,
        *,
        now_mono_ms: int,
        offer_timeout_ms: int,
    ) -> None:
        self.task_id = task_id
        self.number = number
        self.peer = peer
        self.first = first
        self.count = count
        self.source = source  # index + 1 into the job's table of sources
        self.state = State.OFFERED
        self.reason = Reason.OK
        self.lease_id: LeaseId | None = None
        self.next_unit = first
        self.piece = bytearray()  # of a unit too large for one part
        self.started_mono_ms = now_mono_ms
        self.expires_mono_ms = now_mono_ms + offer_timeout_ms
        self.lost_since_mono_ms: int | None = None  # the car's connection is down since
        self.holder: Peer | None = (
            None  # the rendezvous that looks for a car; `peer` is it till then
        )
        self.asked_mono_ms: int | None = None  # when the last was, while it has not answered
        self.late: Late | None = None  # what it hedges against; None: it is no hedge
        self.look_mono_ms: int | None = None  # when to look whether it is late
        self.asked = 0  # rendezvous that were asked
        self.offer: Digest | None = None  # what a lease must cite, if any car may grant it
        self.from_step = 0  # of the checkpoint that it goes on from
        self.sends: tuple[int, ...] = ()
        self.frames: tuple[bytes, ...] = ()  # offer and inputs, said again after a reconnect

    @property
    def end(self) -> int:
        return self.first + self.count

    @property
    def live(self) -> bool:
        return bool(TRANSITIONS[self.state])

    def step(self, step: Step) -> None:
        after = TRANSITIONS[self.state].get(step)
        if after is None:
            raise LocalProtocolError(f"{step.value} in state {self.state.value}")
        self.state = after

    def __repr__(self) -> str:
        return (
            f"<Attempt {self.task_id.hex()[:6]}#{self.number} {self.state.value} "
            f"[{self.first}, {self.end}) at {self.next_unit}>"
        )
