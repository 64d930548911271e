"""One short seed of the long soak: seven cars, two of them killed as the job goes on."""

from __future__ import annotations

import pytest
import trio

from .nodes import Shaken, soak


@pytest.mark.long
def test_a_long_job_outlives_three_cars_in_ten() -> None:
    told: list[Shaken] = []

    async def main() -> list[Shaken]:
        return await soak("tokens", range(1), told.append, cars=7, job_s=30.0)

    (outcome,) = trio.run(main)
    assert outcome.violations == [], outcome.line
    assert outcome.units == outcome.right > 0 == outcome.twice, outcome.line
    assert len(outcome.killed) == 2, outcome.line
    assert all(0 < done < outcome.units for done in outcome.killed.values()), outcome.line
    assert outcome.accepted == outcome.units - outcome.unpaid, outcome.line
    assert told == [outcome]
