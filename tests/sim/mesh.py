"""A small deterministic mesh of real machines: seeded heap, faults, a virtual worker.

No placement decision lives here. Frames arrive after a delay, persists after another; a crash
drops every Persist whose Persisted has not been handled and keeps the rest, as a power loss would.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import nacl.signing

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.acceptances import NoAudit
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.node import Node
from meshnode.protocol.objects import (
    T_CONSENT,
    T_MANDATE,
    T_POLICY,
    AdmitRule,
    Band,
    Caps,
    Consent,
    Mandate,
    Policy,
    Share,
    Submitters,
)
from meshnode.protocol.outbox import Identity, Restored, RestoredResult
from meshnode.protocol.placement import AdvertPlacement
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import seal
from meshnode.protocol.types import (
    Account,
    BlobRef,
    Digest,
    Lane,
    Limits,
    NetworkId,
    Now,
    Peer,
)

NETWORK = NetworkId(b"simnet00")
ARTIFACT = Digest(b"\x11" * 32)
EPOCH_MS = 1_800_000_000_000
DAY_MS = 86_400_000
KERNEL_MS = 5
PROVIDE, REQUEST = 1, 2


def mandate_of(seed: int, roles: int, network: NetworkId, begins_ms: int) -> bytes:
    """Six days of it, as the node's account signs it."""
    peer = KeySigner(seed.to_bytes(32, "big")).peer
    account_key = KeySigner((seed + (1 << 60)).to_bytes(32, "big"))
    account = Account(account_key.account)
    ends_ms = begins_ms + 6 * DAY_MS
    mandate = Mandate(1, network, account, peer, "mandate", roles, 0, begins_ms, ends_ms)
    return seal(mandate, T_MANDATE, account, account_key.sign).wire


def identity_of(
    seed: int, roles: int, *, network: NetworkId = NETWORK
) -> tuple[Identity, KeySigner]:
    """All real signed objects, from a seed."""
    node_key = KeySigner(seed.to_bytes(32, "big"))
    account_key = KeySigner((seed + (1 << 60)).to_bytes(32, "big"))
    account = Account(account_key.account)
    mandate = mandate_of(seed, roles, network, EPOCH_MS)
    policy = Policy(
        1,
        network,
        account,
        "policy",
        300,
        0,
        20_000,
        300,
        1,
        (50, 400),
        12_000,
        0,
        (Band(0, 1439, 0),),
        900,
        150,
        AdmitRule(Submitters.NETWORK, ()),
        Caps(0, 0, 0),
    )
    policy_sealed = seal(policy, T_POLICY, account, account_key.sign)
    consent = Consent(
        1,
        network,
        account,
        "consent",
        account,
        bytes(16),
        1,
        (Share(account, 0, 10_000),),
        policy_sealed.digest,
        Digest(b"\x22" * 32),
        "en",
        EPOCH_MS,
        EPOCH_MS + 10**10,
    )
    identity = Identity(
        network,
        node_key.peer,
        account,
        "cell",
        "XXX",
        roles,
        mandate,
        seal(consent, T_CONSENT, account, account_key.sign).wire,
        policy_sealed.wire,
        frozenset({ARTIFACT}),
    )
    return identity, node_key


@dataclass
class Disk:
    """What a node has stored: survives a crash."""

    signed: list[fx.SignedObject] = field(default_factory=list)
    jobs: dict[Digest, fx.JobRecord] = field(default_factory=dict)
    tasks: dict[tuple[Digest, int], fx.TaskRecord] = field(default_factory=dict)
    results: list[fx.ResultRecord] = field(default_factory=list)
    held: dict[tuple[bytes, bytes, int], fx.HeldRecord] = field(default_factory=dict)
    blobs: set[Digest] = field(default_factory=set)  # fetched
    full: bool = False

    def store(self, record: fx.Record) -> None:
        match record:
            case fx.SignedObject():
                if all(r.sealed != record.sealed for r in self.signed):
                    self.signed.append(record)
            case fx.JobRecord():
                self.jobs[record.job_digest] = record
            case fx.TaskRecord():
                self.tasks[record.job_digest, record.first] = record
            case fx.ResultRecord():
                self.results.append(record)
            case fx.HeldRecord():
                self.held[record.requester, record.task_id, record.attempt] = record
            case fx.HeldDropped():
                self.held.pop((record.requester, record.task_id, record.attempt), None)

    def restored(self) -> Restored:
        return Restored(
            tuple(self.signed),
            tuple(self.jobs.values()),
            tuple(self.tasks.values()),
            tuple(
                RestoredResult(r.job_digest, r.first, r.count, r.attempt, r.peer, r.digests)
                for r in self.results
            ),
            tuple(self.held.values()),
        )


@dataclass
class Site:
    """One simulated node and what is around it."""

    name: str
    identity: Identity
    signer: KeySigner
    limits: Limits
    disk: Disk = field(default_factory=Disk)
    node: Node | None = None
    life: int = 0
    links: set[str] = field(default_factory=set)
    waiting: dict[int, list[fx.Effect]] = field(default_factory=lambda: defaultdict(list))
    pending: set[int] = field(default_factory=set)
    pins: Counter[Digest] = field(default_factory=Counter)
    notices: list[tuple[bytes, fx.Notice]] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    tick_at: int | None = None
    stored_at: int = 0
    slots: int = 1


class Mesh:
    def __init__(
        self, seed: int, *, delay_ms: tuple[int, int] = (1, 8), limits: Limits | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.now_ms = 0
        self.delay_ms = delay_ms
        self.limits = limits or Limits()
        self.sites: dict[str, Site] = {}
        self.by_peer: dict[Peer, Site] = {}
        self.trace: list[str] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._lane_clock: dict[tuple[str, str], int] = {}
        self.unit_ms = KERNEL_MS
        self.kflop_per_unit = 7
        self.counted = True  # the kernel's cost is whole
        self.run_kflop = 0  # a unit, as the run learns it from the compiler
        self.run_counted = True
        self.fail_kernel = False
        self.fail_reason = Reason.FAILED_BY_JOB
        self.queue_full = 0.0  # chance that a frame of `full_lanes` finds its queue full
        self.full_lanes = {Lane.RESULT}
        self.no_blobs = False  # no holder ever answers
        self.lost: set[Digest] = set()  # blobs that nobody has any more
        self.slice_steps = 10  # of a long job
        self.stepping: dict[int, tuple[int, int]] = {}  # exec -> unit, step
        self.began: list[tuple[str, int, int]] = []  # car, unit, step that it went on from
        self.refuse_kernel = ""  # the executor does not admit it
        self.partitioned: set[frozenset[str]] = set()

    # ---- building

    def add(self, name: str, roles: int, *, slots: int = 1, network: NetworkId = NETWORK) -> Site:
        identity, signer = identity_of(len(self.sites) + 1, roles, network=network)
        site = Site(name, identity, signer, self.limits, slots=slots)
        self.sites[name] = site
        self.by_peer[identity.peer] = site
        self.boot(name)
        return site

    def boot(self, name: str) -> None:
        site = self.sites[name]
        site.life += 1
        site.tick_at = None
        site.waiting.clear()
        site.pending.clear()
        site.pins.clear()
        site.node = Node(
            site.identity,
            site.limits,
            site.signer,
            AdvertPlacement(),
            NoAudit(),
            random.Random(self.seed * 1000 + site.life * 100 + len(name) + sum(name.encode())),
            site.disk.restored(),
        )
        self._carry(site, site.node.start(self.now()))
        self.feed(site, ev.AddrsKnown((f"/sim/{name}",)))
        if site.identity.roles & PROVIDE:
            self.feed(site, ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 7_200, 0))
            worker = ev.WorkerClass("cpu", "sim", 4_096, 100_000, b"simclass")
            self.feed(site, ev.WorkerClasses((worker,), "0.0", (9, 10), 0, site.slots))

    def connect(self, one: str, other: str) -> None:
        a, b = self.sites[one], self.sites[other]
        if other in a.links or a.node is None or b.node is None:
            return
        if frozenset((one, other)) in self.partitioned:
            return
        a.links.add(other)
        b.links.add(one)
        self.feed(a, ev.PeerUp(b.identity.peer, "lan", (f"/sim/{other}",), False))
        self.feed(b, ev.PeerUp(a.identity.peer, "lan", (f"/sim/{one}",), True))

    def connect_all(self) -> None:
        names = list(self.sites)
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                self.connect(one, other)

    def cut(self, one: str, other: str) -> None:
        a, b = self.sites[one], self.sites[other]
        if other not in a.links:
            return
        a.links.discard(other)
        b.links.discard(one)
        self.feed(a, ev.PeerDown(b.identity.peer, Reason.PEER_DOWN))
        self.feed(b, ev.PeerDown(a.identity.peer, Reason.PEER_DOWN))

    def crash(self, name: str) -> None:
        site = self.sites[name]
        site.life += 1
        site.node = None
        for other in sorted(site.links):
            self.sites[other].links.discard(name)
            self.feed(self.sites[other], ev.PeerDown(site.identity.peer, Reason.PEER_DOWN))
        site.links.clear()

    # ---- running

    def renew(self, name: str, begins_ms: int) -> None:
        """Its account signs for it anew."""
        site = self.sites[name]
        number, own = list(self.sites).index(name) + 1, site.identity
        mandate = mandate_of(number, own.roles, own.network, EPOCH_MS + begins_ms)
        site.identity = replace(own, mandate=mandate)
        self.feed(site, ev.MandateRenewed(mandate))

    def skip(self, ms: int) -> None:
        """So long nothing happens at all: what was due comes late."""
        self.now_ms += ms
        self._heap = [(at + ms, number, call) for at, number, call in self._heap]

    def now(self) -> Now:
        return Now(self.now_ms, EPOCH_MS + self.now_ms)

    def at(self, delay_ms: int, call: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now_ms + delay_ms, self._order, call))

    def feed_life(self, site: Site, life: int, event: ev.Event) -> None:
        """What was under way reaches only the life of the site that asked for it."""
        if site.life == life:
            self.feed(site, event)

    def feed(self, site: Site, event: ev.Event) -> None:
        if site.node is None:
            return
        self._carry(site, site.node.handle(event, self.now()))

    def run(self, until: Callable[[], bool], *, ms_max: int = 120_000) -> bool:
        end = self.now_ms + ms_max
        while not until():
            if not self._heap or self._heap[0][0] > end:
                return False
            self.now_ms, _, call = heapq.heappop(self._heap)
            call()
        return True

    def rest(self, ms: int) -> None:
        end = self.now_ms + ms
        self.at(ms, lambda: None)
        self.run(lambda: self.now_ms >= end, ms_max=ms + 1)

    # ---- carrying effects out

    def _carry(self, site: Site, effects: list[fx.Effect]) -> None:
        for effect in effects:
            after = getattr(effect, "after", None)
            if after is not None and after in site.pending:
                site.waiting[after].append(effect)
            else:
                self._do(site, effect)
        self._wake(site)

    def _wake(self, site: Site) -> None:
        node = site.node
        due = node.deadline_mono_ms() if node else None
        if due is None or node is None or (site.tick_at is not None and site.tick_at <= due):
            return
        site.tick_at = due
        life = site.life

        def tick() -> None:
            if site.life != life or site.tick_at != due:
                return  # an earlier one took its place, and set what comes next
            site.tick_at = None
            self.feed(site, ev.Tick())

        self.at(max(1, due - self.now_ms), tick)

    def _do(self, site: Site, effect: fx.Effect) -> None:
        life = site.life
        self.trace.append(f"{self.now_ms} {site.name} {effect!r}")
        match effect:
            case fx.Send():
                self._send(site, effect)
            case fx.Publish():
                for other in self.sites.values():
                    if other is not site and other.node and not self._split(site, other):
                        self._gossip(site, other, effect)
            case fx.Dial():
                dialled = self.by_peer.get(effect.peer)
                self.at(self._delay(), lambda: self._dial(site, dialled, effect.peer, life))
            case fx.Block():
                other = self.by_peer[effect.peer]
                self.at(1, lambda: self.cut(site.name, other.name))
            case fx.Persist():
                site.pending.add(effect.seq)
                # in their order, as the journal stores them
                site.stored_at = max(site.stored_at, self.now_ms + self.rng.randint(1, 6))
                self.at(site.stored_at - self.now_ms, lambda: self._persisted(site, effect, life))
            case fx.Notify():
                site.notices.append((effect.subject, effect.notice))
            case fx.Pin():
                site.pins[effect.blob_id] += 1
            case fx.Unpin():
                site.pins[effect.blob_id] -= 1
            case fx.FetchBlob() if self.no_blobs:
                pass
            case fx.FetchBlob():
                self.at(self._delay(), lambda: self._fetch(site, effect, life))
            case fx.Admit() if effect.spec.kernel == self.refuse_kernel:
                refused = ev.ExecEnded(effect.exec_id, Reason.KERNEL_SPEC, ev.Meters())
                self.at(200, lambda: self.feed_life(site, life, refused))
            case fx.Admit():
                admitted = ev.Admitted(effect.exec_id, self.kflop_per_unit, 10, self.counted)
                self.at(1, lambda: self.feed_life(site, life, admitted))
            case fx.StartExec():
                self._execute(site, effect, life)
            case fx.StopExec():
                site.stopped.add(effect.exec_id)
                if effect.grace_ms and effect.exec_id in self.stepping:
                    unit, step = self.stepping[effect.exec_id]
                    event = ev.SliceDone(
                        effect.exec_id, unit, _state(unit, step), step, ev.Meters()
                    )
                    self.at(1, lambda: self.feed_life(site, life, event))
                ended = ev.ExecEnded(effect.exec_id, effect.reason, ev.Meters())
                self.at(1, lambda: self.feed_life(site, life, ended))
            case _:
                pass

    def _delay(self) -> int:
        return self.rng.randint(*self.delay_ms)

    def _split(self, a: Site, b: Site) -> bool:
        return frozenset((a.name, b.name)) in self.partitioned

    def _send(self, site: Site, effect: fx.Send) -> None:
        other = self.by_peer[effect.peer]
        if other.name not in site.links:
            failed = ev.SendFailed(effect.send_id, effect.peer, Reason.PEER_DOWN)
            self.at(0, lambda: self.feed(site, failed))
            return
        if effect.lane in self.full_lanes and self.rng.random() < self.queue_full:
            full = ev.SendFailed(effect.send_id, effect.peer, Reason.QUEUE_FULL)
            self.at(0, lambda: self.feed(site, full))
            return
        # one stream, in order
        key = (site.name, other.name)
        at = max(self.now_ms + self._delay(), self._lane_clock.get(key, 0))
        self._lane_clock[key] = at
        lives = (site.life, other.life)

        def deliver() -> None:
            if (site.life, other.life) == lives and other.name in site.links:
                frame = ev.FrameIn(site.identity.peer, effect.lane, effect.frame)
                self.feed(other, frame)

        self.at(at - self.now_ms, deliver)

    def _gossip(self, site: Site, other: Site, effect: fx.Publish) -> None:
        life = other.life
        event = ev.GossipIn(effect.topic, site.identity.peer, effect.frame)
        self.at(self._delay(), lambda: self.feed_life(other, life, event))

    def _dial(self, site: Site, other: Site | None, peer: Peer, life: int) -> None:
        if site.life != life:
            return
        if other is None or other.node is None or self._split(site, other):
            self.feed(site, ev.DialFailed(peer, Reason.UNREACHABLE))
        else:
            self.connect(site.name, other.name)

    def _fetch(self, site: Site, effect: fx.FetchBlob, life: int) -> None:
        """From any holder that is still there; what is here already needs none."""
        blob_id = effect.ref.blob_id
        holders = [self.by_peer[peer] for peer in effect.holders if peer in self.by_peer]
        here = blob_id in site.disk.blobs or any(holder.node is not None for holder in holders)
        event: ev.Event = ev.BlobFailed(effect.fetch_id, blob_id, Reason.BLOB_MISSING)
        if here and blob_id not in self.lost and site.life == life:
            site.disk.blobs.add(blob_id)
            event = ev.BlobReady(effect.fetch_id, effect.ref, effect.byte_count)
        self.feed_life(site, life, event)

    def _persisted(self, site: Site, effect: fx.Persist, life: int) -> None:
        if site.life != life:
            return  # the crash came first: nothing of it is kept
        if site.disk.full:
            site.waiting.pop(effect.seq, None)
            site.pending.discard(effect.seq)
            self.feed(site, ev.PersistFailed(effect.seq, Reason.DISK_FULL))
            return
        for record in effect.records:
            site.disk.store(record)
        site.pending.discard(effect.seq)
        for waiting in site.waiting.pop(effect.seq, []):
            self._do(site, waiting)
        self.feed(site, ev.Persisted(effect.seq))

    def _meters(self, done: int) -> ev.Meters:
        ms = done * self.unit_ms
        return ev.Meters(ms, ms, done * self.run_kflop, counted=self.run_counted)

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        """The virtual worker: output of unit i is i as 64 bytes; parts of up to 4 units."""
        run, done = effect.run, 0
        if effect.spec.stepped is not None:
            self._step(site, effect, life)
            return
        if self.fail_kernel:
            failed = ev.ExecEnded(effect.exec_id, self.fail_reason, ev.Meters(), "boom")
            self.at(self.unit_ms, lambda: self.feed_life(site, life, failed))
            return
        while done < run.count:
            count = min(4, run.count - done)
            first = run.first + done
            outputs = tuple(output_of(first + i) for i in range(count))
            done += count
            meters = self._meters(done)
            event = ev.UnitsDone(effect.exec_id, first, outputs, meters)
            self.at(done * self.unit_ms, self._unless_stopped(site, effect.exec_id, event, life))
        ended = ev.ExecEnded(effect.exec_id, Reason.DONE, self._meters(done))
        self.at(done * self.unit_ms, self._unless_stopped(site, effect.exec_id, ended, life))

    def _step(self, site: Site, effect: fx.StartExec, life: int) -> None:
        """The virtual worker of a long job: a step a millisecond, a slice of `slice_steps`."""
        spec, unit = effect.spec, effect.run.first
        self.began.append((site.name, unit, effect.step))
        for step in range(effect.step + self.slice_steps, spec.steps + 1, self.slice_steps):
            meters = ev.Meters(step - effect.step, step - effect.step)
            state = _state(unit, step)
            for event in (
                ev.Partial(effect.exec_id, unit, step, step.to_bytes(64, "big")),
                ev.SliceDone(effect.exec_id, unit, state, step, meters),
            ):
                call = self._unless_stopped(site, effect.exec_id, event, life)
                self.at(step - effect.step, call)
            known = partial(self.stepping.__setitem__, effect.exec_id, (unit, step))
            self.at(step - effect.step, known)
        left = spec.steps - effect.step
        meters = ev.Meters(left, left)
        units = ev.UnitsDone(effect.exec_id, unit, (output_of(unit),), meters)
        ends: tuple[ev.Event, ...] = (units, ev.ExecEnded(effect.exec_id, Reason.DONE, meters))
        for end in ends:
            self.at(left, self._unless_stopped(site, effect.exec_id, end, life))

    def _unless_stopped(
        self, site: Site, exec_id: int, event: ev.Event, life: int
    ) -> Callable[[], None]:
        def call() -> None:
            if site.life == life and exec_id not in site.stopped:
                self.feed(site, event)

        return call


def _state(unit: int, step: int) -> BlobRef:
    return BlobRef(Digest(hashlib.sha256(b"%d %d" % (unit, step)).digest()), 64)


def output_of(unit: int) -> bytes:
    return unit.to_bytes(8, "big") * 8


def tampered(key: bytes) -> nacl.signing.SigningKey:
    return nacl.signing.SigningKey(key)


__all__ = ["ARTIFACT", "PROVIDE", "REQUEST", "Mesh", "Site", "output_of", "replace"]
