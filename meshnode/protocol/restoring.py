"""After a restart: the channels of both ends, from the signed objects that were stored.

`Node.start` calls it once the jobs are back, before anything is sent: the receipt desk goes on at
the end of each of its chains, the acceptance desk knows what it has accepted.
"""

from __future__ import annotations

from .acceptances import AcceptanceDesk
from .agreement import Agreements
from .channel import RequesterChannel, accepted_chain
from .objects import T_ACCEPT, T_RECEIPT, Acceptance, Receipt
from .outbox import Restored
from .receipts import ReceiptDesk
from .sealed import Sealed, unseal
from .types import Digest, Peer


def restore_channels(
    restored: Restored,
    agreements: Agreements,
    desk: ReceiptDesk,
    acceptances: AcceptanceDesk,
    own: Peer,
) -> None:
    """The objects are in the order they were stored in."""
    receipts: dict[Digest, dict[Digest, tuple[Receipt, Sealed]]] = {}
    accepts: dict[Digest, list[tuple[Acceptance, Sealed]]] = {}
    for obj in restored.signed:
        if obj.typ == T_RECEIPT:
            sealed = unseal(obj.sealed)
            receipt = sealed.open(Receipt, T_RECEIPT)
            receipts.setdefault(receipt.channel, {})[sealed.digest] = (receipt, sealed)
        elif obj.typ == T_ACCEPT:
            sealed = unseal(obj.sealed)
            acceptance = sealed.open(Acceptance, T_ACCEPT)
            accepts.setdefault(acceptance.channel, []).append((acceptance, sealed))
    for digest, entered in agreements.by_channel.items():
        found = receipts.get(digest, {})
        vouchers = sorted(accepts.get(digest, []), key=lambda pair: pair[0].seq)
        if entered.agreement.provider == own:
            chain = sorted(found.values(), key=lambda pair: pair[0].seq)
            desk.restore(entered, chain, [a for a, _ in vouchers])
        else:
            chain = accepted_chain(found, vouchers[-1][0].receipt if vouchers else None)
            channel = RequesterChannel(entered.agreement, entered.digest)
            disputes = {d.seq: d for acceptance, _ in vouchers for d in acceptance.disputes or ()}
            for receipt, sealed in chain:
                dispute = disputes.get(receipt.seq)
                channel.take(receipt, sealed.digest, dispute.withheld_nano if dispute else 0)
                acceptances.mark_restored(receipt, dispute)
            acceptances.restore(channel, vouchers[-1][1].wire if vouchers else None)
