"""The drawings of the report: inline SVG from results, with a text for who does not see it.

Colours are classes that the page's style sheet fills, so that a drawing fits a light and a dark
page. A policy is told by the pattern of its line and the shape of its marks too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from .result import QUANTILES, CellFigure, Result

WIDTH: Final = 460
HEIGHT: Final = 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36
LEAST_MS: Final = 1.0
KNOWN: Final = ("tokens", "limit", "central", "adverts", "gossip", "random")
DASHES: Final = ("", "2 4", "9 3", "9 3 2 3", "5 4", "2 3")
MARKED: Final = (0.5, 0.95, 0.99)
TAIL_AT: Final = (0.0, 0.5, 0.9, 0.99, 0.999)
MAP_STEPS: Final = 5  # shades
DOT_LEAST, DOT_MOST = 2.2, 11.0


def style_of(policy: str) -> int:
    """The number of the style that a policy always has; unknown ones share the last."""
    return KNOWN.index(policy) if policy in KNOWN else len(KNOWN) - 1


def duration(us: float) -> str:
    """A time as a person reads it: three digits at most."""
    ms = us / 1_000
    if ms < 9.95:
        return f"{ms:.1f} ms"
    if ms < 999.5:
        return f"{ms:.0f} ms"
    return f"{ms / 1_000:.1f} s" if ms < 99_500 else f"{ms / 1_000:.0f} s"


def mark(style: int, x: float, y: float) -> str:
    """The shape of a policy's marks, centred."""
    r = 4.2
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>',
        f'<path d="M{x - r:.1f} {y:.1f}h{2 * r}M{x:.1f} {y - r:.1f}v{2 * r}"/>',
        f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>',
        f'<path d="M{x:.1f} {y - r - 1:.1f}l{r + 0.6} {2 * r}h-{2 * r + 1.2}z"/>',
        f'<path d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l-{r + 1} {r + 1}l-{r + 1}-{r + 1}z"/>',
        f'<path d="M{x - 3.4:.1f} {y - 3.4:.1f}l6.8 6.8m0-6.8l-6.8 6.8"/>',
    )
    return f'<g class="mark p{style}">{shapes[style]}</g>'


def sample(policy: str) -> str:
    """A short piece of a policy's line, for a legend."""
    style = style_of(policy)
    return (
        '<svg class="sample" viewBox="0 0 44 14" aria-hidden="true">'
        f'<path class="line p{style}" d="M1 7H43" stroke-dasharray="{DASHES[style]}"/>'
        f"{mark(style, 22, 7)}</svg>"
    )


class _Times:
    """A horizontal logarithmic axis of times that holds every result's slowest thousandth."""

    def __init__(self, results: Sequence[Result]) -> None:
        first = min(result.quantile_us(0.01) for result in results) / 1_000
        last = max(result.quantile_us(0.999) for result in results) / 1_000
        self.low = math.log10(max(LEAST_MS, first * 0.9))
        self.high = max(math.log10(last * 1.1), self.low + 1)

    def x(self, us: float) -> float:
        share = (math.log10(max(us / 1_000, 1e-3)) - self.low) / (self.high - self.low)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def drawn(self) -> str:
        parts = []
        foot = HEIGHT - BOTTOM
        for decade in range(math.floor(self.low), math.ceil(self.high) + 1):
            for digit in (1, 2, 5):
                us = digit * 10.0 ** (decade + 3)
                if not self.low <= math.log10(us / 1_000) <= self.high:
                    continue
                x = self.x(us)
                parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{foot}"/>')
                if digit == 1 or self.high - self.low < 2.2:
                    label = f"{us / 1e6:g} s" if us >= 1e6 else f"{us / 1e3:g} ms"
                    parts.append(
                        f'<text x="{x:.1f}" y="{foot + 16}" text-anchor="middle">{label}</text>'
                    )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">'
            "from submit to start, logarithmic</text>"
        )
        return "".join(parts)


def _even(share: float) -> float:
    return share


def _nines(share: float) -> float:
    return min(3.0, -math.log10(max(1.0 - share, 1e-9))) / 3.0


def distribution(results: Sequence[Result], *, tail: bool) -> str:
    """Which share of the tasks has started after which time; `tail` spreads the slowest ones."""
    height: Callable[[float], float] = _nines if tail else _even
    axis = _Times(results)
    foot = HEIGHT - BOTTOM

    def y(share: float) -> float:
        return foot - height(share) * (foot - TOP)

    parts = [axis.drawn()]
    for share in TAIL_AT if tail else (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{LEFT} {y(share):.1f}H{WIDTH - RIGHT}"/>')
        at = f'x="{LEFT - 6}" y="{y(share) + 4:.1f}"'
        parts.append(f'<text {at} text-anchor="end">{share * 100:g} %</text>')
    for result in sorted(results, key=lambda result: result.policy == "tokens"):
        style = style_of(result.policy)
        points = [
            f"{axis.x(us):.1f} {y(share):.1f}"
            for share, us in zip(QUANTILES, result.latency_us, strict=True)
            if share <= 0.999 or not tail
        ]
        parts.append(
            f'<path class="line p{style}" d="M{"L".join(points)}"'
            f' stroke-dasharray="{DASHES[style]}"/>'
        )
        parts.extend(mark(style, axis.x(result.quantile_us(q)), y(q)) for q in MARKED)
    told = "; ".join(
        f"{result.policy}: half within {duration(result.quantile_us(0.5))}, "
        f"99 of 100 within {duration(result.quantile_us(0.99))}"
        for result in results
    )
    title = "The slowest tasks" if tail else "Share of tasks started within a time"
    return _figure(title, told, WIDTH, HEIGHT, parts)


def messages(results: Sequence[Result]) -> str:
    """Messages a task, one bar a policy, on a logarithmic axis that begins at half a message."""
    ordered = sorted(results, key=lambda result: result.messages_per_task)
    low = math.log10(0.5)
    high = math.log10(max(10.0, ordered[-1].messages_per_task * 1.2))
    row, left, right = 30, 74, 70
    foot = TOP + row * len(ordered)

    def x(count: float) -> float:
        return left + max(0.0, math.log10(max(count, 0.5)) - low) / (high - low) * (
            WIDTH - left - right
        )

    parts = []
    for decade in range(math.floor(high) + 1):
        at = x(10.0**decade)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{foot}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{foot + 16}" text-anchor="middle">{10**decade:,}</text>'
        )
    for number, result in enumerate(ordered):
        top = TOP + row * number + 5
        style = style_of(result.policy)
        count = result.messages_per_task
        written = f"{count:,.0f}" if count >= 100 else f"{count:.1f}"
        parts.append(
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end" class="name">'
            f"{escape(result.policy)}</text>"
            f'<rect class="bar p{style}" x="{x(0.5):.1f}" y="{top}" '
            f'width="{max(1.0, x(count) - x(0.5)):.1f}" height="{row - 10}" rx="2"/>'
            f'<text x="{x(count) + 6:.1f}" y="{top + 14}" class="value">{written}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(left + WIDTH - right) / 2:.0f}" y="{foot + 33}" '
        'text-anchor="middle">messages a task, logarithmic</text>'
    )
    told = "; ".join(f"{result.policy}: {result.messages_per_task:.1f}" for result in ordered)
    return _figure("Messages a task", told, WIDTH, foot + 40, parts)


def shades(cells: Sequence[CellFigure]) -> list[int]:
    """The p50s at which the shade of the map changes: equal shares of the cells between them."""
    times = sorted(cell.p50_us for cell in cells if cell.tasks)
    return [times[len(times) * step // MAP_STEPS] for step in range(1, MAP_STEPS)] if times else []


def cell_map(cells: Sequence[CellFigure]) -> str:
    """Each cell where it stands: area by cars, shade by its p50, the slowest fifth with a ring."""
    edges = shades(cells)
    xs, ys = [cell.x_km for cell in cells], [cell.y_km for cell in cells]
    wide, high = max(max(xs) - min(xs), 1.0), max(max(ys) - min(ys), 1.0)
    width, margin = 760.0, 14.0
    scale = min((width - 2 * margin) / wide, 380.0 / high)
    # Many cells: smaller dots, or a continent is one blot.
    most = max(DOT_LEAST + 1, min(DOT_MOST, 130.0 / math.sqrt(len(cells))))
    largest = max(cell.cars for cell in cells)
    side = (width - wide * scale) / 2
    parts = []
    for cell in sorted(cells, key=lambda cell: (-cell.cars, cell.name)):
        shade = sum(cell.p50_us >= edge for edge in edges)
        radius = max(DOT_LEAST, most * math.sqrt(cell.cars / largest))
        ring = " slow" if edges and shade == MAP_STEPS - 1 else ""
        told = duration(cell.p50_us) if cell.tasks else "no task"
        parts.append(
            f'<circle class="cell m{shade}{ring}" cx="{side + (cell.x_km - min(xs)) * scale:.1f}" '
            f'cy="{margin + (cell.y_km - min(ys)) * scale:.1f}" r="{radius:.1f}">'
            f"<title>{escape(cell.name)}: {cell.cars:,} cars, p50 {told}</title></circle>"
        )
    slowest = sorted((cell for cell in cells if cell.tasks), key=lambda cell: -cell.p50_us)[:3]
    told = f"{len(cells)} cells. Slowest: " + ", ".join(
        f"{cell.name} {duration(cell.p50_us)}" for cell in slowest
    )
    return _figure("Map of cells", told, width, high * scale + 2 * margin, parts)


def _figure(title: str, told: str, width: float, height: float, parts: Sequence[str]) -> str:
    """One drawing. A reader of the page hears the title and what it shows."""
    label = escape(f"{title}. {told}.", quote=True)
    return (
        f'<svg class="figure" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:g} {height:.0f}">{"".join(parts)}</svg>'
    )
