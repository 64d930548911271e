"""What a fleet's submitters pay for, and whether they should: read from what they store.

A payment is right for a unit that its car has run and that nobody was paid for before. Much of what
`invariants` proves of small meshes, at a price that a fleet can bear.
"""

from __future__ import annotations

from meshnode.protocol import effects as fx
from meshnode.protocol import sealed
from meshnode.protocol.objects import T_ACCEPT, T_RECEIPT, Acceptance, Receipt
from meshnode.protocol.types import Digest, Peer


class Payments:
    def __init__(self) -> None:
        self.ran: set[tuple[bytes, Peer]] = set()  # job id, car
        self.units = 0
        self.wrong = 0
        self._receipts: dict[tuple[Digest, int], Receipt] = {}
        self._reach: dict[Digest, int] = {}
        self._paid: set[tuple[bytes, int, int]] = set()  # job id, replica, unit

    def stored(self, record: fx.SignedObject) -> None:
        """By a submitter."""
        if record.typ == T_RECEIPT:
            receipt = sealed.unseal(record.sealed).open(Receipt, T_RECEIPT)
            self._receipts[receipt.channel, receipt.seq] = receipt
        elif record.typ == T_ACCEPT:
            self._pay(sealed.unseal(record.sealed).open(Acceptance, T_ACCEPT))

    def _pay(self, acceptance: Acceptance) -> None:
        refused = {
            (dispute.seq, unit)
            for dispute in acceptance.disputes or ()
            for run in dispute.units
            for unit in range(run.first, run.first + run.size)
        }
        channel = acceptance.channel
        for seq in range(self._reach.get(channel, -1) + 1, acceptance.seq + 1):
            receipt = self._receipts.pop((channel, seq), None)
            if receipt is None:
                self.wrong += 1
                continue
            work = receipt.work
            for unit in range(work.units.first, work.units.first + work.units.size):
                key = (work.job_id, work.replica, unit)
                if (seq, unit) in refused:
                    continue
                self.units += 1
                self.wrong += key in self._paid or (key[0], receipt.provider) not in self.ran
                self._paid.add(key)
        self._reach[channel] = max(self._reach.get(channel, -1), acceptance.seq)
