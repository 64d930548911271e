"""`meshnode policy show|set|test`: what the owner allows, as a file, and what would come of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshnode.errors import Unreachable, UsageError

from . import frame
from .found import now_ms
from .report import write_page

if TYPE_CHECKING:
    from meshnode.node.policy_file import PolicyFile
    from meshnode.node.policy_trial import Stretch, Trial
    from meshnode.protocol.papers import Policy
    from meshnode.protocol.sealed import Sealed
    from meshnode.vehicle.trace import Trace


@click.group(epilog="Example: meshnode policy show > policy.toml")
def policy() -> None:
    """What this car's owner allows: show it, put another in force, try one on a week."""


@policy.command(epilog="Example: meshnode policy show > policy.toml")
@frame.home_options
@frame.json_option
def show(home: Path) -> None:
    """Print the policy in force as a file that `policy set` takes."""
    from meshnode.node import firstrun, terms
    from meshnode.node.policy_file import written

    found = terms.in_force(home, fleet=False)
    if found is None:
        raise UsageError(f"{home} has no policy; a car gets one by meshnode init")
    text = written(found.policy, found.consent.purposes)
    if frame.face().json:
        digest = found.policy_sealed.digest
        frame.put_json({"digest": digest, "toml": text})
        return
    click.echo(text, nl=False)
    if (home / firstrun.FLEET_FILE).exists():
        frame.talk("the fleet may narrow it: meshnode fleet show")


@policy.command("set", epilog="Example: meshnode policy set policy.toml")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--anyway", is_flag=True, help="Even if the policy contradicts itself.")
@frame.home_options
@frame.json_option
def set_(home: Path, file: Path, anyway: bool) -> None:
    """Sign this policy, and the consent to it, and put both in force; a running node takes them
    at once.

    What the file does not say stays as it is. The consent stays too, but for its policy and, if the
    file names them, the purposes; it lapses when it would have.
    """
    import secrets

    from meshnode.node import terms
    from meshnode.node.founding import NOTICE_DIGEST, ConsentTerms
    from meshnode.node.policy_file import changed, read_policy, terms_of
    from meshnode.protocol.papers import T_POLICY, Policy

    before = terms.in_force(home, fleet=False)
    if before is None or before.consent.withdrawn_ms is not None:
        raise UsageError(f"{home} gives no consent; begin with meshnode consent give --policy FILE")
    old, now = before.consent, now_ms()
    if old.notice != NOTICE_DIGEST or old.lapses_ms <= now:
        raise UsageError(
            "the consent has lapsed or was given to another notice: read it again with "
            "meshnode consent give --policy FILE"
        )
    said = read_policy(file, terms_of(before.policy))
    judge(file, said, None, refuse=not anyway)
    purposes = old.purposes if said.purposes is None else said.purposes
    consent = ConsentTerms(old.operator, old.shares, purposes, old.lapses_ms - now)
    fresh = secrets.token_bytes(16)  # a pseudonym links no two consents
    papers = terms.change(home, said.terms, consent, vehicle=fresh, now_ms=now)
    for line in changed(before.policy, papers[0].open(Policy, T_POLICY)):
        frame.talk(line)
    put_in_force(home, papers)
    if frame.face().json:
        frame.put_json({"policy": papers[0].digest, "consent": papers[1].digest})
        return
    click.echo(f"policy {papers[0].digest.hex()[:16]} is in force")


@policy.command(epilog="Example: meshnode policy test policy.toml --busy 80")
@click.argument(
    "file", required=False, type=click.Path(dir_okay=False, path_type=Path), metavar="[FILE]"
)
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A week of your car; else a commuter's that comes with the product.",
)
@click.option(
    "--busy",
    type=click.IntRange(0, 100),
    default=50,
    show_default=True,
    metavar="PERCENT",
    help="How much of the time that it may work there is work.",
)
@click.option("--weeks", type=click.IntRange(1, 52), default=1, show_default=True)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The week as a page with pictures.",
)
@click.option("--minutes", is_flag=True, help="Every stretch of the week with its reason.")
@frame.home_options
@frame.json_option
def test(
    home: Path,
    file: Path | None,
    trace_file: Path | None,
    busy: int,
    weeks: int,
    html: Path | None,
    minutes: bool,
) -> None:
    """Try a policy on a week: when it works, when not and why, what it costs and brings in.

    Without FILE it is the policy in force, or else what `meshnode init` would give. It asks the
    same code as a running car, minute by minute. Income is at this car's floor price, below which
    it takes no work.
    """
    from meshnode.node.policy_trial import try_policy
    from meshnode.vehicle.trace import SHIPPED, load_trace

    trace = load_trace(trace_file or SHIPPED)
    tried, said = _policy_of(home, file)
    sound = said is None or file is None or judge(file, said, trace, refuse=False)
    trial = try_policy(tried, trace, busy_pct=busy, weeks=weeks)
    if html is not None:
        from meshnode.node.week import week_of_trial

        title = f"{trace.name}, {busy} % of the time there is work"
        write_page(week_of_trial(trial, tried.soc_floor_permille, title), "", html, utc=True)
    if frame.face().json:
        frame.put_json(_plain(trial, trace, weeks, busy))
    else:
        _put_trial(trial, trace, weeks, minutes)
    if not sound:
        raise click.exceptions.Exit(UsageError.exit_code)


def _policy_of(home: Path, file: Path | None) -> tuple[Policy, PolicyFile | None]:
    from meshnode.node import founding, terms
    from meshnode.node.policy_file import read_policy
    from meshnode.protocol.types import Account, NetworkId

    found = terms.in_force(home) if file is None and home.exists() else None
    if found is not None:
        return found.in_effect, None
    said = None if file is None else read_policy(file)
    given = founding.PolicyTerms() if said is None else said.terms
    return founding.draft_policy(Account(bytes(32)), NetworkId(bytes(8)), given), said


def judge(file: Path, said: PolicyFile, trace: Trace | None, *, refuse: bool) -> bool:
    """Say every contradiction on stderr; whether there is none. UsageError if it must not pass."""
    from meshnode.node.policy_sense import contradictions

    found = contradictions(said, None if trace is None else trace.pack)
    for one in found:
        frame.talk(f"{file}: {one}")
    if found and refuse:
        raise UsageError(f"{file} contradicts itself; --anyway puts it in force all the same")
    return not found


def put_in_force(home: Path, papers: tuple[Sealed, ...]) -> None:
    """Through the node that runs in this home, or into the home if none does."""
    from meshnode.client import connect
    from meshnode.node import terms

    try:
        with connect(home) as mesh:
            restart = mesh.terms([each.wire for each in papers])
    except Unreachable:
        terms.install_terms(home, papers)
        return
    if restart:
        frame.talk("the node runs without a vehicle yet: start it again, then it computes")


# ---- what a trial says


def hours(minutes: int) -> str:
    whole, rest = divmod(minutes, 60)
    return f"{whole} h {rest:02d} min" if whole else f"{rest} min"


def kwh(mwh: int) -> str:
    return f"{mwh / 1e6:.1f} kWh"


def amount(nano: int) -> str:
    return f"{nano / 1e9:.2f}"


def _put_trial(trial: Trial, trace: Trace, weeks: int, minutes: bool) -> None:
    from meshnode.protocol.reasons import Reason

    total = weeks * 7 * 1440
    if minutes:
        for one in trial.stretches:
            click.echo(f"{_when(one.from_min)}  {_when(one.until_min)}  {_said(one)}")
        click.echo()
    pack = trace.pack
    limit = f"{pack.capacity_wh / 1000:g} kWh, charges to {pack.charge_limit_permille / 10:g} %"
    click.echo(f"week      {trace.name}: {limit}")
    share = f"{100 * trial.work_min / total:.0f} % of the time"
    click.echo(f"works     {hours(trial.work_min)}, {share}, {kwh(trial.work_mwh)}")
    click.echo(f"waits     {hours(trial.standby_min)} awake and idle, {kwh(trial.standby_mwh)}")
    for reason, held_min in trial.minutes_of().items():
        if reason is not Reason.OK:
            click.echo(f"stopped   {hours(held_min)}: {reason.text}")
    through = f"{kwh(trial.from_battery_mwh)} of it through the battery"
    click.echo(f"energy    {kwh(trial.grid_mwh)} bought, {through}")
    cost = trial.energy_nano + trial.wear_nano
    parts = f"{amount(trial.energy_nano)} energy, {amount(trial.wear_nano)} battery wear"
    click.echo(f"cost      {amount(cost)}: {parts}")
    click.echo(f"income    {amount(trial.income_nano)} at the floor price")
    lowest = min(trial.charge_permille) / 10
    short_wh = max(0, trial.short_wh - trial.short_without_wh)
    trips = f"{short_wh} Wh short for a drive" if short_wh else "no drive was short of charge"
    click.echo(
        f"battery   lowest {lowest:g} %; {hours(trial.below_floor_min)} below the floor; {trips}"
    )


def _when(minute: int) -> str:
    from meshnode.vehicle.trace import WEEKDAYS

    day, minute = divmod(minute, 1440)
    return f"{WEEKDAYS[day % 7]} {minute // 60:02d}:{minute % 60:02d}"


def _said(one: Stretch) -> str:
    from meshnode.protocol.reasons import Reason

    if one.reason is Reason.OK:
        return "works" if one.working else "waits for work"
    return one.reason.text


def _plain(trial: Trial, trace: Trace, weeks: int, busy: int) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "weeks": weeks,
        "busy_pct": busy,
        "work_min": trial.work_min,
        "standby_min": trial.standby_min,
        "stopped_min": {
            reason.name.lower(): held for reason, held in trial.minutes_of().items() if reason
        },
        "work_mwh": trial.work_mwh,
        "standby_mwh": trial.standby_mwh,
        "from_battery_mwh": trial.from_battery_mwh,
        "grid_mwh": trial.grid_mwh,
        "energy_nano": trial.energy_nano,
        "wear_nano": trial.wear_nano,
        "income_nano": trial.income_nano,
        "lowest_permille": min(trial.charge_permille),
        "below_floor_min": trial.below_floor_min,
        "short_wh": max(0, trial.short_wh - trial.short_without_wh),
        "stretches": [
            {
                "from_min": one.from_min,
                "until_min": one.until_min,
                "reason": one.reason.name.lower(),
                "works": one.working,
            }
            for one in trial.stretches
        ],
    }
