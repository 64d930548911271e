"""What the control socket says of a node: the machine's view and the ledger, as plain maps.

Read by `running`; the CLI turns these maps into tables and JSON. Ids stay bytes, reason codes stay
integers with their sentence beside.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Any, Final

from meshnode.errors import MeshError, UsageError
from meshnode.ledger.load import job_records
from meshnode.protocol import sandbox
from meshnode.protocol.codec import decode
from meshnode.protocol.effects import JobRecord
from meshnode.protocol.events import JobOrder
from meshnode.protocol.explain import Explanation
from meshnode.protocol.job import JobState
from meshnode.protocol.objects import JobSpec
from meshnode.protocol.order import order_of
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rule import decode_map
from meshnode.protocol.types import JobId
from meshnode.protocol.view import JobView, View

from .failures import reason_of

ATTEMPTS_SHOWN_MAX: Final = 4_096
LISTED_JOBS_MAX: Final = 1_024


def plain(value: Any) -> Any:
    """Dataclasses become maps, reasons their code and text; bytes and numbers stay."""
    if isinstance(value, Reason):
        return {"code": int(value), "text": value.text}
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def peers_of(view: View) -> list[dict[str, Any]]:
    """Everyone known: connected nodes, and cars by their advert; one map per peer."""
    found: dict[bytes, dict[str, Any]] = {}
    for peer in view.peers:
        found[peer.peer] = {**plain(peer), "up": peer.ready, "car": None}
    for car in view.cars:
        entry = found.setdefault(car.peer, {"peer": car.peer, "up": False})
        entry["car"] = {key: value for key, value in plain(car).items() if key != "peer"}
    return list(found.values())


def job_of_view(job: JobView) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "kernel": job.kernel,
        "label": note_of(job.request).get("label", ""),
        "state": job.state,
        "reason": int(job.reason),
        "text": job.reason.text,
        "units": job.units,
        "done": job.stored,
        "accepted": job.accepted,
        "steps": job.steps,
        "submitted_unix_ms": note_of(job.request).get("submitted_unix_ms", 0),
    }


def shown_job(job: JobView) -> dict[str, Any]:
    """A job whole."""
    return {
        **job_of_view(job),
        "tasks": job.tasks,
        "attempts": [plain(attempt) for attempt in job.attempts[-ATTEMPTS_SHOWN_MAX:]],
        "refusals": [{"reason": plain(reason), "count": count} for reason, count in job.refusals],
        "waits_for": plain(job.waits_for) if job.waits_for is not None else None,
        "checkpoints": [plain(kept) for kept in job.checkpoints[-ATTEMPTS_SHOWN_MAX:]],
    }


def explained(job: JobView) -> list[dict[str, Any]]:
    """Why a job waits or failed, the commonest reason first."""
    counted = {reason: count for reason, count in job.refusals}
    for reason in (job.waits_for, job.reason):
        if reason is not None and reason not in (Reason.OK, Reason.DONE):
            counted.setdefault(reason, 1)
    for attempt in job.attempts:
        if attempt.reason is not Reason.OK:
            counted[attempt.reason] = max(1, counted.get(attempt.reason, 0))
    ranked = sorted(counted.items(), key=lambda pair: -pair[1])
    return [{"reason": int(r), "text": r.text, "count": count} for r, count in ranked]


def explanation_of(found: Explanation, reasons: list[dict[str, Any]]) -> dict[str, Any]:
    """`reasons` counts what happened, however often; the stands in it count cars."""
    return {**plain(found), "reason": int(found.reason), "text": found.reason.text} | {
        "reasons": reasons
    }


def explanation_of_record(record: JobRecord) -> dict[str, Any]:
    """Of a job of before this process, or that is no longer in memory: how it ended is all."""
    row = job_of_record(record)
    kept = ("job_id", "kernel", "state", "reason", "text", "units")
    return {
        **{name: row[name] for name in kept},
        "done": row["done"],
        "in_work": 0,
        "waiting": 0,
        "cars_known": None,
        "cars_working": 0,
        "cars_open": 0,
        "stands": [],
        "waits": [],
        "runs": [],
        "runs_left_out": None,
        "advice": "",
        "reasons": [{"reason": row["reason"], "text": row["text"], "count": 1}],
    }


def sandbox_of(view: View) -> dict[str, Any]:
    """Names of the layers that workers have, that the policy asks for, and that so are missing."""
    there, least = view.sandbox_layers, view.sandbox_least
    return {
        "layers": None if there is None else sandbox.listed(there),
        "least": sandbox.listed(least),
        "missing": [] if there is None else sandbox.listed(sandbox.missing(least, there)),
    }


# ---- jobs of before, from the ledger; blocking, call from a thread


def ended_jobs(home: Path) -> list[dict[str, Any]]:
    """The newest jobs in the ledger that have ended, oldest first."""
    rows = [job_of_record(r) for r in job_records(home) if r.state != JobState.RUNNING]
    return rows[-LISTED_JOBS_MAX:]


def find_record(home: Path, job_id: JobId) -> JobRecord:
    """UsageError if this home knows no such job."""
    for record in job_records(home):
        if record.job_digest[:16] == job_id:
            return record
    raise unknown_job(job_id)


def unknown_job(job_id: bytes) -> UsageError:
    return UsageError(f"this node knows no job {job_id.hex()}; `mesh jobs` lists them")


def order_of_record(record: JobRecord) -> JobOrder:
    spec = decode_map(JobSpec, decode(record.spec), closed=True)
    return order_of(spec, record.request)


def job_of_record(record: JobRecord) -> dict[str, Any]:
    job_id = record.job_digest[:16]
    state = JobState(record.state).name.lower()
    reason = reason_of(record.reason)
    text = reason.text if reason is not None else ""
    shown = {"job_id": job_id, "state": state, "reason": record.reason, "text": text}
    try:
        order = order_of_record(record)
    except MeshError:  # written by another version: it is listed all the same
        unknown = {"kernel": "?", "label": "", "units": 0, "done": 0, "submitted_unix_ms": 0}
        return {**shown, **unknown, "steps": None}
    note = note_of(order.request)
    return {
        **shown,
        "kernel": order.kernel,
        "label": note.get("label", ""),
        "units": order.units,
        "done": order.units if record.state == JobState.DONE else None,
        "steps": order.steps if order.stepped is not None else None,
        "submitted_unix_ms": note.get("submitted_unix_ms", 0),
    }


def note_of(request: bytes) -> dict[str, Any]:
    """The client's note, if it is one of `meshnode.client`; others keep their own secrets."""
    try:
        note = json.loads(request)
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
