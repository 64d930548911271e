"""`meshnode pause`, `resume`, `mode`: what the car's owner wants at the moment.

The word is kept in the home, so that it holds for a node that starts later too, and told to the
node that runs. What lasts is the policy's (`meshnode init`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import click

from meshnode.errors import Unreachable, UsageError

from . import frame
from .found import now_ms

FOR_S_MAX: Final = 366 * 86_400
_UNITS_S: Final = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400}


class Span(click.ParamType[int]):
    """A length of time: `90s`, `30m`, `2h`, `1h30m`, `3d`; whole seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if type(value) is int:
            return value
        parts = re.findall(r"(\d{1,9})(s|min|m|h|d)", value)
        span_s = sum(int(number) * _UNITS_S[unit] for number, unit in parts)
        if "".join(number + unit for number, unit in parts) != value or not 0 < span_s <= FOR_S_MAX:
            self.fail(f"{value!r} is no length of time such as 30m, 2h, 1h30m or 3d", param, ctx)
        return span_s


FOR: Final = click.option("--for", "for_s", type=Span(), help="So long: 30m, 2h, 1h30m, 3d.")


@click.command(epilog="Example: meshnode pause --for 2h")
@FOR
@frame.home_options
@frame.json_option
def pause(home: Path, for_s: int | None) -> None:
    """Stop work now and take none, until `meshnode resume` or for a time.

    What runs ends at once: long jobs hand on their last checkpoint, the rest runs elsewhere.
    """
    _put(home, "never", for_s)


@click.command(epilog="Example: meshnode resume")
@frame.home_options
@frame.json_option
def resume(home: Path) -> None:
    """Work again as your policy allows."""
    _put(home, "auto", None)


@click.command(epilog="Example: meshnode mode always --for 3h")
@click.argument("kind", type=click.Choice(["always", "auto", "never"]), metavar="MODE")
@FOR
@frame.home_options
@frame.json_option
def mode(home: Path, kind: str, for_s: int | None) -> None:
    """When to work: `auto` by your policy, `never`, or `always`.

    `always` sets quiet hours and the wait after parking aside, and nothing that protects the car:
    charge floor, reserve, temperature, plug and day's energy stay.
    """
    if kind == "auto" and for_s is not None:
        raise click.UsageError("auto is what comes after the others: it takes no --for")
    _put(home, kind, for_s)


def _put(home: Path, kind: str, for_s: int | None) -> None:
    from meshnode.client import connect
    from meshnode.node.home import check_home
    from meshnode.node.keystore import NODE
    from meshnode.node.mode import KINDS, Mode, write_mode

    # Nothing else is asked of the home: a damaged file must not stand between owner and pause.
    if not (home / NODE).exists():
        raise UsageError(f"{home} is no home of a node; make one with `meshnode init`")
    check_home(home)
    until_ms = None if for_s is None else now_ms() + 1000 * for_s
    try:
        with connect(home) as mesh:
            running = True
            mesh.mode(kind, until_ms)
    except Unreachable:
        running = False
    write_mode(home, Mode(next(each for each in KINDS if each == kind), until_ms))
    if frame.face().json:
        frame.put_json({"mode": kind, "until_ms": until_ms, "running": running})
        return
    click.echo(_said(kind, until_ms))
    if not running:
        frame.talk("the node does not run; it will find this when it starts")


def _said(kind: str, until_ms: int | None) -> str:
    said = {
        "never": "paused: nothing runs here",
        "auto": "works as your policy allows",
        "always": "works at any hour, within the limits that protect the car",
    }[kind]
    if until_ms is not None:
        said += f", until {clock_time(until_ms)}"
    return said


def clock_time(unix_ms: int) -> str:
    """Local time, with the day where it is not today."""
    import time

    then, now = time.localtime(unix_ms / 1000), time.localtime(now_ms() / 1000)
    same_day = then[:3] == now[:3]
    return time.strftime("%H:%M" if same_day else "%a %d %b, %H:%M", then)
