"""One life of a channel as vectors: mandates, terms, agreement, offer, lease, parts, receipts,
acceptance. Every digest that one object takes from another can be recomputed from the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from meshnode.protocol import fields, merkle, messages, objects, papers
from meshnode.protocol.codec import digest_of, encode
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rule import encode_map
from meshnode.protocol.sealed import Sealed, seal
from meshnode.protocol.types import (
    ArraySpec,
    Digest,
    JobId,
    LeaseId,
    NetworkId,
    TaskId,
)

NOW_MS = 1_800_000_000_000
DAY_MS = 86_400_000
UNITS = 6


def key(name: str) -> KeySigner:
    return KeySigner(hashlib.sha256(name.encode()).digest())


def sha(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).digest())


class Story:
    """Two accounts, two nodes, one job of six units; the second receipt is withheld in part."""

    def __init__(self) -> None:
        self.owner, self.car = key("owner"), key("car")
        self.payer, self.laptop = key("payer"), key("laptop")
        self.steps: list[tuple[str, str, Any]] = []  # who, what, sealed object or frame
        self.genesis = self._sealed(
            self.owner,
            papers.T_GENESIS,
            papers.Genesis(
                1,
                self.owner.account,
                "genesis",
                "vectors",
                papers.NetworkKind.TEST,
                "EUR",
                papers.Credit.FREE,
                (),
                (self.owner.account,),
                1,
                NOW_MS,
            ),
        )
        self.network = NetworkId(self.genesis.digest[:8])

    def _sealed(self, signer: KeySigner, typ: str, obj: Any) -> Sealed:
        kid = signer.account if signer in (self.owner, self.payer) else signer.peer
        sealed = seal(obj, typ, kid, signer.sign)
        who = next(name for name, value in vars(self).items() if value is signer)
        self.steps.append((who, typ, sealed))
        return sealed

    def _frame(self, who: str, message: Any) -> None:
        self.steps.append((who, type(message).__name__, messages.pack(message)))

    def _mandate(self, account: KeySigner, node: KeySigner, role: papers.Role) -> Sealed:
        return self._sealed(
            account,
            papers.T_MANDATE,
            papers.Mandate(
                1,
                self.network,
                account.account,
                node.peer,
                "mandate",
                int(role),
                10**9,
                NOW_MS,
                NOW_MS + 7 * DAY_MS,
            ),
        )

    def agree(self) -> None:
        car_mandate = self._mandate(self.owner, self.car, papers.Role.PROVIDE)
        laptop_mandate = self._mandate(self.payer, self.laptop, papers.Role.REQUEST)
        rates = (objects.Rate(0, 3, 7), objects.Rate(2, 1, 1000))
        end = NOW_MS + 7 * DAY_MS
        self._frame("laptop", messages.TermsRequest(laptop_mandate.wire))
        self._frame(
            "car",
            messages.Terms(car_mandate.wire, "EUR", rates, 10**6, 10**7, 60_000, end, 1_209_600),
        )
        self.agreement = objects.Agreement(
            1,
            self.network,
            self.car.peer,
            self.laptop.peer,
            "agreement",
            self.owner.account,
            self.payer.account,
            "EUR",
            rates,
            10**6,
            10**7,
            60_000,
            end,
            1_209_600,
            car_mandate.digest,
            laptop_mandate.digest,
            sha("nonce")[:16],
        )
        self.channel = self._sealed(self.laptop, objects.T_AGREEMENT, self.agreement).digest
        again = self._sealed(self.car, objects.T_AGREEMENT, self.agreement)
        assert again.digest == self.channel

    def ask(self) -> None:
        """The job, its one run, and the offer of it."""
        spec = ArraySpec("int32", (2,))
        inline = b"".join(i.to_bytes(4, "little") for i in range(2 * UNITS))
        self.inline = inline
        self.job = objects.JobSpec(
            1,
            self.network,
            self.laptop.peer,
            sha("job")[:16],
            "job",
            "example.double@1",
            sha("artifact"),
            (objects.JobArg(1, spec, Digest(hashlib.sha256(inline).digest()), len(inline), 1),),
            (spec,),
            UNITS,
            1_000,
            64,
            1,
        )
        self.job_digest = Digest(hashlib.sha256(encode(encode_map(self.job))).digest())
        self.task_digest = digest_of([self.job_digest, 0, UNITS, 0])
        self.input_root = Digest(hashlib.sha256(inline).digest())
        self.task_id = TaskId(self.task_digest[:16])
        self.span = span = fields.Span(0, UNITS)
        self.offer = self._sealed(
            self.laptop,
            objects.T_OFFER,
            objects.Offer(
                1,
                self.network,
                self.laptop.peer,
                self.car.peer,
                "offer",
                self.job,
                span,
                0,
                span,
                self.input_root,
                0,
                objects.OfferKind.FIRST,
                self.channel,
                30_000,
                NOW_MS + 60_000,
                10**6,
            ),
        )
        self._frame("laptop", messages.Inputs(self.task_id, 0, inline))

    def run(self) -> None:
        """The lease, and what comes of it."""
        self.lease_id = LeaseId(sha("lease")[:16])
        self._sealed(
            self.car,
            objects.T_LEASE,
            objects.Lease(
                1,
                self.network,
                self.car.peer,
                self.laptop.peer,
                "lease",
                self.lease_id,
                self.task_id,
                0,
                self.span,
                self.offer.digest,
                30_000,
                2_000,
                0,
                NOW_MS + 5,
                self.channel,
            ),
        )
        self.outputs = [
            b"".join((2 * i).to_bytes(4, "little") for i in (2 * unit, 2 * unit + 1))
            for unit in range(UNITS)
        ]
        self._frame("car", messages.Part(self.lease_id, 0, tuple(self.outputs[:4])))
        self._frame("car", messages.Heartbeat(self.lease_id, 4, 10))
        self._frame("car", messages.Part(self.lease_id, 4, tuple(self.outputs[4:])))
        self._frame("car", messages.Ended(self.lease_id, Reason.DONE, UNITS, 61, 75))

    def settle(self) -> None:
        leaves = [hashlib.sha256(output).digest() for output in self.outputs]
        self.leaves = [leaves[:4], leaves[4:]]
        totals, owed = objects.NO_METERS, 0
        previous: Digest | None = None
        for seq, (first, device_ms) in enumerate(((0, 40), (4, 21))):
            mine = self.leaves[seq]
            meters = objects.Measured(device_ms, 45, 999, 48, 32, 1, 1, 300, 0)
            summed = (a + b for a, b in zip(totals, meters, strict=True))
            totals = objects.Measured(*summed)._replace(method=1, uncertainty_permille=300)
            total = totals.device_ms * 3 // 7 + totals.kflop // 1000
            receipt = objects.Receipt(
                1,
                self.network,
                self.car.peer,
                self.laptop.peer,
                self.owner.account,
                self.payer.account,
                self.channel,
                seq,
                previous,
                objects.Work(
                    JobId(self.job_digest[:16]),
                    fields.Span(first, len(mine)),
                    self.task_digest,
                    self.job.artifact,
                    self.input_root,
                    merkle.root(mine),
                    objects.Outcome.DONE,
                    0,
                    self.lease_id,
                    0,
                ),
                meters,
                totals,
                total - owed,
                total,
                (NOW_MS + 45 * seq, NOW_MS + 45 * (seq + 1)),
                sha("consent"),
                sha("policy"),
            )
            owed = total
            previous = self._sealed(self.car, objects.T_RECEIPT, receipt).digest
        withheld = receipt.amount_nano * 1 // 2
        self._sealed(
            self.laptop,
            objects.T_ACCEPT,
            objects.Acceptance(
                1,
                self.network,
                self.channel,
                1,
                previous or sha(""),
                owed - withheld,
                objects.Verdict(objects.Method.NONE, 0, 0),
                NOW_MS + 400,
                None,
                (objects.Dispute(1, Reason.DUPLICATE, withheld, (fields.Span(5, 1),)),),
            ),
        )


def story(
    plain: Callable[[Any], Any], envelope: Callable[[Sealed], dict[str, str]]
) -> dict[str, Any]:
    told = Story()
    told.agree()
    told.ask()
    told.run()
    told.settle()
    return {
        "network": told.network.hex(),
        "channel": told.channel.hex(),
        "job": plain(told.job),
        "job_digest": told.job_digest.hex(),
        "task_digest": told.task_digest.hex(),
        "inline": told.inline.hex(),
        "input_root": told.input_root.hex(),
        "outputs": [output.hex() for output in told.outputs],
        "receipt_leaves": [[leaf.hex() for leaf in leaves] for leaves in told.leaves],
        "steps": [
            {
                "from": who,
                "what": what,
                **(envelope(step) if isinstance(step, Sealed) else {"frame": step.hex()}),
            }
            for who, what, step in told.steps
        ],
    }
