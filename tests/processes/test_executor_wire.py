"""The frame format between node and worker: what a hostile worker can say ends in `WireError`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.executor import wire
from meshnode.protocol.types import STEPS_MAX, ArraySpec, Stepped

FRAMES = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=8)


@given(FRAMES, st.integers(1, 64))
def test_frames_survive_any_cut(frames: list[tuple[int, bytes]], cut: int) -> None:
    stream = b"".join(wire.frame(kind, body) for kind, body in frames)
    reader = wire.FrameReader()
    got = [f for at in range(0, len(stream), cut) for f in reader.feed(stream[at : at + cut])]
    assert got == frames


@given(st.binary(max_size=4096))
def test_any_bytes_are_frames_or_a_wire_error(stream: bytes) -> None:
    try:
        for _, body in wire.FrameReader(1024).feed(stream):
            assert len(body) <= 1024
    except wire.WireError:
        pass


def test_a_frame_over_the_bound_is_refused_at_its_header() -> None:
    head = wire.HEAD.pack(wire.BODY_BYTES_MAX + 1, wire.UNITS)
    with pytest.raises(wire.WireError):
        list(wire.FrameReader().feed(head))


@given(st.binary(max_size=wire.TEXT_BYTES_MAX + 64))
def test_an_end_is_one_printable_line_or_a_wire_error(body: bytes) -> None:
    try:
        *_, text = wire.decode_ended(body)
    except wire.WireError:
        return
    assert text.isprintable()
    assert len(text) <= 400


@given(st.binary(max_size=512))
def test_any_load_is_a_load_or_a_wire_error(body: bytes) -> None:
    try:
        wire.decode_load(body)
    except wire.WireError:
        pass


SPECS = st.builds(
    ArraySpec,
    st.sampled_from(sorted(wire.DTYPE_BYTES)),
    st.lists(st.integers(0, 1 << 40), max_size=8).map(tuple),
)


STEPPED = st.builds(
    Stepped,
    st.lists(st.integers(0, 1), max_size=4).map(tuple),
    st.lists(st.integers(0, 1), max_size=4).map(tuple),
)


@given(
    st.builds(
        wire.Load,
        st.binary(max_size=64),
        # Two mapped arguments at least: what `STEPPED` names is there.
        st.lists(st.builds(wire.LoadArg, st.booleans(), SPECS), max_size=62).map(
            lambda args: (*args, *[wire.LoadArg(True, ArraySpec("int32", ()))] * 2)
        ),
        st.lists(SPECS, max_size=8).map(tuple),
        st.integers(0, 1 << 20),
        st.none() | STEPPED,
        st.integers(0, wire.LOOP_UNITS_MAX),
        st.booleans(),
    )
)
def test_a_load_comes_back_as_it_was(load: wire.Load) -> None:
    ((kind, body),) = wire.FrameReader().feed(wire.encode_load(load))
    assert kind == wire.LOAD
    assert wire.decode_load(body) == load


@given(st.binary(max_size=128))
def test_any_steps_are_steps_or_a_wire_error(body: bytes) -> None:
    try:
        run, steps, _ = wire.decode_steps(body)
    except wire.WireError:
        return
    assert run.units >= 1 and steps.step <= steps.steps <= STEPS_MAX


def test_steps_come_back_as_they_were() -> None:
    run, steps = wire.RunHead(9, 3, 2, 5, 0), wire.StepsHead(70, 8, True)
    head = wire.encode_steps_head(run, steps, 4)
    ((kind, body),) = wire.FrameReader().feed(head + b"abcd")
    got_run, got_steps, inline = wire.decode_steps(body)
    assert kind == wire.STEPS and (got_run, got_steps, bytes(inline)) == (run, steps, b"abcd")


def test_a_size_cannot_overflow() -> None:
    huge = ArraySpec("float64", (1 << 62, 1 << 62))
    assert wire.array_bytes(huge) == 8 << 124
