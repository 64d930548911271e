"""`mesh init` and `mesh account`: keys, network and mandate of a submitter; signing for a car.

`car.py` uses the same words for `meshnode init`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshnode.errors import UsageError

from . import frame

if TYPE_CHECKING:
    from meshnode.node.firstrun import Standing
    from meshnode.node.founding import Network
    from meshnode.protocol.types import Account


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# ---- networks and homes


def network_of(
    home: Path, genesis: Path | None, new: str | None, kind: str, allow_test: bool
) -> Network:
    """The network to join: a file's, the home's own, or a new one signed by this account."""
    from meshnode.node import firstrun, founding, keystore
    from meshnode.node.home import make_home
    from meshnode.protocol.papers import NetworkKind

    if genesis is not None and new is not None:
        raise UsageError("--genesis and --new exclude each other")
    if genesis is not None:
        return founding.load_genesis(genesis, allow_test=allow_test)
    if (home / firstrun.GENESIS_FILE).exists():
        if new is not None:
            raise UsageError(f"{home} belongs to a network already; choose another --home")
        return firstrun.read_network(home)
    if new is None:
        raise UsageError("which network? --genesis FILE joins one, --new NAME makes one")
    make_home(home)
    maker = keystore.make(home, keystore.ACCOUNT)
    return founding.make_genesis(maker, new, NetworkKind[kind.upper()], created_ms=now_ms())


def make_submitter(
    home: Path, genesis: Path, allow_test: bool, account: Account | None
) -> Standing:
    from meshnode.node import firstrun

    network = network_of(home, genesis, None, "home", allow_test)
    return firstrun.init_submitter(home, network, now_ms=now_ms(), account=account)


def write_config(home: Path, node: dict[str, Any]) -> None:
    """Settings given at init, as the home's config.toml; one that is there is the person's own."""
    node = {key: value for key, value in node.items() if value}
    path = home / "config.toml"
    if not node:
        return
    if path.exists():
        raise UsageError(f"{path} exists: write {', '.join(sorted(node))} there, under [node]")
    # JSON's strings and lists of strings are TOML's.
    lines = [f"{key} = {json.dumps(value)}" for key, value in node.items()]
    path.write_text("[node]\n" + "\n".join(lines) + "\n")


def account_of_text(text: str | None) -> Account | None:
    from meshnode.protocol.types import Account

    if text is None:
        return None
    try:
        account = Account(bytes.fromhex(text))
    except ValueError:
        account = Account(b"")
    if len(account) != 32:
        raise UsageError("an account is 64 hexadecimal digits; `mesh account show` prints it")
    return account


def put_standing(stands: Standing, home: Path) -> None:
    network = stands.network
    fields = {
        "home": home,
        "network": network.ident,
        "network_name": network.genesis.name,
        "kind": network.genesis.kind.name.lower(),
        "peer": stands.node.peer,
        "account": stands.account,
        "account_here": stands.account_here,
        "car": stands.car,
        "mandate_until_ms": stands.mandate_until_ms,
        "consent_until_ms": stands.consent_until_ms,
    }
    if frame.face().json:
        frame.put_json(fields)
        return
    frame.talk(f"home     {home}")
    frame.talk(f"network  {network.genesis.name} ({network.ident.hex()})")
    frame.talk(f"node     {frame.ident(stands.node.peer)}")
    frame.talk(f"account  {stands.account.hex()}{'' if stands.account_here else ' (elsewhere)'}")


HOW_TO_JOIN: tuple[Any, ...] = (
    click.option(
        "--genesis",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The network's genesis file.",
    ),
    click.option("--new", metavar="NAME", help="Make a new network, signed by this account."),
    click.option(
        "--kind",
        type=click.Choice(["home", "community", "fleet"]),
        default="home",
        show_default=True,
        help="Of a new network.",
    ),
    click.option("--allow-test", is_flag=True, help="Join a test network, whose keys are public."),
    click.option(
        "--join",
        multiple=True,
        metavar="ADDR",
        envvar="MESH_JOIN",
        show_envvar=True,
        help="Multiaddr of a node to meet the network by; kept in config.toml.",
    ),
    click.option("--cell", metavar="NAME", help="The gossip cell; kept in config.toml."),
    click.option(
        "--account",
        "account_text",
        metavar="HEX",
        help="The account's public key, where its private key is on another machine.",
    ),
)


def how_to_join(command: Any) -> Any:
    for option in HOW_TO_JOIN:
        command = option(command)
    return command


@click.command(
    "init", epilog="Example: mesh init --genesis garage.mesh --join /ip4/10.0.0.7/tcp/4001/p2p/ID"
)
@how_to_join
@frame.home_options
@frame.json_option
def mesh_init(
    home: Path,
    genesis: Path | None,
    new: str | None,
    kind: str,
    allow_test: bool,
    join: tuple[str, ...],
    cell: str | None,
    account_text: str | None,
) -> None:
    """Make this machine a submitter of a network: node key, account key, mandate.

    Doing it again renews the mandate and keeps the keys.
    """
    from meshnode.node import firstrun

    network = network_of(home, genesis, new, kind, allow_test)
    account = account_of_text(account_text)
    stands = firstrun.init_submitter(home, network, now_ms=now_ms(), account=account)
    write_config(home, {"bootstrap": list(join), "cell": cell})
    put_standing(stands, home)
    if new is not None:
        frame.talk(f"others join with --genesis {home / firstrun.GENESIS_FILE}")


# ---- accounts


@click.group(epilog="Example: mesh account sign request.mesh -o answer.mesh")
def account() -> None:
    """The account that settles; its key may sign for cars that do not hold it."""


@account.command(epilog="Example: mesh account show")
@frame.home_options
@frame.json_option
def show(home: Path) -> None:
    """Print the account's public key."""
    from meshnode.node import firstrun

    key, signer = firstrun.account_of(home)
    if frame.face().json:
        frame.put_json({"account": key, "account_here": signer is not None})
    else:
        click.echo(key.hex())


@account.command(epilog="Example: mesh account sign request.mesh -o answer.mesh")
@click.argument("request", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE"
)
@click.option("--accept-notice", is_flag=True, help="Say yes without being asked; for scripts.")
@frame.home_options
def sign(request: Path, out: Path, accept_notice: bool, home: Path) -> None:
    """Sign what a car asks for with `meshnode consent request`, after showing it.

    The mandate lets the car's node act for this account for at most seven days.
    """
    from meshnode.node import armor, firstrun, founding

    key, signer = firstrun.account_of(home)
    if signer is None:
        raise UsageError(f"the key of account {key.hex()[:8]} is not on this machine")
    asked = firstrun.read_request(armor.read_file(request), str(request))
    frame.talk(f"network {asked.network.genesis.name} ({asked.network.ident.hex()})")
    for draft in asked.drafts:
        frame.talk(f"to sign: {describe(draft)}")
        if draft.name_of_object == "consent":
            frame.talk("\n" + founding.NOTICE)
    if not accept_notice:
        click.confirm("Sign?", abort=True, err=True)
    armor.write_file(out, firstrun.account_sign(asked, signer))
    frame.talk(f"wrote {out}; on the car: meshnode consent install {out.name}")


@account.command(epilog="Example: mesh account narrow fleet.toml -o fleet.mesh")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE"
)
@frame.home_options
def narrow(file: Path, out: Path, home: Path) -> None:
    """Sign, as the operator of a fleet, what its cars must not do whatever their owners allow.

    FILE has keys of a policy (`meshnode policy show`); what it does not say is not limited.
    """
    from meshnode.node import armor, firstrun, fleet_file, founding

    key, signer = firstrun.account_of(home)
    if signer is None:
        raise UsageError(f"the key of account {key.hex()[:8]} is not on this machine")
    network = firstrun.read_network(home).ident
    terms = fleet_file.read_fleet(file, key, network, now_ms())
    armor.write_file(out, [armor.block_of(founding.sign_as(signer, terms))])
    frame.talk(f"wrote {out}; on each car of the fleet: meshnode fleet install {out.name}")


def describe(draft: Any) -> str:
    """One line about a mandate, policy or consent before it is signed."""
    from datetime import UTC, datetime

    def day(unix_ms: int) -> str:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")

    match draft.name_of_object:
        case "mandate":
            return f"mandate for {frame.ident(draft.peer)} until {day(draft.not_after_ms)}"
        case "policy":
            mode = draft.submitters.mode.name.lower()
            return (
                f"policy: charge floor {draft.soc_floor_permille / 10:g} %, {draft.day_wh} Wh a "
                f"day, {draft.watt_max} W, submitters: {mode}"
            )
        case _:
            return f"consent until {day(draft.lapses_ms)}, operator {draft.operator.hex()[:8]}"
