"""After a restart: the channels of both ends, opened again from the signed objects that are stored.

What is here was durable before it was sent, so it is all that anybody can hold us to. Called by
`node` once, before the first event.
"""

from __future__ import annotations

from collections.abc import Iterable

from .acceptances import AcceptanceDesk
from .agreement import Agreements
from .channel import RequesterChannel, accepted_chain
from .effects import SignedObject
from .objects import T_ACCEPT, T_RECEIPT, Acceptance, Receipt
from .receipts import ReceiptDesk
from .sealed import Sealed, unseal
from .types import Digest, Peer


def reopen(
    signed: Iterable[SignedObject],
    agreements: Agreements,
    own: Peer,
    minting: ReceiptDesk,
    accepting: AcceptanceDesk,
) -> None:
    """`signed`: in the order in which it was stored; agreements are in force already."""
    receipts: dict[Digest, dict[Digest, tuple[Receipt, Sealed]]] = {}
    accepts: dict[Digest, list[tuple[Acceptance, Sealed]]] = {}
    for stored in signed:
        if stored.typ == T_RECEIPT:
            sealed = unseal(stored.sealed)
            receipt = sealed.open(Receipt, T_RECEIPT)
            receipts.setdefault(receipt.channel, {})[sealed.digest] = (receipt, sealed)
        elif stored.typ == T_ACCEPT:
            sealed = unseal(stored.sealed)
            acceptance = sealed.open(Acceptance, T_ACCEPT)
            accepts.setdefault(acceptance.channel, []).append((acceptance, sealed))
    for digest, entered in agreements.by_channel.items():
        found = receipts.get(digest, {})
        vouchers = sorted(accepts.get(digest, []), key=lambda pair: pair[0].seq)
        if entered.agreement.provider == own:
            chain = sorted(found.values(), key=lambda pair: pair[0].seq)
            minting.restore(entered, chain, vouchers)
            continue
        chain = accepted_chain(found, vouchers[-1][0].receipt if vouchers else None)
        channel = RequesterChannel(entered.agreement, entered.digest)
        disputes = {d.seq: d for acceptance, _ in vouchers for d in acceptance.disputes or ()}
        for receipt, sealed in chain:
            dispute = disputes.get(receipt.seq)
            channel.take(receipt, sealed.digest, dispute.withheld_nano if dispute else 0)
            accepting.mark_restored(receipt, dispute)
        accepting.restore(channel, vouchers)
