"""A worker: one process, one program, many runs; started by `zygote`, killed from outside.

Reads LOAD and RUN frames from its socket, in order, and answers with UNITS and ENDED. It never
raises out: what goes wrong in a kernel is an ENDED frame, what goes wrong in the process is its
death, and the node tells the two apart. It keeps no clock over itself: a hang in native code
stops for nothing but SIGKILL (SIGALRM does not get through), so the node holds the wall clock.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence

import jax

from meshnode.executor import wire
from meshnode.protocol.reasons import Reason

from . import confine
from .program import Array, LoadRefused, Program
from .results import Area, Frames, Results

_stop_asked = False


def _on_stop(*_: object) -> None:
    global _stop_asked
    _stop_asked = True


def serve(sock: socket.socket, terms: confine.Terms) -> None:
    """Until the node hangs up or kills."""
    signal.signal(signal.SIGUSR1, _on_stop)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    frames = Frames(sock)
    try:
        taken = confine.before_backend(terms)
        jax.devices()  # starts the backend and its threads
        layers = confine.after_backend(terms, taken)
    except (confine.LayerMissing, OSError) as error:  # no sandbox, no work
        frames.send(wire.encode_ended(0, Reason.SANDBOX, 0, wire.one_line(str(error))))
        return
    frames.send(wire.frame(wire.READY, wire.READY_BODY.pack(layers)))
    program: Program | None = None
    area: Area | None = None
    while True:
        received = frames.receive()
        if received is None:
            return
        kind, body, fds = received
        try:
            if kind == wire.LOAD and program is None:
                program = _load(frames, body, fds)
            elif kind == wire.RUN and program is not None:
                _run(frames, program, area, body, fds)
            elif kind == wire.AREA and len(fds) == 1:
                area = Area(body, fds[0])
            else:
                raise wire.WireError(f"frame {kind}")
        finally:
            for fd in fds:  # a mapping outlives its descriptor
                os.close(fd)


def _load(frames: Frames, body: bytes, fds: Sequence[int]) -> Program | None:
    try:
        program = Program(wire.decode_load(body), fds)
    except LoadRefused as refused:
        frames.send(wire.encode_ended(0, refused.reason, 0, wire.one_line(str(refused))))
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a typed end
        frames.send(wire.encode_ended(0, _reason_of(error), 0, _text_of(error)))
        return None
    figures = (program.compile_ms, program.flop_per_unit, program.memory_mb)
    frames.send(wire.frame(wire.LOADED, wire.LOADED_BODY.pack(*figures)))
    return program


def _run(frames: Frames, program: Program, area: Area | None, body: bytes, fds: list[int]) -> None:
    """One run of units: results leave in batches, and the last batch carries the end."""
    global _stop_asked
    _stop_asked = False
    exec_id, first, count, mask, area_bytes, inline = wire.decode_run(body)
    results = Results(frames, area, exec_id, first, count * program.out_bytes)
    if area_bytes and area is not None:
        inline = area.inputs[:area_bytes]
    try:
        arrays = program.mapped_arrays(first, count, mask, inline, fds)
        _compute(program, arrays, count, results)
    except Exception as error:  # noqa: BLE001 - the kernel's own failure becomes an event
        results.end(_reason_of(error), _text_of(error))
        return
    if results.taken == count:
        results.flush(last=True)
    else:
        results.end(Reason.STOPPED_BY_OWNER, "")


def _compute(program: Program, arrays: Sequence[Array], count: int, results: Results) -> None:
    """One unit is always in flight behind the one being read: the device does not wait."""
    run_unit = program.run_unit
    ahead = None
    for index in range(count):
        if _stop_asked:
            break
        dispatched = run_unit([array[index] for array in arrays])
        if ahead is not None:
            results.add(ahead)
        ahead = dispatched
    if ahead is not None:
        results.add(ahead, more=False)


def _reason_of(error: Exception) -> Reason:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return Reason.MEMORY
    return Reason.FAILED_BY_JOB


def _text_of(error: Exception) -> str:
    return wire.one_line(f"{type(error).__name__}: {error}")
