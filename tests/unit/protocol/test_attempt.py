"""The attempt's table: its safety argument holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import LocalProtocolError
from meshnode.protocol.attempt import TRANSITIONS, Attempt, State, Step
from meshnode.protocol.types import Peer, TaskId


def attempt() -> Attempt:
    return Attempt(
        TaskId(bytes(16)), 0, Peer(bytes(38)), 0, 4, 1, now_mono_ms=0, offer_timeout_ms=10
    )


def test_every_state_is_reachable_and_only_ends_have_no_edge() -> None:
    reached = {State.OFFERED} | {to for edges in TRANSITIONS.values() for to in edges.values()}
    assert reached == set(State)
    assert {s for s, edges in TRANSITIONS.items() if not edges} == {State.RETURNED, State.LOST}


@given(st.lists(st.sampled_from(Step), max_size=8))
def test_an_attempt_ends_once_and_for_all(steps: list[Step]) -> None:
    one = attempt()
    ends = 0
    for step in steps:
        before = one.state
        try:
            one.step(step)
        except LocalProtocolError:
            assert one.state is before
            continue
        ends += not one.live
    assert ends == (one.state in (State.RETURNED, State.LOST))
