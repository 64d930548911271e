"""Every attack against a live node: survived with its guards, deadly without them."""

from __future__ import annotations

import pytest
import trio

from .attacks import ATTACKS, Attack
from .during_job import during_job
from .scene import own_node
from .trial import SURVIVED, judge, try_without

CASES = [
    pytest.param(attack, id=attack.name, marks=[pytest.mark.long] if attack.slow else [])
    for attack in ATTACKS
]


@pytest.mark.long
def test_one_node_survives_all_of_them() -> None:
    quick = [attack for attack in ATTACKS if not attack.slow]

    async def main() -> dict[str, str]:
        async with own_node() as (node, target):
            return {attack.name: await judge(attack, target, node) for attack in quick}

    assert trio.run(main) == {attack.name: SURVIVED for attack in quick}


@pytest.mark.parametrize("attack", [case for case in CASES if case.values[0].slow])  # type: ignore[union-attr]
def test_survived_with_all_guards(attack: Attack) -> None:
    async def main() -> str:
        async with own_node() as (node, target):
            return await judge(attack, target, node)

    assert trio.run(main) == SURVIVED


@pytest.mark.parametrize("attack", [case for case in CASES if case.values[0].guards])  # type: ignore[union-attr]
def test_succeeds_without_its_guards(attack: Attack) -> None:
    """Otherwise the guard is for nothing, or the attack is none."""
    assert trio.run(try_without, attack) not in (SURVIVED, None)


@pytest.mark.long
def test_a_job_finishes_on_a_car_under_attack() -> None:
    names = {"protocol_name_not_utf8", "frame_flood", "gossip_flood"}
    picked = [attack for attack in ATTACKS if attack.name in names]
    rows: list[dict[str, object]] = []
    outcome = trio.run(during_job, picked, rows.append)
    assert outcome["job"] == "finished" and outcome["receipts"] == "hold" and outcome["ok"]
    assert {row["name"]: (row["on"], row["guarded"]) for row in rows} == dict.fromkeys(
        names, ("car", SURVIVED)
    )
