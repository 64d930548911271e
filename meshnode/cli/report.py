"""`meshnode report`: what this car did, in the terminal and as a page, from its diary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshnode.errors import LocalResource

from . import frame
from .found import now_ms

if TYPE_CHECKING:
    from meshnode.node.week import Week

_BARS = "▁▂▃▄▅▆▇█"
DAYS_MAX = 366


@click.command(epilog="Example: meshnode report --week --html week.html")
@click.option("--week", "week", is_flag=True, help="The last seven days; so it is without --days.")
@click.option("--days", type=click.IntRange(1, DAYS_MAX), help="So many days, today included.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also as a page with pictures; it needs no network.",
)
@frame.home_options
@frame.json_option
def report(home: Path, week: bool, days: int | None, html: Path | None) -> None:
    """Show charge, work, energy, cost, wear and income of this car, and why it did not work.

    All of it is kept on this machine. Income is what your receipts say; a network without a
    currency owes nothing.
    """
    if week and days is not None:
        raise click.UsageError("--week and --days exclude each other")
    found, currency = _read(home, days or 7)
    if html is not None:
        write_page(found, currency, html)
    if frame.face().json:
        frame.put_json({"currency": currency or None, **_plain(found)})
        return
    _put(found, currency)


def _read(home: Path, days: int) -> tuple[Week, str]:
    from meshnode.node import firstrun, terms
    from meshnode.node.diary import read_diary
    from meshnode.node.vehicle_watch import local_offset_min
    from meshnode.node.week import DAY_MS, week_of_diary
    from meshnode.protocol.papers import NO_CURRENCY

    stands = firstrun.standing(home)
    held = terms.in_force(home)
    until_ms = now_ms()
    found = week_of_diary(
        read_diary(home, until_ms - (days + 1) * DAY_MS, until_ms),
        _income(home, stands.node.peer),
        now_ms=until_ms,
        days=days,
        floor_permille=0 if held is None else held.policy.soc_floor_permille,
        offset_at=local_offset_min,
    )
    currency = stands.network.genesis.currency
    return found, "" if currency == NO_CURRENCY else currency


def _income(home: Path, peer: bytes) -> list[tuple[int, int]]:
    """When, and how much, each receipt that this car signed."""
    from meshnode.ledger.load import signed_objects
    from meshnode.protocol.objects import T_RECEIPT, Receipt
    from meshnode.protocol.sealed import unseal

    rows = []
    for stored in signed_objects(home, T_RECEIPT):
        sealed = unseal(stored.sealed)
        if sealed.kid == peer:
            receipt = sealed.open(Receipt, T_RECEIPT)
            rows.append((receipt.period_ms[1], receipt.amount_nano))
    return rows


def write_page(found: Week, currency: str, path: Path, *, utc: bool = False) -> None:
    """The page of a week; `utc` for one in a trace's own time."""
    from meshnode.node.vehicle_watch import local_offset_min
    from meshnode.node.week_page import page

    offset_at = (lambda _: 0) if utc else local_offset_min
    try:
        path.write_text(page(found, currency, offset_at), encoding="utf-8")
    except OSError as error:
        raise LocalResource(f"{path} cannot be written: {error.strerror}") from None
    frame.talk(f"wrote {path}")


def _put(found: Week, currency: str) -> None:
    from meshnode.node.week_page import amount, hours, kwh

    if not found.stretches:
        click.echo("nothing yet: the first line comes when the node has run for ten minutes")
        return
    rows = []
    for day in found.days:
        worked, energy = hours(day.working_ms), kwh(day.work_uj + day.waiting_uj)
        money = (amount(day.energy_nano), amount(day.wear_nano), amount(day.income_nano))
        rows.append((_day(day.from_ms), _spark(found, day.from_ms), worked, energy, *money))
    headers = ("DAY", "CHARGE", "WORKED", "ENERGY", "COST", "WEAR", "INCOME")
    frame.put_table(headers, rows)
    total = found.total()
    click.echo()
    if currency:
        click.echo(f"amounts   {currency}")
    click.echo(f"floor     {found.floor_permille / 10:g} %")
    through = f"{kwh(total.battery_uj)} of it through the battery"
    click.echo(f"energy    work {kwh(total.work_uj)}, waiting {kwh(total.waiting_uj)}; {through}")
    for what, held_ms in found.held_ms().items():
        click.echo(f"{hours(held_ms):>12}  {what}")


def _day(unix_ms: int) -> str:
    import time

    return time.strftime("%a %d %b", time.localtime(unix_ms / 1000))


def _spark(found: Week, from_ms: int) -> str:
    """The charge, an eighth of the pack a step, a sign an hour; a dot where nobody read it."""
    signs = []
    for hour in range(24):
        begins = from_ms + hour * 3_600_000
        read = [soc for at_ms, soc in found.charge if begins <= at_ms < begins + 3_600_000]
        signs.append(_BARS[min(7, read[-1] * 8 // 1_000)] if read else "·")
    return "".join(signs)


def _plain(found: Week) -> dict[str, Any]:
    names = ("from_ms", "working_ms", "energy_nano", "wear_nano", "income_nano")
    return {
        "from_ms": found.from_ms,
        "until_ms": found.until_ms,
        "floor_permille": found.floor_permille,
        "days": [
            {
                **{name: getattr(day, name) for name in names},
                "work_mwh": day.work_uj // 3_600_000,
                "waiting_mwh": day.waiting_uj // 3_600_000,
                "battery_mwh": day.battery_uj // 3_600_000,
            }
            for day in found.days
        ],
        "stretches": [
            {"from_ms": one.from_ms, "until_ms": one.until_ms, "what": one.what}
            for one in found.stretches
        ],
        "charge": [{"at_ms": at_ms, "permille": soc} for at_ms, soc in found.charge],
    }
