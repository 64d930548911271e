"""The offer of a task's missing units to one car: built and signed here, placed by `requester`."""

from __future__ import annotations

from .job import Job, Task, input_root
from .objects import T_OFFER, Offer, OfferKind, Span
from .outbox import Outbox
from .sealed import Sealed
from .types import Digest, Peer

DEADLINE_UNIX_MS = 600_000  # an offer's own expiry, far above its time-out: clocks differ


def seal_offer(
    outbox: Outbox,
    job: Job,
    task: Task,
    peer: Peer | None,
    channel: Digest | None,
    count: int,
    inline: bytes,
    token: Sealed | None,
) -> Sealed:
    """The first `count` missing units of the task; `inline`: the inline bytes of this very run,
    which follow the offer, never in it."""
    identity, now = outbox.identity, outbox.now
    first = task.missing
    offer = Offer(
        1,
        identity.network,
        identity.peer,
        peer,
        "offer",
        job.spec,
        Span(task.first, task.count),
        task.attempt,
        Span(first, count),
        input_root(job.spec, job.digest, inline, first, count),
        0,
        OfferKind.RETRY if task.attempt else OfferKind.FIRST,
        channel,
        outbox.limits.lease_ms,
        now.unix_ms + DEADLINE_UNIX_MS,
        0,
        task.state,
        task.step,
        None if token is None else token.digest,
    )
    return outbox.seal(offer, T_OFFER)
