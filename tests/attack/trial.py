"""The verdict on an attack: with all guards, and with the ones that should have stopped it gone."""

from __future__ import annotations

from typing import Any

import trio

from .attacks import Attack
from .scene import Scene, Target, Watched, own_node, scene

ATTACK_S = 90.0
DYING_S = 8.0
SURVIVED = "survived"


async def judge(attack: Attack, target: Target, node: Watched | None) -> str:
    """survived, killed, wedged or breached; never raises on what the target does."""
    verdict = "wedged"
    # Around the scene, not in it: hosts that an attack opens live as long as the scene.
    with trio.move_on_after(ATTACK_S):
        async with scene(target, node) as stage:
            await stage.watch()
            verdict = await _attack_and_look(attack, stage)
    if node is not None and verdict == "wedged":
        # A process that was hit closes what it had open before it ends.
        with trio.move_on_after(DYING_S):
            while not node.dead:  # noqa: ASYNC110 - a process of subprocess has no event
                await trio.sleep(0.05)
        if node.dead:
            return "killed"
    return verdict


async def _attack_and_look(attack: Attack, stage: Scene) -> str:
    try:
        seen = await attack.run(stage)
    except (EOFError, BrokenPipeError):
        return "killed"  # the node has ended under its commands
    await trio.sleep(0.1)
    if seen is not None:
        return seen
    if await stage.pulse() and await stage.fresh():
        return SURVIVED
    return "wedged"


async def try_without(attack: Attack) -> str | None:
    """What the attack does when its guards are removed; None if there is none to remove."""
    if not attack.guards:
        return None
    async with own_node(attack.guards) as (node, target):
        return await judge(attack, target, node)


def holds(row: dict[str, Any]) -> bool:
    """Survived with the guards, and not without: a guard is proved by removing it."""
    return row["guarded"] == SURVIVED and row.get("unguarded") != SURVIVED
