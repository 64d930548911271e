"""`meshnode fleet ...`: what the fleet's operator does not let this car do, on top of its owner's
policy; signed where the operator's key is, with `mesh account narrow`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshnode.errors import Unreachable, UsageError

from . import frame

if TYPE_CHECKING:
    from meshnode.protocol.sealed import Sealed


@click.group(epilog="Example: meshnode fleet show")
def fleet() -> None:
    """The fleet's terms for this car: they narrow what its owner allows, and never widen it.

    The operator that the owner's consent names writes them: `mesh account narrow` there.
    """


@fleet.command(epilog="Example: meshnode fleet install fleet.mesh")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@frame.home_options
@frame.json_option
def install(file: Path, home: Path) -> None:
    """Check the operator's terms and put them in force, in a running node too."""
    from meshnode.node import armor
    from meshnode.protocol.papers import T_FLEET

    _put_in_force(home, armor.read_one(file, T_FLEET))
    _put(home)


@fleet.command(epilog="Example: meshnode fleet show --json")
@frame.home_options
@frame.json_option
def show(home: Path) -> None:
    """Show whose terms hold here, and what they change in the owner's policy."""
    _put(home)


@fleet.command(epilog="Example: meshnode fleet drop")
@frame.home_options
@frame.json_option
def drop(home: Path) -> None:
    """Go by the owner's policy alone again. Receipts of later work name no fleet terms."""
    _put_in_force(home, None)
    _put(home)


def _put_in_force(home: Path, terms_sealed: Sealed | None) -> None:
    from meshnode.client import connect
    from meshnode.node import firstrun, terms

    firstrun.standing(home)
    try:
        with connect(home) as mesh:
            mesh.fleet(None if terms_sealed is None else terms_sealed.wire)
    except Unreachable:
        terms.install_fleet(home, terms_sealed)


def _put(home: Path) -> None:
    from meshnode.node import terms
    from meshnode.node.policy_file import changed
    from meshnode.protocol.papers import T_FLEET, FleetTerms

    found = terms.in_force(home)
    if found is None:
        raise UsageError(f"{home} gives no consent that a fleet could narrow")
    sealed = found.fleet_sealed
    changes = changed(found.policy, found.in_effect)
    if frame.face().json:
        frame.put_json(
            {
                "fleet": None
                if sealed is None
                else {
                    "digest": sealed.digest,
                    "operator": found.consent.operator,
                    "given_ms": sealed.open(FleetTerms, T_FLEET).given_ms,
                },
                "changes": changes,
            }
        )
        return
    if sealed is None:
        click.echo("no fleet terms: the owner's policy holds alone")
        return
    click.echo(f"fleet     {sealed.digest.hex()[:16]}, of operator {frame.ident(sealed.kid)}")
    if found.policy == found.in_effect:
        click.echo("nothing changes: the owner's policy is as narrow")
    for line in changes:
        click.echo(line)
