"""`mesh jobs|show|logs|result|cancel`: look at jobs that were handed over, fetch and stop them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from . import frame
from .reach import connected
from .watching import follow, put_result

JOB = click.argument("job_id", metavar="JOB")
OUT = click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where the result goes: .npy, .npz, .jsonl or .json; else JSON lines on stdout.",
)


def job_row(job: dict[str, Any]) -> dict[str, Any]:
    names = ("job_id", "kernel", "label", "state", "reason", "text", "units", "done")
    row = {name: job.get(name) for name in names}
    return {**row, "submitted_unix_ms": job.get("submitted_unix_ms", 0)}


def age(unix_ms: int) -> str:
    """How long ago, in one word."""
    seconds = max(0, time.time_ns() // 1_000_000 - unix_ms) // 1000
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


@click.command(epilog="Example: mesh jobs")
@frame.home_options
@frame.json_option
def jobs(home: Path) -> None:
    """List the jobs of this node, oldest first.

    A job goes on while you are away; `mesh result JOB` waits for it.
    """
    with connected(home) as mesh:
        found = [job_row(job) for job in mesh.jobs()]
    if frame.face().json:
        frame.put_json({"jobs": found})
        return
    rows = [
        (
            job["job_id"].hex()[:8],
            job["kernel"],
            job["state"],
            f"{'?' if job['done'] is None else job['done']}/{job['units']}",
            age(job["submitted_unix_ms"]) if job["submitted_unix_ms"] else "?",
            job["label"],
        )
        for job in found
    ]
    frame.put_table(("JOB", "KERNEL", "STATE", "UNITS", "AGE", "LABEL"), rows)


@click.command(epilog="Example: mesh show 3f2a --json")
@JOB
@frame.home_options
@frame.json_option
def show(job_id: str, home: Path) -> None:
    """Show one job: its attempts, the cars that ran them, and why it waits.

    Of a long job also from which step each attempt went on, and the newest step of each unit whose
    state this node has: should the car go, another one goes on from there.

    JOB is the job's id or its first characters.
    """
    with connected(home) as mesh:
        ident = mesh.find(job_id)
        job = mesh.show(ident)
        why = mesh.explain(ident)["reasons"]
    if frame.face().json:
        frame.put_json({"job": {**job_row(job), **_whole(job)}, "explain": why})
        return
    click.echo(f"job       {ident.hex()}")
    click.echo(f"kernel    {job['kernel']}")
    click.echo(
        f"state     {job['state']}  {job['text'] if job['state'] != 'done' else ''}".rstrip()
    )
    click.echo(f"units     {job['done']} of {job['units']}")
    for kept in job.get("checkpoints") or []:
        click.echo(f"kept      unit {kept['unit']}: step {kept['step']} of {job['steps']}")
    for reason in why:
        click.echo(f"why       {reason['text']} ({reason['count']} times)")
    attempts = job.get("attempts") or []
    if attempts:
        click.echo("")
        stepped = job["steps"] is not None
        began = ("FROM STEP",) if stepped else ()
        headers = ("TASK", "UNITS", "ATTEMPT", "CAR", "STATE", *began, "DONE", "REASON")
        frame.put_table(headers, [_attempt(attempt, stepped) for attempt in attempts])


def _whole(job: dict[str, Any]) -> dict[str, Any]:
    names = ("tasks", "attempts", "refusals", "waits_for", "accepted", "steps", "checkpoints")
    return {name: job.get(name) for name in names}


def _attempt(attempt: dict[str, Any], stepped: bool) -> tuple[object, ...]:
    reason = attempt["reason"]["text"] if attempt["reason"]["code"] else ""
    last = attempt["first"] + attempt["count"] - 1
    car = frame.ident(attempt["peer"])[-8:]
    task = attempt["task"].hex()[:8]
    number, state, done = attempt["attempt"], attempt["state"], attempt["done"]
    began = (attempt["from_step"],) if stepped else ()
    return task, f"{attempt['first']}-{last}", number, car, state, *began, done, reason


@click.command(epilog="Example: mesh logs 3f2a --follow")
@JOB
@click.option("-f", "--follow", "keep", is_flag=True, help="Go on until the job has ended.")
@frame.home_options
@frame.json_option
def logs(job_id: str, keep: bool, home: Path) -> None:
    """Show what happened to a job, oldest first: leases, ends, receipts.

    With --json one object holds all of it, or with --follow one object per line.
    """
    with connected(home) as mesh:
        ident = mesh.find(job_id)
        known = mesh.logs(ident)
        if frame.face().json and not keep:
            events = [{"kind": notice.kind, "fields": notice.fields} for notice in known]
            frame.put_json({"job_id": ident, "events": events})
            return
        for notice in known:
            _log(notice)
        if not keep:
            return
        back = f"mesh logs {ident.hex()[:8]} --follow{frame.where()}"
        frame.face().return_line = f"the job goes on; return: {back}"
        for notice in mesh.watch(ident):
            _log(notice)


def _log(notice: Any) -> None:
    if frame.face().json:
        frame.put_json({"kind": notice.kind, "fields": notice.fields})
        return
    fields = " ".join(f"{key}={_short(value)}" for key, value in notice.fields.items())
    click.echo(f"{notice.kind:<10} {fields}")


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return frame.ident(value)[-8:] if len(value) == 38 else value.hex()[:8]
    return str(value)


@click.command(epilog="Example: mesh result 3f2a -o vectors.npy")
@JOB
@OUT
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Wait at most so long.")
@frame.home_options
@frame.json_option
def result(job_id: str, out: Path | None, timeout_s: float | None, home: Path) -> None:
    """Wait for a job and write its result, as `mesh map` would have.

    May be called as often as you like while the node keeps the job (a week).
    """
    with connected(home) as mesh:
        ident = mesh.find(job_id)
        follow(mesh, ident, "mesh result", out, timeout_s)
        put_result(mesh, ident, out)


@click.command(epilog="Example: mesh cancel 3f2a")
@JOB
@frame.home_options
@frame.json_option
def cancel(job_id: str, home: Path) -> None:
    """Stop a job. Units that are done stay done, and are paid."""
    with connected(home) as mesh:
        ident = mesh.find(job_id)
        mesh.cancel(ident)
        state = mesh.wait(ident, 30.0)["state"]
    if frame.face().json:
        frame.put_json({"job_id": ident, "state": state})
    else:
        frame.talk(f"job {ident.hex()[:8]}: {state}")
