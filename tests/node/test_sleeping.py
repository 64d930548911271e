"""The owner's command runs while its car sleeps, with the seconds; the machine looks after it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import trio
import trio.testing

from meshnode.node.sleeping import Sleeper
from meshnode.protocol.effects import Sleep
from meshnode.protocol.events import Event, Tick, Woke

WAIT_S_MAX = 30
AWAKE = Tick()  # stands for the look at the vehicle, before the machine hears anything
SAYS = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"


async def slept(command: tuple[str, ...], *effects: Sleep, still: bool = True) -> list[Event]:
    """What the machine hears of it."""
    heard: list[Event] = []
    came = trio.Event()

    def post(event: Event) -> None:
        heard.append(event)
        came.set()

    sleeper = Sleeper(command, lambda: still, post, Counter())
    sleeper.on_awake = lambda: heard.append(AWAKE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper.run)
        for effect in effects:
            sleeper.fall(effect)
        if command:
            with trio.fail_after(WAIT_S_MAX):
                await came.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    return heard


def sleep_through(command: tuple[str, ...], *effects: Sleep, still: bool = True) -> list[Event]:
    return trio.run(lambda: slept(command, *effects, still=still))


def test_the_command_gets_the_seconds_and_the_machine_hears_that_it_woke(tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = (sys.executable, "-c", SAYS, str(said))
    assert sleep_through(command, Sleep(0, 300_000), Sleep(0, 9_000)) == [AWAKE, Woke()]
    assert said.read_text() == "300\n", "one at a time"


def test_nothing_is_suspended_without_a_command_or_against_what_came_between(
    tmp_path: Path,
) -> None:
    said = tmp_path / "said"
    assert sleep_through((), Sleep(0, 9_000)) == []
    command = (sys.executable, "-c", SAYS, str(said))
    assert sleep_through(command, Sleep(0, 9_000), still=False) == [Woke()], "it works on"
    assert not said.exists()


def test_a_command_that_is_not_there_ends_nothing(tmp_path: Path) -> None:
    assert sleep_through((str(tmp_path / "none"),), Sleep(0, 9_000)) == [AWAKE, Woke()]
