"""`meshnode consent ...`: the owner's yes, its end, its history; and off-car accounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshnode.errors import MeshError, Unreachable, UsageError

from . import frame
from .found import describe, now_ms, put_standing
from .policy import put_in_force
from .terms import ask_notice, owner_terms, terms_of

if TYPE_CHECKING:
    from meshnode.node.terms import Past


@click.group(epilog="Example: meshnode consent show")
def consent() -> None:
    """The owner's yes to what this car does for others: give it, look at it, take it back.

    Where the account's key is on another machine: request, `mesh account sign` there, install.
    """


@consent.command(epilog="Example: meshnode consent give --power battery")
@owner_terms
@frame.home_options
@frame.json_option
def give(home: Path, **given: Any) -> None:
    """Read the notice, say yes, and put policy and consent in force; a running node takes them at
    once."""
    import secrets

    from meshnode.node import firstrun, terms

    if not firstrun.standing(home).car:
        raise UsageError(f"{home} only asks; meshnode init makes a car of it")
    policy, consent_terms = terms_of(given)
    if ask_notice(given["accept_notice"]) is None:
        raise click.exceptions.Exit(1)
    vehicle = secrets.token_bytes(16)
    papers = terms.change(home, policy, consent_terms, vehicle=vehicle, now_ms=now_ms())
    put_in_force(home, papers)
    _put(home)


@consent.command(epilog="Example: meshnode consent show --json")
@frame.home_options
@frame.json_option
def show(home: Path) -> None:
    """Show the consent in force: to what, for whom, until when."""
    _put(home)


@consent.command(epilog="Example: meshnode consent withdraw")
@frame.home_options
@frame.json_option
def withdraw(home: Path) -> None:
    """Take the consent back, now: work stops within a slice, at no cost and whoever asks.

    Where the account's key is here the withdrawal is signed, and receipts of later work are
    invalid by it; else this car stops and says so.
    """
    from meshnode.node import terms

    try:
        ended = terms.withdrawal(home, now_ms())
    except terms.NoConsent:
        raise
    except MeshError as error:
        frame.talk(f"the papers are damaged, so nothing is signed: {error}")
        ended = None
    put_in_force(home, () if ended is None else (ended,))
    if frame.face().json:
        digest = None if ended is None else ended.digest
        frame.put_json({"withdrawn": True, "signed": ended is not None, "consent": digest})
        return
    click.echo("withdrawn: this car computes nothing more; meshnode consent give begins anew")


@consent.command(epilog="Example: meshnode consent history")
@frame.home_options
@frame.json_option
def history(home: Path) -> None:
    """Every consent of this car, the oldest first, as its ledger holds them."""
    from meshnode.node import firstrun, terms

    firstrun.standing(home)
    past = terms.history(home)
    if frame.face().json:
        frame.put_json({"consents": [_plain(one) for one in past]})
        return
    frame.put_table(
        ("consent", "what", "on", "until", "purposes", "policy"),
        [
            (
                one.digest.hex()[:16],
                "given" if one.consent.withdrawn_ms is None else "withdrawn",
                _day(one.consent.withdrawn_ms or one.consent.given_ms),
                _day(one.consent.lapses_ms),
                ", ".join(_purposes(one.consent.purposes)),
                one.consent.policy.hex()[:16],
            )
            for one in past
        ],
    )


def _put(home: Path) -> None:
    from meshnode.node import firstrun, terms

    stands = firstrun.standing(home)
    found = terms.in_force(home, fleet=False)
    if found is None:
        if frame.face().json:
            frame.put_json({"consent": None})
        else:
            click.echo("no consent: this car computes nothing; meshnode consent give")
        return
    past = terms.Past(found.consent_sealed.digest, found.consent, found.policy)
    if frame.face().json:
        frame.put_json({"consent": _plain(past)})
        return
    given = found.consent
    click.echo(f"consent   {past.digest.hex()[:16]}")
    click.echo(f"network   {stands.network.genesis.name}")
    click.echo(f"account   {frame.ident(given.account)}")
    who = "yourself" if given.operator == given.account else frame.ident(given.operator)
    click.echo(f"operator  {who}")
    click.echo(f"purposes  {', '.join(_purposes(given.purposes))}")
    for share in given.shares:
        click.echo(f"share     {share.parts / 100:g} % to {frame.ident(share.account)[:16]}")
    click.echo(f"notice    {given.notice.hex()[:16]}, {given.language}")
    click.echo(f"given     {_day(given.given_ms)}, lapses {_day(given.lapses_ms)}")
    if given.withdrawn_ms is not None:
        click.echo(f"withdrawn {_day(given.withdrawn_ms)}")
    click.echo(describe(found.policy))


def _purposes(bits: int) -> list[str]:
    from meshnode.node.policy_file import PURPOSES

    return [name for name, bit in PURPOSES.items() if bits & bit]


def _day(unix_ms: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_ms / 1000))


def _plain(one: Past) -> dict[str, Any]:
    given = one.consent
    return {
        "digest": one.digest,
        "operator": given.operator,
        "purposes": _purposes(given.purposes),
        "shares": [
            {"account": share.account, "role": share.role, "parts": share.parts}
            for share in given.shares
        ],
        "policy": given.policy,
        "notice": given.notice,
        "language": given.language,
        "given_ms": given.given_ms,
        "lapses_ms": given.lapses_ms,
        "replaces": given.replaces,
        "withdrawn_ms": given.withdrawn_ms,
    }


@consent.command(epilog="Example: meshnode consent request -o request.mesh")
@click.option(
    "-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE"
)
@owner_terms
@frame.home_options
def request(out: Path, home: Path, **given: Any) -> None:
    """Write the file that the account's owner signs with `mesh account sign`."""
    from meshnode.node import armor, firstrun

    policy, terms = terms_of(given)
    notice = ask_notice(given["accept_notice"])
    blocks = firstrun.consent_request(
        home, now_ms=now_ms(), notice_accepted=notice, policy=policy, consent=terms
    )
    armor.write_file(out, blocks, "sign with: mesh account sign FILE -o ANSWER")
    for draft in firstrun.read_request(blocks, str(out)).drafts:
        frame.talk(f"asks for: {describe(draft)}")
    frame.talk(
        f"wrote {out}; where the account key is: mesh account sign {out.name} -o answer.mesh"
    )


@consent.command(epilog="Example: meshnode consent install answer.mesh")
@click.argument("answer", type=click.Path(dir_okay=False, path_type=Path))
@frame.home_options
@frame.json_option
def install(answer: Path, home: Path) -> None:
    """Check the account's answer and put it in force, in a running node too."""
    from meshnode.client import connect
    from meshnode.node import armor, firstrun

    blocks = armor.read_file(answer)
    papers = firstrun.read_answer(home, blocks, str(answer), now_ms=now_ms())
    try:
        with connect(home) as mesh:
            restart = mesh.terms([each.wire for each in papers.all()])
    except Unreachable:
        firstrun.install(home, papers.all())
        restart = False
    put_standing(firstrun.standing(home), home)
    if restart:
        frame.talk("the node runs without a vehicle yet: start it again, then it computes")
