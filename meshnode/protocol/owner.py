"""What this car may take on: the owner's consent and policy, the battery budget, the worker.

Read by `provider` before every lease and by `presence` before every advert and bid. Nothing here
looks at a lease; the numbers come from the owner's signed objects, the vehicle and the probe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final, NamedTuple

from ..errors import MeshError
from .allowance import Allowance, Used
from .events import BudgetRead, Meters, WorkerClass, WorkerClasses
from .job import check_steps, inline_size, state_bytes
from .lease import Granted
from .narrowing import check_fleet, narrowed
from .objects import Cited, JobSpec, Offer
from .outbox import Outbox, remember, row
from .papers import PURPOSE_COMPUTE, T_CONSENT, T_POLICY, Consent, Policy, Role, Submitters
from .reasons import Reason
from .sandbox import missing
from .sealed import unseal
from .types import (
    ARTIFACT_BYTES_MAX,
    CLOCK_SKEW_MS_MAX,
    INLINE_BYTES_MAX,
    LEASE_UNITS_MAX,
    Account,
    Digest,
    Durability,
    array_bytes,
)

UNIT_MS_MAX = 256  # artifacts whose times are remembered

# The probe measures products of f32 for a moment, beside whatever else the machine does, and an
# accelerator multiplies narrow floats up to 16 times faster: a program is refused for its time
# only where even that would not do.
_PROBE_SHORT_ON_CPU = 2
_PROBE_SHORT = 16

_NO_BUDGET = BudgetRead(False, Reason.NO_CONSENT, 0, 0, 0, 0)


def rate_mflops_most(classes: Iterable[WorkerClass]) -> int:
    """No program computes faster here; 0 before the probe has answered."""
    return max(
        (
            each.rate_mflops * (_PROBE_SHORT_ON_CPU if each.platform == "cpu" else _PROBE_SHORT)
            for each in classes
        ),
        default=0,
    )


def unit_bytes(job: JobSpec) -> int:
    """What a unit's own inputs and outputs weigh, by their shapes; what all units share is not in
    it, because it is fetched once. ValueError for a shape or dtype that is none."""
    mapped = sum(array_bytes(arg.spec) for arg in job.args if arg.mapped)
    return mapped + sum(array_bytes(spec) for spec in job.outs)


_PROVIDE: Final = int(Role.PROVIDE)  # an enumeration's own `&` takes ten times as long


class Allowed(NamedTuple):
    """What holds for this car: the owner's consent, and the policy as far as the fleet goes too."""

    given: Consent
    policy: Policy
    cited: Cited


class Owner:
    def __init__(self, outbox: Outbox) -> None:
        self._out = outbox
        self.classes: WorkerClasses | None = None
        self.budget = _NO_BUDGET
        self.draining: Reason | None = None  # for good
        self.recalled: Reason | None = None  # until the readings allow work again
        self.wakes_unix_ms: int | None = None  # it sleeps until then
        self.worked_mono_ms = 0  # when it last did
        self.drawn_uj = 0  # by all runs since this node began, and of it out of the battery
        self.drawn_battery_uj = 0
        self.worked_ms = 0  # by all runs, one beside the other
        self.unpaid_uj = 0  # of these, for runs that were stopped, since their last whole unit
        self.unpaid_battery_uj = 0
        self.unpaid_ms = 0
        self.stopped: dict[int, tuple[Meters, Account | None]] = {}
        """Runs that were stopped, until their end is told: their last meters, and who pays."""
        self.allowance = Allowance()
        self._unit_ms: OrderedDict[Digest, float] = OrderedDict()  # artifact -> measured
        self.consent = self._read_consent()
        """The last that held: what was done under it is receipted, also after a withdrawal."""
        self.withdrawn = False

    def on_terms(self, consent: bytes | None, policy: bytes | None, fleet: bytes | None) -> bool:
        """Other papers are in force from now on; whether they let this car work."""
        identity = self._out.identity
        self._out.identity = replace(identity, consent=consent, policy=policy, fleet=fleet)
        found = self._read_consent()
        self.withdrawn = found is None
        if found is not None:
            self.consent = found
            if self.recalled is Reason.NO_CONSENT:
                self.recalled = None
        with suppress(MeshError):
            papers = [row(unseal(wire)) for wire in (consent, policy, fleet) if wire]
            if papers:
                self._out.persist(tuple(papers), Durability.POWER)
        return found is not None

    def _read_consent(self) -> Allowed | None:
        identity = self._out.identity
        if identity.consent is None or identity.policy is None:
            return None
        try:
            sealed, policy_sealed = unseal(identity.consent), unseal(identity.policy)
            consent = sealed.open(Consent, T_CONSENT)
            policy = policy_sealed.open(Policy, T_POLICY)
            fleet = None if identity.fleet is None else unseal(identity.fleet)
            narrower = None if fleet is None else narrowed(policy, check_fleet(fleet, consent))
        except MeshError:
            return None
        whole = (
            sealed.kid == consent.account == identity.account
            and policy_sealed.kid == policy.account == identity.account
            and consent.network == policy.network == identity.network
            and consent.policy == policy_sealed.digest
            and consent.withdrawn_ms is None
            and bool(consent.purposes & PURPOSE_COMPUTE)
        )
        cited = Cited(sealed.digest, policy_sealed.digest, None if fleet is None else fleet.digest)
        return Allowed(consent, narrower or policy, cited) if whole else None

    @property
    def active(self) -> bool:
        return bool(self._out.identity.roles & _PROVIDE)

    def may_run(self) -> Reason:
        """Whether this car takes work at all now."""
        if not self.active:
            return Reason.NOT_PROVIDING
        if self.draining is not None:
            return self.draining
        if self.recalled is not None:
            return self.recalled
        if self.wakes_unix_ms is not None:
            return Reason.ASLEEP
        now = self._out.now.unix_ms
        if (
            self.consent is None
            or self.withdrawn
            or not self.consent.given.given_ms - CLOCK_SKEW_MS_MAX <= now
            or not now < self.consent.given.lapses_ms
        ):
            return Reason.NO_CONSENT
        if self.classes is None or not self.classes.classes:
            return Reason.NO_WORKER
        if self.lacks_layers():
            return Reason.SANDBOX
        if not self.budget.may_run:
            return self.budget.reason
        return Reason.OK

    def lacks_layers(self) -> bool:
        """Whether the workers have less than the owner's policy asks for."""
        return self.classes is not None and bool(
            missing(self.sandbox_least, self.classes.sandbox_layers)
        )

    @property
    def papers(self) -> Cited:
        """Of the last consent and policy that held."""
        assert self.consent is not None
        return self.consent.cited

    @property
    def sandbox_least(self) -> int:
        """Layers that the owner's policy asks of every worker."""
        return 0 if self.consent is None else self.consent.policy.sandbox_least or 0

    def admits(self, payer: bytes) -> bool:
        assert self.consent is not None
        consent, policy = self.consent.given, self.consent.policy
        mode, accounts = policy.submitters
        own = payer == self._out.identity.account
        if mode is Submitters.NETWORK or payer in accounts:
            return True
        return own or (mode is Submitters.FLEET and payer == consent.operator)

    def allows(self, payer: Account, offer: Offer, others: list[Granted]) -> Reason:
        """Whether the account may have this run too, by the policy's caps of a day; `others` are
        its leases in hand, which will still cost what stands in no receipt. While nobody knows how
        long one of them takes, another beside it could be far over the cap: it waits."""
        assert self.consent is not None
        leases, most_bytes, device_s = self.consent.policy.caps
        used = self.allowance.used(payer, self._out.now.unix_ms)
        left = [(lease.offer, lease.offer.run.size - lease.receipted) for lease in others]
        left = [(each, units) for each, units in left if units > 0]
        promised_ms = [self._left_ms(each, units) for each, units in left]
        promised_bytes = sum(unit_bytes(each.job) * units for each, units in left)
        size = offer.run.size
        device_ms = used.device_ms + sum(promised_ms) + self._left_ms(offer, size)
        all_bytes = used.bytes + promised_bytes + unit_bytes(offer.job) * size
        if (
            (leases and used.leases >= leases)
            or (most_bytes and all_bytes > most_bytes)
            or (device_s and device_ms >= device_s * 1_000)
        ):
            return Reason.ACCOUNT_CAP
        return Reason.BUSY if device_s and not all(promised_ms) else Reason.OK

    def _left_ms(self, offer: Offer, units: int) -> float:
        """So many units of it, the first of them from the offer's step on."""
        steps = offer.job.steps
        share = 1.0 if steps is None else 1 - (offer.step or 0) / steps.total
        return self.run_ms(offer.job, units) * share

    @property
    def caps_accounts(self) -> bool:
        return self.consent is not None and any(self.consent.policy.caps)

    def has_lease(self, payer: Account) -> None:
        self.allowance.add(payer, self._out.now.unix_ms, Used(leases=1))

    def run_ms(self, job: JobSpec, units: int) -> float:
        """How long so many units of the job last here, by those of its artifact before; else 0."""
        return self._unit_ms.get(job.artifact, 0.0) * units * (job.steps.total if job.steps else 1)

    def took(self, job: JobSpec, run_ms: float, units: int, step: int) -> None:
        """What a run did in that time: units, or one unit's steps from `step` on."""
        self.worked_mono_ms = self._out.now.mono_ms
        done = units * (job.steps.total - step) if job.steps else units
        if done > 0:
            spent = max(1.0, run_ms) / done
            before = self._unit_ms.get(job.artifact, spent)
            remember(self._unit_ms, job.artifact, 0.5 * before + 0.5 * spent, UNIT_MS_MAX)

    def drew(self, before: Meters, after: Meters) -> Meters:
        """A run's newest meters, whose energy counts from here on."""
        self.drawn_uj += max(0, after.energy_uj - before.energy_uj)
        self.worked_ms += max(0, after.wall_ms - before.wall_ms)
        self.drawn_battery_uj += max(0, after.battery_uj - before.battery_uj)
        return after

    def stops(self, exec_id: int, meters: Meters, payer: Account | None) -> None:
        self.stopped[exec_id] = meters, payer

    def ended_after_stop(self, exec_id: int, meters: Meters) -> None:
        """What it drew and took until it stood counts, though nobody pays for it."""
        before, payer = self.stopped.pop(exec_id, (meters, None))
        self.drew(before, meters)
        self.unpaid_uj += max(0, meters.energy_uj - before.energy_uj)
        self.unpaid_battery_uj += max(0, meters.battery_uj - before.battery_uj)
        self.unpaid_ms += max(0, meters.wall_ms - before.wall_ms)
        if payer is not None:
            used = Used(device_ms=max(0, meters.device_ms - before.device_ms))
            self.allowance.add(payer, self._out.now.unix_ms, used)

    def run_mwh(self, run_ms: float) -> float:
        """What battery or plug give for so long a run, at the most that the owner allows."""
        return max(self.budget.load_w, self.budget.watt_max) * run_ms / 3_600

    @property
    def slots(self) -> int:
        return self.classes.slots if self.classes else 0

    def fits(self, offer: Offer) -> Reason:
        """The job against this car: artifact, sizes and memory."""
        job = offer.job
        if job.artifact not in self._out.identity.artifacts and job.code is None:
            return Reason.UNKNOWN_ARTIFACT
        if job.code is not None and job.code.size > ARTIFACT_BYTES_MAX:
            return Reason.TOO_LARGE
        if offer.run.size > LEASE_UNITS_MAX or inline_size(job, offer.run.size) > INLINE_BYTES_MAX:
            return Reason.TOO_LARGE
        try:
            for arg in job.args:
                want = array_bytes(arg.spec) * (job.units if arg.mapped else 1)
                if arg.size != want:
                    return Reason.KERNEL_SPEC
            out_bytes = sum(array_bytes(spec) for spec in job.outs)
            check_steps(job)
        except ValueError:
            return Reason.KERNEL_SPEC
        assert self.classes is not None
        memory_mb = min(c.memory_mb for c in self.classes.classes)
        if job.memory_mb_max > memory_mb or out_bytes > self._out.limits.result_keep_bytes_max:
            return Reason.MEMORY
        if job.steps is not None and not self._resumes(offer):
            return Reason.KERNEL_SPEC
        return Reason.OK

    def affords(self, offer: Offer, kflop_per_unit: int, promised_mwh: float) -> tuple[Reason, str]:
        """Whether the run fits the lease's time and the battery's energy, and the figures if not.
        `promised_mwh` is what leases before it will still draw.

        The time is what such units took here before; without that, what the best of the device's
        rates would need for `kflop_per_unit` (0: not known, and then nothing is refused).
        """
        assert self.classes is not None
        job, units = offer.job, offer.run.size
        share = 1.0 if job.steps is None else 1 - (offer.step or 0) / job.steps.total
        run_ms = self.run_ms(job, units) * share
        how = "as such units took before"
        if not run_ms:
            rate_mflops = rate_mflops_most(self.classes.classes)
            run_ms = kflop_per_unit * units * share / rate_mflops if rate_mflops else 0.0
            how = f"at {rate_mflops / 1000:.3g} GFLOP/s"
        subject = f"{units} units take" if units > 1 else "one unit takes"
        takes = f"{subject} {run_ms / 1000:.3g} s, {how}"
        # A long job may be handed on in the middle.
        if job.steps is None and run_ms > self.budget.lease_s_max * 1000:
            return Reason.LEASE_LENGTH, f"{takes}; {self.budget.lease_s_max} s are allowed"
        energy_mwh = self.run_mwh(run_ms)
        left_mwh = max(0.0, self.budget.spendable_mwh - promised_mwh)
        if energy_mwh > left_mwh:
            load_w = max(self.budget.load_w, self.budget.watt_max)
            needs = f"{takes} and {load_w} W: {energy_mwh / 1000:.3g} Wh"
            return Reason.BUDGET, f"{needs}; {left_mwh / 1000:.3g} Wh may be spent"
        return Reason.OK, ""

    @staticmethod
    def _resumes(offer: Offer) -> bool:
        """A stepped unit travels alone, and its checkpoint is as large as its state."""
        assert offer.job.steps is not None
        if offer.run.size != 1 or (offer.state is None) != (offer.step is None):
            return False
        return offer.state is None or (
            offer.state.size == state_bytes(offer.job)
            and 0 < (offer.step or 0) < offer.job.steps.total
        )
