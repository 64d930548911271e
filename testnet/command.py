"""`mesh testnet up|down|ls|status|kill|restart|freeze|thaw|drive-away|park|...|logs|sim`.

Found by `mesh` through the entry point group `meshnode.commands`. The work is in `testnet` and
`link`; here it is put into words, tables and JSON. `sim` has a module of its own.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import click

from meshnode.cli import frame
from meshnode.errors import MeshError, UsageError

from .sim.command import sim

LOG_LINES_MAX = 10_000
FOLLOW_S = 0.1
NAME = click.option(
    "--name",
    default="default",
    show_default=True,
    envvar="MESH_TESTNET",
    show_envvar=True,
    metavar="NAME",
    help="Which testnet.",
)
NODE = click.argument("node", metavar="NODE")


@click.group(epilog="Example: mesh testnet up --nodes 8 --seed 7")
def testnet() -> None:
    """A whole mesh on this machine: real nodes on loopback, under keys that anyone can derive.

    Any mesh command reaches it with --testnet NAME, for example `mesh peers --testnet default`.
    """


testnet.add_command(sim)


@testnet.command(epilog="Example: mesh testnet up --nodes 8 --seed 7 --name lab")
@click.option("--nodes", type=click.IntRange(1, 127), default=8, show_default=True, help="Cars.")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), default=7, show_default=True)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="DIR",
    help="Where the homes lie; else the temporary directory.",
)
@NAME
@frame.json_option
def up(nodes: int, seed: int, folder: Path | None, name: str) -> None:
    """Start cars car-0 and up, and a submitter; return when they know each other."""
    import trio

    from .testnet import Testnet

    start_s = time.monotonic()
    frame.talk(f"starting {nodes} cars and a submitter")
    net = Testnet(nodes, seed, name, folder=folder)
    trio.run(net.up)
    up_s = round(time.monotonic() - start_s, 2)
    if frame.face().json:
        rows = [_row(node) for node in net.nodes.values()]
        frame.put_json({"name": name, "seed": seed, "up_s": up_s, "nodes": rows})
        return
    frame.talk(f"testnet {name} is up after {up_s} s; end it: mesh testnet down --name {name}")
    frame.talk(f"try: mesh peers --testnet {name}")


@testnet.command(epilog="Example: mesh testnet down --name lab")
@NAME
@click.option("--all", "every", is_flag=True, help="End all testnets of this user.")
@frame.json_option
def down(name: str, every: bool) -> None:
    """End a testnet: no process, socket or file of it stays. Doing it twice does no harm."""
    from . import link

    ended = [each for each in (link.names() if every else [name]) if link.down(each)]
    if frame.face().json:
        frame.put_json({"ended": ended})
    else:
        frame.talk(f"ended: {', '.join(ended)}" if ended else "there was nothing to end")


@testnet.command(epilog="Example: mesh testnet ls")
@frame.json_option
def ls() -> None:
    """List the testnets of this user."""
    from . import link, procfs

    rows: list[dict[str, Any]] = []
    for name in link.names():
        try:
            state = frame.read_testnet(name)
        except MeshError:
            rows.append({"name": name, "state": "damaged", "seed": None, "nodes": 0})
            continue
        runs = procfs.alive(state["pid"], state["start_ticks"])
        count = len(state["nodes"])
        word = "up" if runs else "killed"
        rows.append({"name": name, "state": word, "seed": state["seed"], "nodes": count})
    if frame.face().json:
        frame.put_json({"testnets": rows})
        return
    frame.put_table(
        ("NAME", "STATE", "SEED", "NODES"),
        [(row["name"], row["state"], row["seed"], row["nodes"]) for row in rows],
    )


def _ask(name: str, op: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    from .link import Link

    linked = Link.to(name)
    try:
        return linked.ask(op, **(fields or {}))
    finally:
        linked.close()


def _row(node: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "role", "state", "pid", "peer", "addrs", "home", "log", "code", "starts")
    return {key: node[key] for key in names}


@testnet.command(epilog="Example: mesh testnet status --json")
@NAME
@frame.json_option
def status(name: str) -> None:
    """Show the nodes of a testnet."""
    answer = _ask(name, "status")
    rows = [_row(node) for node in answer["nodes"].values()]
    if frame.face().json:
        frame.put_json({"name": name, "seed": answer["seed"], "nodes": rows})
        return
    headers = ("NODE", "ROLE", "STATE", "PID", "PEER", "ADDRESS")
    table = [
        (
            row["name"],
            row["role"],
            row["state"] if row["code"] is None else f"{row['state']} ({row['code']})",
            row["pid"],
            row["peer"][-8:],
            row["addrs"][0].split("/p2p/")[0] if row["addrs"] else "",
        )
        for row in rows
    ]
    frame.put_table(headers, table)


def _signalled(name: str, node: str, number: signal.Signals, word: str) -> None:
    row = _row(_ask(name, "kill", {"name": node, "signal": int(number)})["node"])
    if frame.face().json:
        frame.put_json({"name": name, "node": row})
    else:
        frame.talk(f"{node} (pid {row['pid']}): {word}")


@testnet.command(epilog="Example: mesh testnet kill car-3")
@NODE
@click.option("--signal", "signal_name", default="KILL", show_default=True, metavar="SIG")
@NAME
@frame.json_option
def kill(node: str, signal_name: str, name: str) -> None:
    """Send a node a signal: SIGKILL, as if its power went."""
    try:
        number = signal.Signals[f"SIG{signal_name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise UsageError(f"there is no signal {signal_name!r}") from None
    _signalled(name, node, number, f"sent {number.name}")


@testnet.command(epilog="Example: mesh testnet freeze car-3")
@NODE
@NAME
@frame.json_option
def freeze(node: str, name: str) -> None:
    """Stop a node without ending it: its connections stay and it answers nothing."""
    _signalled(name, node, signal.SIGSTOP, "frozen")


@testnet.command(epilog="Example: mesh testnet thaw car-3")
@NODE
@NAME
@frame.json_option
def thaw(node: str, name: str) -> None:
    """Let a frozen node go on."""
    _signalled(name, node, signal.SIGCONT, "goes on")


def _changed(name: str, node: str, readings: dict[str, Any], word: str) -> None:
    from . import driving

    row = _ask(name, "status")["nodes"].get(node)
    if row is None:
        raise UsageError(f"testnet {name} has no node {node!r}")
    driving.change(Path(row["home"]), readings)
    if frame.face().json:
        frame.put_json({"name": name, "node": _row(row)})
    else:
        frame.talk(f"{node}: {word}")


@testnet.command("drive-away", epilog="Example: mesh testnet drive-away car-3")
@NODE
@click.option("--silent", is_flag=True, help="Out of reach at once: nothing is handed on.")
@NAME
@frame.json_option
def drive_away(node: str, silent: bool, name: str) -> None:
    """The driver is back: work stops at once and is handed on; `park` brings the car back.

    With --silent the node is frozen as it is, as in a garage without reception; `thaw` ends that.
    """
    from . import driving

    if silent:
        _signalled(name, node, signal.SIGSTOP, "out of reach")
    else:
        _changed(name, node, driving.DRIVES_AWAY, "drives")


@testnet.command(epilog="Example: mesh testnet park car-3")
@NODE
@NAME
@frame.json_option
def park(node: str, name: str) -> None:
    """The car stands again, and is plugged in."""
    from . import driving

    _changed(name, node, {**driving.PARKS, **driving.PLUGGED}, "parked and plugged in")


@testnet.command(epilog="Example: mesh testnet plug car-3")
@NODE
@NAME
@frame.json_option
def plug(node: str, name: str) -> None:
    """Put the cable in; the battery is full, so the plug carries the load."""
    from . import driving

    _changed(name, node, driving.PLUGGED, "plugged in")


@testnet.command(epilog="Example: mesh testnet unplug car-3")
@NODE
@NAME
@frame.json_option
def unplug(node: str, name: str) -> None:
    """Pull the cable; from here on the battery carries the load, if the policy lets it."""
    from . import driving

    _changed(name, node, driving.UNPLUGGED, "unplugged")


@testnet.command(epilog="Example: mesh testnet heat car-3 45")
@NODE
@click.argument("celsius", type=click.IntRange(-50, 100), default=45, metavar="[CELSIUS]")
@NAME
@frame.json_option
def heat(node: str, celsius: int, name: str) -> None:
    """Make the battery so warm, 45 degrees if nothing is said; cars stop above 40 by default."""
    from . import driving

    _changed(name, node, driving.heated(celsius), f"its battery has {celsius} degrees")


@testnet.command(epilog="Example: mesh testnet charge car-3 35")
@NODE
@click.argument("percent", type=click.IntRange(0, 100), metavar="PERCENT")
@NAME
@frame.json_option
def charge(node: str, percent: int, name: str) -> None:
    """Set the battery's charge; a testnet's cars stop at 20 %."""
    from . import driving

    _changed(name, node, driving.charged(percent), f"charged to {percent} %")


@testnet.command(epilog="Example: mesh testnet restart car-3")
@NODE
@NAME
@frame.json_option
def restart(node: str, name: str) -> None:
    """Start a node that has ended, in its old home."""
    from .link import Link
    from .testnet import START_S_MAX

    linked = Link.to(name)
    try:
        if node not in linked.ask("status")["nodes"]:
            raise UsageError(f"testnet {name} has no node {node!r}")
        linked.ask("start", name=node)
        row = _row(linked.ask("await", START_S_MAX, names=[node])["nodes"][node])
    finally:
        linked.close()
    if frame.face().json:
        frame.put_json({"name": name, "node": row})
    else:
        frame.talk(f"{node} (pid {row['pid']}): ready")


@testnet.command(epilog="Example: mesh testnet logs car-3 --follow")
@NODE
@click.option("-n", "lines", type=click.IntRange(1, LOG_LINES_MAX), default=100, show_default=True)
@click.option("-f", "--follow", "keep", is_flag=True, help="Go on until the testnet ends.")
@NAME
@frame.json_option
def logs(node: str, lines: int, keep: bool, name: str) -> None:
    """Show the newest lines of a node's log; `warden` and `zygote` have one too."""
    from collections import deque

    state = frame.read_testnet(name)
    folder = Path(state["folder"])
    path = folder / "warden.log" if node == "warden" else folder / "log" / f"{node}.log"
    if node not in (*state["nodes"], "warden", "zygote"):
        raise UsageError(f"testnet {name} has no node {node!r}")
    as_json = frame.face().json
    if keep and as_json:
        raise UsageError("--follow and --json exclude each other")
    try:
        with path.open(errors="replace") as file:
            newest = deque(file, lines)
            if as_json:
                fields = {"node": node, "log": path, "lines": [line.rstrip() for line in newest]}
                frame.put_json({"name": name, **fields})
                return
            for line in newest:
                click.echo(line, nl=False)
            if keep:
                _follow(file, (state["pid"], state["start_ticks"]))
    except FileNotFoundError:
        raise UsageError(f"{node} has no log yet; it will be {path}") from None


def _follow(file: TextIO, warden: tuple[int, int]) -> None:
    """What is written from now on; nothing wakes a reader of a file but time."""
    from . import procfs

    pause = threading.Event()
    while procfs.alive(*warden):
        for line in file:
            click.echo(line, nl=False)
        pause.wait(FOLLOW_S)
