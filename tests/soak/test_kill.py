"""Two seeds of the soak: one kills a car, one the submitter's node."""

from __future__ import annotations

import pytest
import trio

from meshnode.ledger.load import signed_objects
from meshnode.protocol.channel_check import check_objects
from meshnode.protocol.objects import T_ACCEPT
from testnet.testnet import Testnet

from .judge import Ledgers, Outcome, accepted_of, check_ledgers, open_receipts
from .kill import ROLES, Killed, soak, submit


@pytest.mark.long
def test_nothing_is_lost_or_accepted_twice() -> None:
    told: list[Killed] = []
    outcomes = trio.run(soak, ROLES, range(2), told.append)
    assert [outcome.victim == "submitter" for outcome in outcomes] == [False, True]
    for outcome in outcomes:
        assert outcome.units == outcome.right > 0, outcome.line
        assert outcome.twice == 0 and not outcome.violations, outcome.line
    assert told == outcomes


@pytest.mark.long
def test_the_soak_sees_what_is_missing() -> None:
    """The judge can say no: a ledger without its newest acceptance, results without their jobs."""

    async def main() -> None:
        async with Testnet(2, 7) as net:
            sent = await net.call(lambda mesh: submit(0, mesh))
            outcome = Outcome(0)
            for job in sent:
                await net.call(lambda mesh, job=job: mesh.result(job.job_id))  # type: ignore[misc]
            await check_ledgers(net, sent, outcome)
            assert outcome.violations == [] and outcome.accepted == 560

            ledgers = Ledgers.read(net)
            assert open_receipts(ledgers) == []
            rows = list(signed_objects(net.home()))
            newest = max(at for at, stored in enumerate(rows) if stored.typ == T_ACCEPT)
            without = check_objects(rows[:newest] + rows[newest + 1 :])
            assert open_receipts(Ledgers(without, ledgers.theirs))
            accepted = sum(len(accepted_of(without, job.job_id)) for job in sent)
            assert accepted < 560

    trio.run(main)
