"""What in a policy contradicts itself, in a person's words and with the lines where it stands.

`meshnode policy test` says it, and `policy set` refuses what can never run. Between `policy_file`
and the CLI; a policy that passes may still be a bad one, which the trial (`policy_trial`) shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.budget import RESUME_SOC_PERMILLE
from ..protocol.papers import (
    PURPOSE_COMPUTE,
    PURPOSE_ENERGY_BATTERY,
    PURPOSE_ENERGY_PLUG,
    Quiet,
)
from ..vehicle.battery import PackSpec
from .founding import PolicyTerms
from .policy_file import PolicyFile, clock_of

SHORT_RUN_MIN = 15  # a day's energy should last for one such run


@dataclass(frozen=True, slots=True)
class Contradiction:
    lines: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        if not self.lines:
            return self.text
        word = "line" if len(self.lines) == 1 else "lines"
        return f"{word} {', '.join(map(str, self.lines))}: {self.text}"


def contradictions(file: PolicyFile, pack: PackSpec | None = None) -> list[Contradiction]:
    """All of them, in the order of their first lines; `pack` is the car's, if it is known."""
    terms = file.terms
    said = [*_of_numbers(terms), *_of_links(terms), *_of_purposes(file), *_of_hours(terms)]
    if pack is not None:
        said += _of_pack(terms, pack)
    found = []
    for keys, text in said:
        lines = sorted(line for key in keys for line in file.lines.get(key, ()))
        found.append(Contradiction(tuple(lines), text))
    return sorted(found, key=lambda one: one.lines or (0,))


_Said = list[tuple[tuple[str, ...], str]]


def _of_numbers(terms: PolicyTerms) -> _Said:
    said: _Said = []
    low, high = terms.temp_dc
    window = ("battery_min_temperature", "battery_max_temperature")
    if low >= high:
        said.append((window, f"no battery is between {low / 10} and {high / 10} degrees"))
    if terms.resume is not None:
        soc, resume_low, resume_high = terms.resume
        if soc <= terms.soc_floor_permille:
            charges = ("battery_charge_min_pct", "battery_charge_resume_pct")
            said.append((charges, "work resumes at a charge at which it stops"))
        if not low <= resume_low < resume_high <= high:
            text = "work resumes at temperatures at which it stops, or at none"
            said.append(((*window, "battery_resume_temperatures"), text))
    if terms.watt_max == 0:
        said.append((("watt_max",), "with 0 W nothing ever runs"))
    need_wh = -(-(terms.watt_max + terms.awake_w) * SHORT_RUN_MIN // 60)
    if terms.day_wh < need_wh:
        keys = ("day_wh", "watt_max", "awake_w")
        text = f"{terms.day_wh} Wh a day do not last for {SHORT_RUN_MIN} minutes ({need_wh} Wh)"
        said.append((keys, text))
    return said


def _of_links(terms: PolicyTerms) -> _Said:
    if terms.wifi_only and terms.metered_bytes_a_day:
        keys = ("network_wifi_only", "metered_bytes_a_day")
        return [(keys, "with Wi-Fi only there are no metered bytes to spend")]
    return []


def _of_purposes(file: PolicyFile) -> _Said:
    said: _Said = []
    terms = file.terms
    if (
        "surplus_only" in file.lines
        and "run_on_batteries" in file.lines
        and terms.plugged_rule == 2
    ):
        keys = ("run_on_batteries", "surplus_only")
        said.append((keys, "on surplus only means from the plug: the battery's word is lost"))
    if "wear_per_kwh" in file.lines and "battery_chemistry" in file.lines:
        keys = ("wear_per_kwh", "battery_chemistry")
        said.append((keys, "both name the price of wear; the price is taken"))
    if file.purposes is None:
        return said
    if not file.purposes & PURPOSE_COMPUTE:
        said.append((("purposes",), "without compute the car computes nothing"))
    if terms.plugged_rule == 1 and not file.purposes & PURPOSE_ENERGY_BATTERY:
        keys = ("run_on_batteries", "purposes")
        said.append((keys, "the battery may be used by the one and not by the other"))
    if not file.purposes & (PURPOSE_ENERGY_PLUG | PURPOSE_ENERGY_BATTERY):
        said.append((("purposes",), "no energy may be used: neither plug nor battery"))
    return said


def _of_hours(terms: PolicyTerms) -> _Said:
    said: _Said = []
    prices: list[set[int]] = [set() for _ in range(1440)]
    for first, last, price in terms.tariff:
        for minute in _minutes(first, last):
            prices[minute].add(price)
    gap = next((minute for minute in range(1440) if not prices[minute]), None)
    if gap is not None:
        text = f"no band has a price at {clock_of(gap)}; there the dearest one counts"
        said.append((("tariff",), text))
    double = next((minute for minute in range(1440) if len(prices[minute]) > 1), None)
    if double is not None:
        said.append((("tariff",), f"two bands have different prices at {clock_of(double)}"))
    if terms.quiet and all(_quiet_at(terms.quiet, at) for at in range(7 * 1440)):
        said.append((("quiet",), "every minute of the week is quiet"))
    needs: dict[tuple[int, int], set[int]] = {}
    for departure in terms.departures or ():
        needs.setdefault((departure.weekday, departure.minute), set()).add(departure.wh)
    for (_, minute), wh in sorted(needs.items()):
        if len(wh) > 1:
            text = f"the departure at {clock_of(minute)} needs {min(wh)} Wh and {max(wh)} Wh"
            said.append((("departure",), text))
            break
    return said


def _of_pack(terms: PolicyTerms, pack: PackSpec) -> _Said:
    said: _Said = []
    limit = pack.charge_limit_permille
    if terms.soc_floor_permille + RESUME_SOC_PERMILLE >= limit:
        text = f"the car charges to {limit // 10} %: it would hardly ever be above the floor"
        said.append((("battery_charge_min_pct",), text))
    room_wh = pack.capacity_wh * max(0, limit - terms.soc_floor_permille) // 1_000
    reserve_wh = max([terms.reserve_wh, *(each.wh for each in terms.departures or ())])
    if terms.plugged_rule == 1 and reserve_wh >= room_wh:
        keys = ("battery_charge_min_pct", "reserve_wh", "departure", "run_on_batteries")
        text = f"{reserve_wh} Wh in reserve leave nothing of the {room_wh} Wh above the floor"
        said.append((keys, text))
    return said


def _minutes(first: int, last: int) -> list[int]:
    return [*range(first, last + 1)] if first <= last else [*range(first, 1440), *range(last + 1)]


def _quiet_at(quiet: tuple[Quiet, ...], minute_of_week: int) -> bool:
    weekday, minute = divmod(minute_of_week, 1440)
    for days, first, last in quiet:
        began = (weekday - (first > last >= minute)) % 7
        inside = first <= minute <= last if first <= last else minute >= first or minute <= last
        if days >> began & 1 and inside:
            return True
    return False
