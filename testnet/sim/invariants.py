"""What must hold after every event, whatever goes wrong: checked as it happens, in constant time.

- No token is spent twice: one token leads to one lease.
- Each (job, replica, unit) is in at most one accepted receipt.
- A car runs at most as much at once as it has slots, nothing while it is recalled, and never more
  energy than its budget allowed.
- No task is lost: every submitted job ends by its deadline, done or with a typed reason, and what
  is done is whole and right.
- Once nothing goes wrong any more, what is submitted is done, and queues drain (`Proof.settled`).

A breach raises `Broken` from inside the run, with the time of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.job import JobState
from meshnode.protocol.messages import Assign, Place, unpack
from meshnode.protocol.objects import T_ACCEPT, T_LEASE, T_RECEIPT, Acceptance, Lease, Receipt
from meshnode.protocol.sealed import TAG_18, unseal
from meshnode.protocol.types import Digest, JobId, LeaseId, Peer

from .frames import kind_of
from .mesh import REQUEST, Mesh, Site, output_of

LATE_MS = 1_000  # a job's end may be said so long after its deadline
UNIT_BYTES = 64


class Broken(AssertionError):
    """An invariant does not hold."""


class Proof(Mesh):
    """A mesh that watches itself."""

    def __init__(self, seed: int, **more: Any) -> None:
        super().__init__(seed, **more)
        self._tokens_for: dict[tuple[Peer, Digest], list[Digest]] = defaultdict(list)
        """Car and offer -> tokens that it was assigned on, the first first."""
        self._spent: dict[Digest, LeaseId] = {}
        self._leased: set[LeaseId] = set()
        self._placed_at: set[tuple[Peer, Digest]] = set()  # rendezvous, offer
        self._receipts: dict[Digest, dict[int, Receipt]] = defaultdict(dict)
        self._reach: dict[Digest, int] = {}
        self._accepted: set[tuple[JobId, int, int]] = set()
        self._running: dict[str, set[int]] = defaultdict(set)
        self._recalled: set[str] = set()
        self._budget: dict[str, tuple[int, int]] = {}  # spendable mWh, watts
        self._watt_ms: Counter[str] = Counter()
        self.submitted: dict[JobId, tuple[str, int]] = {}  # site, deadline in mono ms
        self.ended: dict[JobId, tuple[str, int]] = {}  # state, reason

    def broken(self, what: str) -> Broken:
        return Broken(f"at {self.now_us} us: {what}")

    # ---- tokens

    def _send(self, site: Site, effect: fx.Send, life: int) -> None:
        kind = kind_of(effect.frame)
        if kind == "assign":
            assign = unpack(effect.frame)
            assert isinstance(assign, Assign)
            offer = unseal(assign.offer).digest
            self._tokens_for[effect.peer, offer].append(unseal(assign.token).digest)
        elif kind == "place":
            place = unpack(effect.frame)
            assert isinstance(place, Place)
            self._placed_at.add((effect.peer, unseal(place.offer).digest))
        elif kind == "lease" and effect.frame.startswith(TAG_18):
            lease = unseal(effect.frame).open(Lease, T_LEASE)
            tokens = self._tokens_for.get((site.identity.peer, lease.offer))
            # A lease is said again to whoever assigns its offer again, and that spends nothing; a
            # rendezvous that assigns to itself sends no frame.
            own = (site.identity.peer, lease.offer) in self._placed_at
            if tokens and not own and lease.lease_id not in self._leased:
                self._leased.add(lease.lease_id)
                token = next((each for each in tokens if each not in self._spent), tokens[-1])
                if self._spent.setdefault(token, lease.lease_id) != lease.lease_id:
                    raise self.broken(f"{site.name} has leased twice on token {token.hex()[:8]}")
        super()._send(site, effect, life)

    # ---- receipts

    def stored(self, site: Site, record: fx.Record) -> None:
        if not isinstance(record, fx.SignedObject) or not site.identity.roles & REQUEST:
            return
        if record.typ == T_RECEIPT:
            receipt = unseal(record.sealed).open(Receipt, T_RECEIPT)
            if receipt.requester == site.identity.peer:
                self._receipts[receipt.channel][receipt.seq] = receipt
        elif record.typ == T_ACCEPT:
            acceptance = unseal(record.sealed).open(Acceptance, T_ACCEPT)
            self._accept(site, acceptance)

    def _accept(self, site: Site, acceptance: Acceptance) -> None:
        channel = acceptance.channel
        refused = {
            (dispute.seq, unit)
            for dispute in acceptance.disputes or ()
            for run in dispute.units
            for unit in range(run.first, run.first + run.size)
        }
        for seq in range(self._reach.get(channel, -1) + 1, acceptance.seq + 1):
            receipt = self._receipts[channel].get(seq)
            if receipt is None:
                raise self.broken(f"{site.name} accepts receipt {seq} that it has not stored")
            work = receipt.work
            for unit in range(work.units.first, work.units.first + work.units.size):
                key = (work.job_id, work.replica, unit)
                if (seq, unit) in refused:
                    continue
                if key in self._accepted:
                    raise self.broken(f"{site.name} accepts unit {unit} of {key[0].hex()} twice")
                self._accepted.add(key)
        self._reach[channel] = max(self._reach.get(channel, -1), acceptance.seq)

    # ---- the car

    def feed(self, site: Site, event: ev.Event) -> None:
        if isinstance(event, ev.BudgetRead):
            self._budget[site.name] = (event.spendable_mwh, event.watt_max)
            self._watt_ms[site.name] = 0
            if event.may_run:
                self._recalled.discard(site.name)
        elif isinstance(event, ev.ExecEnded):
            self._running[site.name].discard(event.exec_id)
            self._spend(site, event.meters.wall_ms)
        super().feed(site, event)
        if isinstance(event, ev.Recall):
            self._recalled.add(site.name)

    def _spend(self, site: Site, wall_ms: int) -> None:
        spendable, watts = self._budget.get(site.name, (0, 0))
        self._watt_ms[site.name] += watts * wall_ms
        if self._watt_ms[site.name] > 3_600 * spendable:
            raise self.broken(f"{site.name} has spent more than its budget")

    def boot(self, name: str) -> None:
        self._running[name].clear()
        self._recalled.discard(name)
        super().boot(name)

    def _execute(self, site: Site, effect: fx.StartExec, life: int) -> None:
        running = self._running[site.name]
        running.add(effect.exec_id)
        if len(running) > site.slots:
            raise self.broken(f"{site.name} runs {len(running)} with {site.slots} slots")
        if site.name in self._recalled:
            raise self.broken(f"{site.name} starts a run after its driver is back")
        super()._execute(site, effect, life)

    def _stop(self, site: Site, effect: fx.StopExec, life: int) -> None:
        if not effect.grace_ms:
            self._running[site.name].discard(effect.exec_id)
        super()._stop(site, effect, life)

    # ---- jobs

    def submit(self, site: Site, request_id: int, order: ev.JobOrder) -> None:
        self.feed(site, ev.Submit(request_id, order))

    def _notify(self, site: Site, effect: fx.Notify, life: int) -> None:
        kind = effect.notice.kind
        if kind == "submitted":
            job_id = JobId(effect.subject)
            assert site.node is not None
            job = site.node.jobs.all[job_id]
            if job.order.durable and job.digest not in site.disk.jobs:
                raise self.broken(f"{site.name} promises a job that it has not stored")
            deadline = job.deadline_mono_ms
            self.submitted[job_id] = (site.name, deadline)
            wait_ms = deadline + LATE_MS - self.now_ms
            self.at(max(1, wait_ms), lambda: self._overdue(job_id))
        elif kind == "job":
            fields = dict(effect.notice.fields)
            state, reason = fields["state"], fields["reason"]
            assert isinstance(state, str) and isinstance(reason, int)
            if state != "running":
                self.ended[JobId(effect.subject)] = (state, reason)
                if state == "failed" and not reason:
                    raise self.broken("a job failed without a reason")
        super()._notify(site, effect, life)

    def _overdue(self, job_id: JobId) -> None:
        """A submitter that restarted counts its deadline from then; one that is away is silent."""
        name, _ = self.submitted[job_id]
        node = self.sites[name].node
        if node is None or job_id in self.ended:
            return
        job = node.jobs.all.get(job_id)
        if job is None:
            raise self.broken(f"job {job_id.hex()[:8]} is lost: its submitter does not know it")
        if job.state is JobState.RUNNING:
            left_ms = job.deadline_mono_ms + LATE_MS - self.now_ms
            if left_ms <= 0:
                raise self.broken(f"job {job_id.hex()[:8]} is still in work after its deadline")
            self.at(left_ms, lambda: self._overdue(job_id))

    # ---- the end

    def settled(self) -> bool:
        """Every job has ended, no car holds a lease, every receipt has its answer."""
        for site in self.sites.values():
            node = site.node
            if node is None or node.jobs.running or node.provider.leases:
                return False
            if any(channel.open for channel in node.provider.receipts.channels.values()):
                return False
        return len(self.ended) == len(self.submitted)

    def check_whole(self) -> None:
        """Every done job's units are on its submitter's disk, once and right; every chain holds."""
        for job_id, (name, _) in self.submitted.items():
            site = self.sites[name]
            node = site.node
            assert node is not None
            job = node.jobs.all[job_id]
            if job.state is not JobState.DONE:
                continue
            found: Counter[int] = Counter()
            for record in site.disk.results:
                if record.job_digest != job.digest:
                    continue
                for index in range(record.count):
                    unit = record.first + index
                    output = record.outputs[UNIT_BYTES * index : UNIT_BYTES * (index + 1)]
                    found[unit] += 1
                    if output != output_of(unit):
                        raise self.broken(f"unit {unit} of {job_id.hex()[:8]} is wrong")
            if found != Counter(range(job.spec.units)):
                raise self.broken(f"job {job_id.hex()[:8]} is done and not whole")
        for site in self.sites.values():
            findings = check_objects(site.disk.signed).findings
            if findings:
                raise self.broken(f"the chain of {site.name} does not hold: {findings[0]}")
