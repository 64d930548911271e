"""Waiting for a job with progress on stderr, and writing what it gives.

Used by `work` and `jobs`. A bar where stderr is a terminal, else a line at each tenth, so that a
log file stays readable.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from meshnode.errors import LocalResource, TimedOut, UsageError

from . import frame

if TYPE_CHECKING:
    from meshnode.client import Mesh

INLINE_ROWS_MAX: Final = 1 << 20
ENDED: Final = frozenset({"done", "failed", "cancelled"})


class Progress(Protocol):
    def at(self, done: int, total: int) -> None: ...
    def say(self, text: str) -> None: ...


class _Lines:
    """Progress where nobody looks at a terminal: a line at each tenth."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tenth = 0

    def at(self, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        if tenth > self._tenth:
            self._tenth = tenth
            frame.talk(f"{self._what}: {done} of {total} units")

    def say(self, text: str) -> None:
        frame.talk(text)


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar = bar
        self._task = task

    def at(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False)


@contextlib.contextmanager
def progress(what: str, unit: str = "units") -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _Lines(what)
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task(what, total=1))


def return_line(command: str, job_id: bytes, out: Path | None) -> str:
    to = "" if out is None else f" -o {out}"
    return f"the job goes on; return: {command} {job_id.hex()[:8]}{to}{frame.where()}"


def follow(
    mesh: Mesh, job_id: bytes, command: str, out: Path | None, timeout_s: float | None
) -> None:
    """Until the job has ended, in whatever state. Ctrl-C detaches and says how to return."""
    frame.face().return_line = return_line(command, job_id, out)
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    if deadline_s is not None:
        try:
            mesh.wait(job_id, timeout_s)
        except TimedOut:
            raise TimedOut(
                f"job {job_id.hex()[:8]} was not done within {timeout_s:g} s; it goes on: "
                f"{command} {job_id.hex()[:8]}{frame.where()}"
            ) from None
        return
    what = f"job {job_id.hex()[:8]}"
    with progress(what) as shown:
        done, total = 0, 0
        leases = Leases()
        for notice in mesh.watch(job_id):
            fields = notice.fields
            if notice.kind == "job":
                done, total = fields.get("done") or 0, fields.get("units") or 0
            elif notice.kind == "units":
                done += fields.get("count") or 0
            elif notice.kind == "attempt" and leases.lost(fields):
                car = frame.ident(fields["peer"])[-8:] if fields.get("peer") else "?"
                shown.say(f"{car}: lost, {reason_text(fields.get('reason'))}")
            shown.at(min(done, total), total)


class Leases:
    """Which attempts a car took: of the others none was lost, somebody had only been asked."""

    def __init__(self) -> None:
        self._taken: set[tuple[Any, Any]] = set()

    def lost(self, fields: dict[str, Any]) -> bool:
        """Of an attempt's notice: whether a car had it and has it no more."""
        key, state = (fields.get("task"), fields.get("attempt")), fields.get("state")
        if state == "leased":
            self._taken.add(key)
        return state == "lost" and key in self._taken


def reason_text(code: Any) -> str:
    from meshnode.node.failures import reason_of

    reason = reason_of(code) if isinstance(code, int) else None
    return reason.text if reason is not None else "no reason given"


def put_result(mesh: Mesh, job_id: bytes, out: Path | None) -> None:
    """Write the finished job's result: to `out`, or as JSON lines on stdout."""
    from meshnode.node.failures import error_of_reason

    ended = mesh.wait(job_id)
    if ended["state"] != "done":
        why = mesh.explain(job_id)["reasons"]
        text = "; ".join(row["text"] for row in why if row["reason"] != ended["reason"])
        raise error_of_reason(ended["reason"], text)
    value = mesh.finish(job_id)
    fields = {"job_id": job_id, "state": "done", "units": ended["units"]}
    put_value(value, out, fields, mesh.show(job_id)["kernel"])


def finished_text(mesh: Mesh, job_id: bytes) -> str:
    """The whole text of a job that gives one; raises what went wrong."""
    value = mesh.finish(job_id)
    assert isinstance(value, str)
    return value


def texts_of(value: Any) -> list[str] | None:
    """A result that is text, one for each input; None if it is arrays."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    return None


def _put_texts(texts: list[str], out: Path | None, fields: dict[str, Any]) -> None:
    import json

    if out is not None:
        if out.suffix == ".txt":
            body = "".join(f"{text}\n" for text in texts)
        elif out.suffix in (".jsonl", ".json"):
            body = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
        else:
            raise UsageError(f"{out}: the result is text; write a .txt or .jsonl")
        try:
            out.write_text(body, encoding="utf-8")
        except OSError as error:
            raise LocalResource(f"{out} cannot be written: {error.strerror}") from None
        frame.talk(f"wrote {out}: {len(texts)} texts")
    if frame.face().json:
        values = {"texts": texts} if out is None else {}
        frame.put_json({**fields, "out": out, "arrays": [], "values": values})
    elif out is None:
        for text in texts:
            click.echo(text)


def put_value(value: Any, out: Path | None, fields: dict[str, Any], kernel: str) -> None:
    texts = texts_of(value)
    if texts is not None:
        _put_texts(texts, out, fields)
        return
    arrays = _named(value, kernel)
    shapes = [
        {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
        for name, array in arrays.items()
    ]
    if out is not None:
        _write(arrays, out)
        if frame.face().json:
            frame.put_json({**fields, "out": out, "arrays": shapes})
        else:
            frame.talk(f"wrote {out}: " + ", ".join(f"{s['name']} {s['shape']}" for s in shapes))
        return
    if frame.face().json:
        values = {name: array.tolist() for name, array in arrays.items()}
        frame.put_json({**fields, "out": None, "arrays": shapes, "values": values})
        return
    for row in _rows(arrays):
        click.echo(row)


def _named(value: Any, kernel: str) -> dict[str, Any]:
    """The result's arrays by the names that the host side gives, else by those of the outputs."""
    import numpy as np

    from jaxkernels import registry

    if isinstance(value, dict):
        return {name: np.asarray(item) for name, item in value.items()}
    values = value if isinstance(value, tuple) else (value,)
    outs = registry.KERNELS[kernel].outs if kernel in registry.KERNELS else ()
    names = [outs[at].name if at < len(outs) else f"out{at}" for at in range(len(values))]
    return {name: np.asarray(item) for name, item in zip(names, values, strict=True)}


def _rows(arrays: dict[str, Any]) -> Iterator[str]:
    """One JSON value per input: a plain value where there is one array, else a map of them."""
    import json

    columns = list(arrays.items())
    height = len(columns[0][1]) if columns[0][1].ndim else 1
    for at in range(height):
        row = {name: array[at].tolist() if array.ndim else array.item() for name, array in columns}
        yield json.dumps(row if len(columns) > 1 else next(iter(row.values())))


def check_out(out: Path | None) -> None:
    """Before the work, not after it: can the result be written there?"""
    if out is None:
        return
    if out.suffix not in (".npy", ".npz", ".jsonl", ".json", ".txt"):
        raise UsageError(f"{out}: the result can be written as .npy, .npz, .jsonl, .json or .txt")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}")


def _write(arrays: dict[str, Any], out: Path) -> None:
    import numpy as np

    check_out(out)
    if out.suffix == ".txt":
        raise UsageError(f"{out}: the result is arrays; write a .npy, .npz or .jsonl")
    draft = out.with_name(f".{out.name}.part")
    try:
        if out.suffix in (".npy", ".npz"):
            with draft.open("wb") as file:
                if out.suffix == ".npz":
                    np.savez(file, **arrays)
                elif len(arrays) == 1:
                    np.save(file, next(iter(arrays.values())))
                else:
                    raise UsageError(f"this kernel gives {len(arrays)} arrays: write a .npz")
        else:
            with draft.open("w", encoding="utf-8") as text:
                text.writelines(f"{row}\n" for row in _rows(arrays))
        draft.replace(out)
    except OSError as error:
        raise LocalResource(f"{out} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
