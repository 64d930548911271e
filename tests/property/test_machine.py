"""The machine against a hostile peer and odd outcomes of its own machine room: it never raises.

The hostile peer has passed the handshakes and holds agreements in both roles. What it says is made
of what was really said in a run beside it: fields swapped for bounds, for ids seen elsewhere, for
nothing; signed again with its own key; repeated, reordered, and sent to whoever should not get it.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.codec import decode, encode
from meshnode.protocol.fields import Span
from meshnode.protocol.job import JobState
from meshnode.protocol.node import Node
from meshnode.protocol.objects import T_ANNOUNCE
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import TAG_18, unseal
from meshnode.protocol.types import BlobRef, Digest, Lane, LeaseId, Peer
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh, Site, output_of

from ..sim.rogue import Rogue
from ..sim.test_mesh import order, submit

UNITS = 24
EFFECTS_MAX = 600  # of one event; far above what any honest one causes here
LEASE = LeaseId(bytes(16))  # of the rogue to the submitter
BOUNDS = (0, 1, 2, 15, 16, 255, 4096, 65535, 1 << 32, 1 << 40, (1 << 63) - 1, -1)


class WatchedMesh(Mesh):
    """Keeps what is said; no machine may want to be woken in the past or answer without bound."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.said: list[bytes] = []

    def feed(self, site: Site, event: ev.Event) -> None:
        super().feed(site, event)
        due = site.node.deadline_mono_ms() if site.node else None
        # Of many frames in a millisecond only the first looks at what is due; a tick does it then.
        spins = due is not None and due <= self.now_ms and not isinstance(event, ev.FrameIn)
        assert not spins, f"{site.name} would spin after {event!r}"
        if isinstance(site.node, Node):
            requester = site.node.requester
            for job in requester.jobs.running.values():
                assert job.due_mono_ms == requester.due(job), f"{event!r} changed it unnoticed"

    def _carry(self, site: Site, effects: list[fx.Effect]) -> None:
        assert len(effects) <= EFFECTS_MAX
        self.said += [e.frame for e in effects if isinstance(e, fx.Send | fx.Publish)]
        super()._carry(site, effects)


class Step(NamedTuple):
    frame: int  # of those said so far
    places: list[int]  # which fields change
    values: list[int]  # to what
    to: int
    wait_ms: int


STEPS = st.lists(
    st.builds(
        Step,
        st.integers(0, 10_000),
        st.lists(st.integers(0, 200), max_size=3),
        st.lists(st.integers(0, 10_000), min_size=3, max_size=3),
        st.integers(0, 1),
        st.sampled_from([0, 0, 0, 1, 30, 500]),
    ),
    min_size=1,
    max_size=40,
)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a decoded object, containers included."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += places_of(value[key], (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def look_up(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def another(old: Any, pick: int, rogue: Rogue, seen: dict[int, list[bytes]]) -> Any:
    """Something of the same kind, mostly: what has another form is refused at the door."""
    if type(old) is int:
        return BOUNDS[pick % len(BOUNDS)] if pick % 3 else old + (pick % 7) - 3
    if type(old) is bytes:
        if len(old) == 38:
            return rogue.peer
        others = seen.get(len(old), [])
        if others and pick % 4:
            return others[pick % len(others)]
        return bytes(len(old)) if pick % 2 else old[: pick % (len(old) + 1)]
    if type(old) is list and old:
        return [old[:1], old * 2, [], old[1:]][pick % 4]
    return (None, b"", "", 0)[pick % 4]


def changed(frame: bytes, step: Step, rogue: Rogue, seen: dict[int, list[bytes]]) -> bytes:
    """The frame with some fields changed; what was signed is signed again, by the rogue."""
    sealed = unseal(frame) if frame.startswith(TAG_18) else None
    value: Any = decode(frame if sealed is None else sealed.payload)
    if sealed is not None:  # first of all, it says that it is the rogue's own
        for path in places_of(value):
            if type(look_up(value, path)) is bytes and len(look_up(value, path)) == 38:
                if step.values[0] % 3 and look_up(value, path) != rogue.peer:
                    put(value, path, rogue.peer)
                    break
    for place, pick in zip(step.places, step.values, strict=False):
        paths = places_of(value)
        if not paths:
            break
        path = paths[place % len(paths)]
        put(value, path, another(look_up(value, path), pick, rogue, seen))
    try:
        wire = encode(value)
    except (ValueError, OverflowError):
        return frame
    if sealed is None:
        return wire
    protected = encode({1: -19, 4: rogue.peer, 16: sealed.typ})
    to_be_signed: Any = ["Signature1", protected, b"", wire]
    return TAG_18 + encode([protected, {}, wire, rogue.key.sign(encode(to_be_signed))])


def remember(frame: bytes, seen: dict[int, list[bytes]]) -> None:
    value: Any = decode(unseal(frame).payload if frame.startswith(TAG_18) else frame)
    for path in places_of(value):
        leaf = look_up(value, path)
        if type(leaf) is bytes and len(leaf) in (8, 16, 32):
            others = seen.setdefault(len(leaf), [])
            if leaf not in others:
                others.append(leaf)


def a_mesh() -> tuple[WatchedMesh, Rogue]:
    """Two honest nodes in the middle of a job of theirs, and the rogue with a lease each way."""
    mesh = WatchedMesh(5)
    submitter = mesh.add("submitter", PROVIDE | REQUEST)
    car = mesh.add("car", PROVIDE | REQUEST)
    rogue = Rogue(mesh, "rogue", advertises=True)
    mesh.connect_all()
    mesh.rest(100)
    for victim in (submitter, car):
        channel = rogue.agree(victim)
        inline = bytes(64 * 2)
        job = rogue.job(2, inline=inline)
        offer = rogue.offer(victim, channel, job, Span(0, 2), inline=inline)
        mesh.said += [offer.wire, messages.pack(messages.Inputs(rogue.task_of(offer), 0, inline))]
        big = rogue.offer(victim, channel, rogue.job(1 << 32), Span(0, 4096))
        mesh.said += [big.wire, rogue.agreement(victim, 1).wire]
    submit(mesh, order(UNITS, cars=(car.identity.peer,)))
    submit(mesh, order(UNITS, nonce=1, cars=(rogue.peer,)))
    submit(mesh, order(UNITS, nonce=2, policy="gossip"))
    submit(mesh, order(UNITS, nonce=3, policy="tokens"))
    mesh.run(lambda: bool(rogue.all_heard("mesh-offer/1")), ms_max=5_000)
    offer = rogue.all_heard("mesh-offer/1")[0]
    rogue.say(submitter, rogue.lease(offer))
    mesh.said += [rogue.lease(offer).wire]
    for message in (
        messages.Part(LEASE, 0, (output_of(0),)),
        messages.Part(LEASE, 0, (bytes(32),), (0, 64)),
        messages.Part(LEASE, 0, (bytes(32),), (16, 64)),
        messages.Ended(LEASE, Reason.DONE, 4, 1, 1),
        messages.Ended(LEASE, Reason.STOPPED_BY_OWNER, 0, 1, 1),
        messages.Heartbeat(LEASE, 1, 1),
        messages.Checkpoint(LEASE, 1, BlobRef(Digest(bytes(32)), 1 << 36)),
        messages.Handoff(LEASE, 1, 0, Reason.DRIVING),
        messages.Decline(Digest(bytes(32)), Reason.GAP),
        messages.Goodbye(1),
        messages.CancelTask(rogue.task_of(offer), 0, Reason.CANCELLED),
        messages.Refuse(rogue.task_of(offer), 0, Reason.BUSY),
        messages.Queued(rogue.task_of(offer), 0, 0),
        messages.Revoke(Digest(bytes(32)), Reason.BUSY),
        messages.Tally("cell", 9, 9),
        messages.Rest(Digest(bytes(32))),
        messages.Place(offer.wire, 9, 0, (), 0),
        rogue.terms(),
    ):
        mesh.said.append(messages.pack(message))
    mesh.rest(300)
    return mesh, rogue


def jobs_of(site: Site) -> list[Any]:
    assert site.node is not None
    return list(site.node.jobs.all.values())


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(STEPS)
def test_a_hostile_peer_harms_nobody_else(steps: list[Step]) -> None:
    mesh, rogue = a_mesh()
    victims = (mesh.sites["submitter"], mesh.sites["car"])
    seen: dict[int, list[bytes]] = {}
    for frame in mesh.said:
        remember(frame, seen)
    for step in steps:
        victim = victims[step.to]
        frame = changed(mesh.said[step.frame % len(mesh.said)], step, rogue, seen)
        mesh.connect("rogue", victim.name)
        mesh.rest(20)
        if frame.startswith(TAG_18) and unseal(frame).typ == T_ANNOUNCE:
            mesh.feed(victim, ev.GossipIn("", rogue.peer, frame))
        mesh.feed(victim, ev.FrameIn(rogue.peer, Lane.CONTROL, frame))
        mesh.rest(step.wait_ms)
    submitter = victims[0]
    honest = jobs_of(submitter)[0]
    assert mesh.run(lambda: honest.state is not JobState.RUNNING, ms_max=600_000)
    assert honest.state is JobState.DONE
    mesh.rest(3_000)
    stored = [r for r in submitter.disk.results if r.job_digest == honest.digest]
    units = b"".join(r.outputs for r in sorted(stored, key=lambda r: r.first))
    assert units == b"".join(map(output_of, range(UNITS)))
    assert_bounded(mesh)


def assert_bounded(mesh: Mesh) -> None:
    for site in (mesh.sites["submitter"], mesh.sites["car"]):
        node = site.node
        assert node is not None
        assert len(node.provider.leases) <= 2
        assert len(node.jobs.by_lease) <= sum(len(job.attempts) for job in jobs_of(site))
        assert sum(len(a.frames) for job in jobs_of(site) for a in job.attempts.values()) <= 64
        assert len(node.requester.bidding._bids) <= 1


ODD = st.lists(st.tuples(st.integers(0, 13), st.integers(0, 60), st.integers(0, 400)), max_size=40)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(ODD)
def test_odd_outcomes_of_its_own_machine_room_never_raise(
    odd: list[tuple[int, int, int]],
) -> None:
    mesh, rogue = a_mesh()
    site = mesh.sites["submitter"]
    rng = random.Random(0)
    for kind, number, wait_ms in odd:
        mesh.feed(site, odd_event(kind, number, rogue.peer))
        mesh.rest(wait_ms)
        if rng.random() < 0.2:
            mesh.connect("submitter", rng.choice(["car", "rogue"]))
    mesh.rest(2_000)
    assert_bounded(mesh)


def odd_event(kind: int, number: int, peer: Peer) -> ev.Event:
    blob = Digest(b"\x33" * 32)
    match kind:
        case 0:
            return ev.UnitsDone(number, number % 5, (bytes(64),) * (number % 6), ev.Meters(1, 1))
        case 1:
            return ev.ExecEnded(number, Reason.DONE, ev.Meters())
        case 2:
            return ev.ExecEnded(number, Reason.BLOB_MISSING, ev.Meters(), "x" * 1000)
        case 3:
            return ev.PersistFailed(number, Reason.DISK_FULL)
        case 4:
            return ev.Persisted(number)
        case 5:
            return ev.BlobFailed(number, blob, Reason.BLOB_MISSING)
        case 6:
            return ev.BlobReady(number, BlobRef(blob, 64), number)
        case 7:
            return ev.Admitted(number, number, number)
        case 8:
            return ev.SendFailed(number, peer, Reason.QUEUE_FULL)
        case 9:
            return ev.Recall(Reason.DRIVING, 0)
        case 10:
            return ev.BudgetRead(bool(number % 2), Reason.DRIVING, number, 300, number, 0)
        case 11:
            return ev.DialFailed(peer, Reason.UNREACHABLE)
        case 12:
            return ev.PeerDown(peer, Reason.PEER_DOWN)
        case _:
            return ev.WorkerClasses((), "", (0, 0), 0, 0)
