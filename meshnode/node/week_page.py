"""An owner's week as one page to look at: a strip a day, its charge, the floor, and every reason.

    page(Week, ...) -> HTML

One file that loads nothing: no script, no font, no address of another machine, and a content policy
that forbids them. It stays on the owner's machine, as the diary does.
"""

from __future__ import annotations

from html import escape
from typing import Final

from ..protocol.budget import OffsetAt
from ..vehicle.trace import WEEKDAYS
from .week import DAY_MS, MWH_UJ, WAITS, WORKS, Day, Stretch, Week

WIDTH: Final = 960
STRIP: Final = 64
LEFT: Final = 52
GAP: Final = 14
_COLOURS: Final = ("#c9b458", "#8aa1b8", "#c58b6b", "#a58bb8", "#7fa7a0", "#b5b5ad", "#b86b7d")
_WORKS, _WAITS, _UNKNOWN = "#2f8f5b", "#a9d5ba", "#efeee8"
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #23241f; --page: #fbfaf6; --rule: #d9d7cd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6dc; --page: #1b1c19; --rule: #44453f; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1020px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; font-weight: 600; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
td:first-child, th:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.charge { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.floor { stroke: #c0392b; stroke-width: 1; stroke-dasharray: 4 3; }
.grid { stroke: var(--page); stroke-width: 1; opacity: .5; }
.key { display: inline-block; width: .9rem; height: .9rem; margin-right: .5rem;
  vertical-align: -2px; }
"""
_HEAD: Final = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'\">"
)


def page(week: Week, currency: str, offset_at: OffsetAt) -> str:
    """The page as text. `currency` is a word for amounts; empty where nothing is owed."""
    colours = _colours_of(week)
    title = f"What this car did: {week.title}"
    return (
        f"{_HEAD}<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_sums(week, currency)}"
        f"{_strips(week, colours, offset_at)}{_legend(week, colours)}"
        "<p>The line is the battery's charge, the dashed one your floor. Energy is at the "
        "battery's terminals; what it cost has the charger's loss in it.</p></body></html>\n"
    )


def _colours_of(week: Week) -> dict[str, str]:
    colours = {WORKS: _WORKS, WAITS: _WAITS}
    for what in week.held_ms():
        if what not in colours:
            colours[what] = _COLOURS[(len(colours) - 2) % len(_COLOURS)]
    return colours


def _sums(week: Week, currency: str) -> str:
    total = week.total()
    rows = [
        ("worked", hours(total.working_ms)),
        ("energy of work", kwh(total.work_uj)),
        ("energy of waiting awake", kwh(total.waiting_uj)),
        ("of it through the battery", kwh(total.battery_uj)),
        ("cost of energy", amount(total.energy_nano, currency)),
        ("wear of the battery", amount(total.wear_nano, currency)),
        ("income", amount(total.income_nano, currency)),
    ]
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _strips(week: Week, colours: dict[str, str], offset_at: OffsetAt) -> str:
    height = len(week.days) * (STRIP + GAP) + 20
    drawn = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Charge and work, one strip a day">'
    ]
    for row, day in enumerate(week.days):
        drawn.append(_strip(week, day, row * (STRIP + GAP), colours, offset_at))
    for hour in range(0, 25, 6):
        at = _x(hour * 3_600_000)
        drawn.append(f'<text x="{at:.0f}" y="{height - 4}" text-anchor="middle">{hour}</text>')
    return "".join(drawn) + "</svg>"


def _strip(week: Week, day: Day, top: int, colours: dict[str, str], offset_at: OffsetAt) -> str:
    until_ms = day.from_ms + DAY_MS
    parts = [
        f'<text x="0" y="{top + STRIP / 2 + 4:.0f}">{_name(day.from_ms, offset_at)}</text>',
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT}" height="{STRIP}" fill="{_UNKNOWN}" '
        'opacity=".25"/>',
    ]
    parts += [
        _band(one, day.from_ms, until_ms, top, colours[one.what])
        for one in week.stretches
        if one.until_ms > day.from_ms and one.from_ms < until_ms
    ]
    for hour in range(1, 24):
        at = _x(hour * 3_600_000)
        parts.append(f'<path class="grid" d="M{at:.1f} {top}v{STRIP}"/>')
    floor = _y(top, week.floor_permille)
    parts.append(f'<path class="floor" d="M{LEFT} {floor:.1f}H{WIDTH}"/>')
    points = [
        f"{_x(at_ms - day.from_ms):.1f},{_y(top, permille):.1f}"
        for at_ms, permille in week.charge
        if day.from_ms <= at_ms <= until_ms
    ]
    if len(points) > 1:
        parts.append(f'<polyline class="charge" points="{" ".join(points)}"/>')
    return "".join(parts)


def _band(one: Stretch, from_ms: int, until_ms: int, top: int, colour: str) -> str:
    left = _x(max(one.from_ms, from_ms) - from_ms)
    width = max(0.6, _x(min(one.until_ms, until_ms) - from_ms) - left)
    said = escape(f"{one.what}: {hours(one.until_ms - one.from_ms)}")
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{STRIP}" fill="{colour}">'
        f"<title>{said}</title></rect>"
    )


def _legend(week: Week, colours: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><td><span class="key" style="background:{colours[what]}"></span>{escape(what)}</td>'
        f"<td>{hours(held_ms)}</td></tr>"
        for what, held_ms in week.held_ms().items()
    )
    return f"<table>{rows}</table>"


def _x(into_day_ms: int) -> float:
    return LEFT + (WIDTH - LEFT) * into_day_ms / DAY_MS


def _y(top: int, permille: int) -> float:
    return top + STRIP * (1 - permille / 1_000)


def _name(unix_ms: int, offset_at: OffsetAt) -> str:
    # 1 January 1970 was a Thursday, weekday 3.
    day = (unix_ms // 60_000 + offset_at(unix_ms)) // 1_440
    return WEEKDAYS[(day + 3) % 7]


def hours(span_ms: int) -> str:
    minutes = round(span_ms / 60_000)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def kwh(uj: int) -> str:
    return f"{uj / (MWH_UJ * 1_000_000):.1f} kWh"


def amount(nano: int, currency: str = "") -> str:
    return f"{nano / 1e9:.2f} {currency}".strip()
