"""`meshnode`: the car's own command: make its home, run its node, look at it, give consent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import click

from meshnode.errors import Unreachable

from . import frame
from .found import (
    account_of_text,
    how_to_join,
    network_of,
    now_ms,
    put_standing,
    write_config,
)
from .frame import Late, LateGroup, enter
from .owner import clock_time
from .terms import ask_notice, owner_terms, terms_of

_COMMANDS = {
    "init": Late("meshnode.cli.car:init", "Make this machine a car of a network."),
    "run": Late("meshnode.cli.car:run_node", "Run the node until it is stopped."),
    "status": Late("meshnode.cli.car:status", "Show the node: work, budget, peers."),
    "pause": Late("meshnode.cli.owner:pause", "Stop work now, perhaps for a time."),
    "resume": Late("meshnode.cli.owner:resume", "Work again as your policy allows."),
    "mode": Late("meshnode.cli.owner:mode", "When to work: always, auto or never."),
    "policy": Late("meshnode.cli.policy:policy", "What this car's owner allows."),
    "report": Late("meshnode.cli.report:report", "What this car did, cost and earned."),
    "consent": Late("meshnode.cli.consent:consent", "The owner's yes: give, show, withdraw."),
    "fleet": Late("meshnode.cli.fleet:fleet", "What the fleet does not let this car do."),
}


@click.group(
    "meshnode",
    cls=LateGroup,
    late=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: meshnode init --new garage && meshnode run",
)
@click.version_option(package_name="meshnode", prog_name="meshnode")
def meshnode() -> None:
    """Let this car compute for a mesh while it is parked, within the limits you set.

    The driver comes first: work stops when the car is taken. Exit codes: 0 ok, 2 usage,
    5 verification, 7 unreachable, 8 local resource.
    """


@click.command(epilog="Example: meshnode init --genesis garage.mesh --soc-floor 40")
@how_to_join
@owner_terms
@click.option(
    "--listen", multiple=True, metavar="ADDR", help="Multiaddr to listen on; kept in config.toml."
)
@frame.home_options
@frame.json_option
def init(
    home: Path,
    genesis: Path | None,
    new: str | None,
    kind: str,
    allow_test: bool,
    join: tuple[str, ...],
    cell: str | None,
    account_text: str | None,
    listen: tuple[str, ...],
    **given: Any,
) -> None:
    """Make this machine a car of a network: keys, mandate, your policy and your consent.

    You are shown what you agree to and asked. Doing it again keeps the keys and replaces policy
    and consent.
    """
    from meshnode.node import firstrun

    network = network_of(home, genesis, new, kind, allow_test)
    policy, consent_terms = terms_of(given)
    account = account_of_text(account_text)
    elsewhere = account is not None
    notice = None if elsewhere else ask_notice(given["accept_notice"])
    stands = firstrun.init_car(
        home,
        network,
        now_ms=now_ms(),
        notice_accepted=notice,
        policy=policy,
        consent=consent_terms,
        account=account,
    )
    write_config(home, {"listen": list(listen), "bootstrap": list(join), "cell": cell})
    put_standing(stands, home)
    if new is not None:
        frame.talk(f"others join with --genesis {home / firstrun.GENESIS_FILE}")
    if elsewhere:
        frame.talk("next: meshnode consent request -o request.mesh")


@click.command("run", epilog="Example: meshnode run --join /ip4/10.0.0.7/tcp/4001/p2p/ID")
@click.option("--listen", multiple=True, metavar="ADDR", help="Instead of config.toml's.")
@click.option(
    "--join",
    multiple=True,
    metavar="ADDR",
    envvar="MESH_JOIN",
    show_envvar=True,
    help="Besides config.toml's and the genesis'.",
)
@click.option("--slots", type=click.IntRange(0, 64), help="Runs at a time.")
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    default="WARNING",
    show_default=True,
    envvar="MESH_LOG_LEVEL",
    show_envvar=True,
)
@frame.home_options
@frame.json_option
def run_node(
    home: Path, listen: tuple[str, ...], join: tuple[str, ...], slots: int | None, log_level: str
) -> None:
    """Run the node of this home until Ctrl-C or SIGTERM; leases in work get ten seconds.

    With --json a line on stdout says when it is ready, and its addresses.
    """
    from meshnode.node import __main__ as process
    from meshnode.node import firstrun

    stands = firstrun.standing(home)
    line = ["--home", str(home), "--role", "car" if stands.car else "submitter"]
    for address in listen:
        line += ["--listen", address]
    for address in join:
        line += ["--join", address]
    if slots is not None:
        line += ["--slots", str(slots)]
    line += ["--log-level", log_level]
    if frame.face().json:
        line += ["--ready-fd", str(os.dup(1))]
    else:
        frame.talk(f"{frame.ident(stands.node.peer)} runs in {stands.network.genesis.name}")
    code = process.run(line)
    if code:
        raise click.exceptions.Exit(code)


def span(seconds: int) -> str:
    """A length of time as a person says it."""
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@click.command(epilog="Example: meshnode status --json")
@frame.home_options
@frame.json_option
def status(home: Path) -> None:
    """Show the node of this home: may it work, what runs, who is there, how long papers hold."""
    from meshnode.client import connect
    from meshnode.node import firstrun

    stands = firstrun.standing(home)
    try:
        with connect(home) as mesh:
            found: dict[str, Any] | None = mesh.status()
    except Unreachable:
        found = None
    if frame.face().json:
        papers = {
            "mandate_until_ms": stands.mandate_until_ms,
            "consent_until_ms": stands.consent_until_ms,
        }
        running = found is not None
        frame.put_json({"home": home, "running": running, "papers": papers, "node": found})
        return
    click.echo(f"node      {frame.ident(stands.node.peer)}")
    click.echo(f"network   {stands.network.genesis.name} ({stands.network.ident.hex()})")
    if found is None:
        click.echo("state     does not run; start it: meshnode run")
        return
    why = found["may_run"]
    click.echo(f"state     runs since {found['up_s']} s (pid {found['pid']})")
    click.echo(f"work      {'may run' if not why['code'] else why['text']}")
    if (vehicle := found["vehicle"]) is not None:
        put_vehicle(vehicle)
    budget = found["budget"]
    if found["provides"] and budget["may_run"]:
        left = f"{budget['spendable_mwh'] / 1e6:.1f} kWh to spend, {budget['watt_max']} W"
        click.echo(f"budget    {left}, runs of at most {span(budget['lease_s_max'])}")
        if budget["stay_s"] is not None:
            click.echo(f"stay      expects to stay {span(budget['stay_s'])} or longer")
    lacks = found["sandbox"]["missing"]
    if found["sandbox"]["layers"] is not None and found["provides"]:
        click.echo(f"sandbox   {', '.join(found['sandbox']['layers']) or 'none'}")
    if lacks:
        click.echo(f"          your policy asks for {', '.join(lacks)} too")
    click.echo(f"slots     {found['slots_free']} of {found['slots']} free")
    clock = found["clock"]
    if clock["apart"]:
        ours = ", as most are: set this machine's clock" if clock["ours_is_off"] else ""
        far = f"{clock['apart']} of {clock['heard']} peers are more than two minutes away{ours}"
        click.echo(f"clock     {far}; no work is done with them")
    click.echo(f"peers     {found['peers_up']} connected, {found['cars_known']} cars known")
    for address in found["addrs"]:
        click.echo(f"address   {address}")
    for lease in found["leases"]:
        done = f"{lease['done']} of {lease['count']}"
        click.echo(f"lease     {lease['kernel']} {lease['stage']} {done}")


def put_vehicle(vehicle: dict[str, Any]) -> None:
    """Where the readings come from, what is wrong with them, and the owner's mode."""
    age_ms = vehicle["age_ms"]
    heard = "nothing read yet" if age_ms is None else f"read {age_ms / 1000:.0f} s ago"
    click.echo(f"vehicle   {vehicle['adapter']}, {heard}")
    if vehicle["lost"]:
        click.echo(f"          {vehicle['lost']}")
    mode = vehicle["mode"]
    if mode["kind"] != "auto":
        until = "" if mode["until_ms"] is None else f" until {clock_time(mode['until_ms'])}"
        click.echo(f"mode      {mode['kind']}{until}; meshnode resume ends it")


def main() -> NoReturn:
    enter(meshnode, "meshnode")


if __name__ == "__main__":
    main()
