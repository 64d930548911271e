"""The parts without I/O: frames, budgets, the half-open gate, bounded buffers."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnode.overlay.frames import (
    PING,
    PONG,
    BadFrame,
    Echo,
    FrameDecoder,
    encode_echo,
    encode_frame,
)
from meshnode.overlay.guard import BoundedBuffers, Budget, HalfOpenGate, WindowExceeded

ITEMS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=300),
        st.tuples(st.sampled_from([PING, PONG]), st.binary(min_size=8, max_size=8)),
    ),
    max_size=20,
)


def plain(item: bytes | Echo) -> bytes | tuple[int, bytes]:
    return (item.kind, item.token) if isinstance(item, Echo) else item


@given(ITEMS, st.lists(st.integers(1, 400), max_size=40))
def test_frames_survive_any_cutting(
    items: list[bytes | tuple[int, bytes]], cuts: list[int]
) -> None:
    wire = b"".join(
        encode_frame(item) if isinstance(item, bytes) else encode_echo(*item) for item in items
    )
    decoder = FrameDecoder(300)
    decoded: list[bytes | tuple[int, bytes]] = []
    at = 0
    for cut in [*cuts, len(wire)]:
        decoded += map(plain, decoder.feed(wire[at : at + cut]))
        at += cut
    decoded += map(plain, decoder.feed(wire[at:]))
    assert decoded == items
    assert decoder.pending == 0


@given(st.binary(max_size=2_000))
def test_any_bytes_are_frames_or_refused(wire: bytes) -> None:
    decoder = FrameDecoder(64)
    try:
        for item in decoder.feed(wire):
            assert isinstance(item, Echo) or 0 < len(item) <= 64
    except BadFrame:
        return
    assert decoder.pending < 64 + 4


def test_frame_over_the_bound_is_refused_by_its_length_alone() -> None:
    with pytest.raises(BadFrame):
        FrameDecoder(64).feed((65).to_bytes(4, "big"))


def test_budget_refills_and_keeps_keys_apart() -> None:
    budget = Budget(per_s=10.0, burst=3.0, keys_max=2)
    assert [budget.take(b"a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert budget.take(b"b", 0.0)
    assert budget.take(b"a", 0.1)
    assert not budget.take(b"a", 0.1)
    budget.take(b"c", 0.1)
    assert len(budget._level) == 2


def test_gate_lets_the_oldest_go() -> None:
    trio.run(_gate_lets_the_oldest_go)


async def _gate_lets_the_oldest_go() -> None:
    counters: Counter[str] = Counter()
    gate = HalfOpenGate(total_max=4, per_ip_max=3, counters=counters)
    mine = [gate.enter("1.1.1.1") for _ in range(5)]
    assert [scope.cancel_called for scope in mine] == [True, True, False, False, False]
    other = [gate.enter("2.2.2.2") for _ in range(2)]  # the fifth in all: the busiest address pays
    assert [scope.cancel_called for scope in mine] == [True, True, True, False, False]
    assert not any(scope.cancel_called for scope in other)
    for scope in mine:
        gate.leave("1.1.1.1", scope)
    for scope in other:
        gate.leave("2.2.2.2", scope)
    assert len(gate) == 0
    assert not gate._open
    assert counters["half_open_evicted"] == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200))
def test_gate_counts_right(steps: list[tuple[str, bool]]) -> None:
    gate = HalfOpenGate(total_max=6, per_ip_max=4, counters=Counter())
    held: list[tuple[str, trio.CancelScope]] = []
    for ip, leaves in steps:
        if leaves and held:
            gate.leave(*held.pop(0))
        else:
            held.append((ip, gate.enter(ip)))
        assert len(gate) <= 6
        assert len(gate) == sum(map(len, gate._open.values()))
        assert all(0 < len(scopes) <= 4 for scopes in gate._open.values())


def test_buffers_refuse_more_than_the_window() -> None:
    buffers = BoundedBuffers(stream_bytes_max=100_000, conn_bytes_max=250_000)
    for stream_id in range(5):
        buffers[stream_id] = bytearray()
    buffers[0].extend(b"x" * 100_000)
    with pytest.raises(WindowExceeded):
        buffers[0].extend(b"x")
    buffers[1].extend(b"x" * 100_000)
    with pytest.raises(WindowExceeded):
        buffers[2].extend(b"x" * 70_000)
