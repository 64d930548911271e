"""The owner's terms as options of a command line, or as a policy file: for `init` and `consent`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import frame
from .found import account_of_text

if TYPE_CHECKING:
    from meshnode.node.founding import ConsentTerms, PolicyTerms
    from meshnode.protocol.types import Account, Digest

_PLUGGED = {"plugged": 0, "battery": 1, "surplus": 2}
_OF_POLICY = ("soc_floor", "day_wh", "watt_max", "power", "submitters", "sandbox_least")


def _layers(_: click.Context, __: click.Parameter, text: str | None) -> int:
    from meshnode.protocol import sandbox

    if text is None:
        return int(sandbox.LEAST)
    try:
        return int(sandbox.of_names(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_TERMS: tuple[Any, ...] = (
    click.option(
        "--soc-floor",
        type=click.IntRange(0, 100),
        default=30,
        show_default=True,
        metavar="PERCENT",
        help="Never work below this charge.",
    ),
    click.option("--day-wh", type=click.IntRange(0), default=5_000, show_default=True),
    click.option("--watt-max", type=click.IntRange(0), default=300, show_default=True),
    click.option(
        "--power",
        type=click.Choice(list(_PLUGGED)),
        default="plugged",
        show_default=True,
        help="Work only when plugged in, also from the battery, or only on surplus.",
    ),
    click.option(
        "--submitters",
        type=click.Choice(["mine", "fleet", "network"]),
        default="fleet",
        show_default=True,
        help="Whose work may run here: this account's, the operator's too, or everybody's.",
    ),
    click.option(
        "--sandbox-least",
        metavar="LAYERS",
        callback=_layers,
        help="Sandbox layers without which nothing runs here, separated by commas. Default: "
        "no_new_privs,no_capabilities,syscalls,files,rlimits",
    ),
    click.option(
        "--policy",
        "policy_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="All of the policy from a file, as `meshnode policy show` prints one.",
    ),
    click.option(
        "--operator", metavar="HEX", help="The account that runs the fleet; else your own."
    ),
    click.option(
        "--accept-notice",
        is_flag=True,
        help="Say yes to the notice without being asked; for scripts.",
    ),
)


def owner_terms(command: Any) -> Any:
    """What the owner allows: policy and consent in the words of a person."""
    for option in _TERMS:
        command = option(command)
    return command


def terms_of(given: dict[str, Any]) -> tuple[PolicyTerms, ConsentTerms]:
    from meshnode.node import founding
    from meshnode.protocol.papers import PURPOSE_ENERGY_BATTERY, Submitters

    operator = account_of_text(given["operator"])
    if given["policy_file"] is not None:
        return _terms_of_file(given["policy_file"], operator)
    policy = founding.PolicyTerms(
        soc_floor_permille=given["soc_floor"] * 10,
        day_wh=given["day_wh"],
        watt_max=given["watt_max"],
        plugged_rule=_PLUGGED[given["power"]],
        submitters=Submitters[given["submitters"].upper()],
        sandbox_least=given["sandbox_least"],
    )
    purposes = founding.PURPOSES_DEFAULT
    if given["power"] == "battery":
        purposes |= PURPOSE_ENERGY_BATTERY
    return policy, founding.ConsentTerms(operator, purposes=purposes)


def _terms_of_file(file: Path, operator: Account | None) -> tuple[PolicyTerms, ConsentTerms]:
    from meshnode.node import founding
    from meshnode.node.policy_file import read_policy
    from meshnode.protocol.papers import PURPOSE_ENERGY_BATTERY

    from .policy import judge

    context = click.get_current_context()
    for name in _OF_POLICY:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"--policy is all of the policy: {option} says it twice")
    said = read_policy(file)
    judge(file, said, None, refuse=True)
    purposes = said.purposes
    if purposes is None:
        battery = PURPOSE_ENERGY_BATTERY if said.terms.plugged_rule == 1 else 0
        purposes = founding.PURPOSES_DEFAULT | battery
    return said.terms, founding.ConsentTerms(operator, purposes=purposes)


def ask_notice(accepted: bool) -> Digest | None:
    """Show the notice and hear the person's yes; None without one."""
    from meshnode.node import founding

    if accepted:
        return founding.NOTICE_DIGEST
    frame.talk(founding.NOTICE)
    if not sys.stdin.isatty():
        frame.talk("nobody is here to say yes: without --accept-notice the car computes nothing")
        return None
    if click.confirm("Do you consent?", err=True):
        return founding.NOTICE_DIGEST
    frame.talk("the car joins and computes nothing; run the command again to consent")
    return None
