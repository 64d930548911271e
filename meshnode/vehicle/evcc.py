"""The readings of evcc, the charge controller of many a home: from outside the car, by HTTP.

Between evcc's `GET /api/state` and `node.vehicle_watch`. It knows the plug, the charge and the
price of energy, and nothing of motion, ignition or the pack's temperature.

evcc calls that answer its own affair, without a promise to stay as it is (its server/
openapi.state.yaml), so each reading is taken alone: one that is absent, of another type or cannot
be true is unknown, and the others stand. Units there: W, per cent, kWh, currency per kWh.

Two things that evcc does not tell: how old the car's state of charge is (it asks the car while
charging, and else by the owner's settings seldom or never), and whether its own loop still runs.
All ages are therefore those of evcc's last answer.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import trio

from meshnode.errors import UsageError

from .state import ChargingState, Pace, Source, Tell, VehicleLost, VehicleState

if TYPE_CHECKING:
    import httpx

ANSWER_BYTES_MAX: Final = 1 << 20  # a house with forecasts has some 100 kB
TIMEOUT_S: Final = 5.0
SOC_PERCENT_ABOVE: Final = 1  # 0 is evcc's "not known", up to 1 may be a fraction of one
SOC_PERCENT_MAX: Final = 100
CHARGE_W_LEAST: Final = 100  # below it a standby draw, or a number in kW
CHARGE_W_MAX: Final = 1_000_000
CAPACITY_KWH_LEAST: Final = 1
CAPACITY_KWH_MAX: Final = 1_500  # a lorry; more is a number in Wh
TARIFF_MAX: Final = 1_000  # of the currency a kWh, either sign; forints and yen need the hundreds
DEPARTURE_S_MAX: Final = 31 * 24 * 3600

_OPTIONS: Final = ("loadpoint", "vehicle", "currency")
_NOT_CARS: Final = ("chargerFeatureHeating", "chargerFeatureIntegratedDevice")
_PLAIN: Final = re.compile(r"((?![?#\\])[!-~])+")  # no query, nothing that is no ASCII
_TITLES_SHOWN: Final = 8
_TITLE_CHARS_SHOWN: Final = 40


class EvccVehicle:
    """One loadpoint of the evcc at `address`.

    Options: `loadpoint` is its title, its name or its number from 0, needed where there are
    several; `vehicle` the name or title in evcc of this car, so that a guest at the loadpoint is
    not taken for it; `currency` that of this network, so that a price in another is not taken.
    """

    name = "evcc"
    provides = frozenset(
        {
            "plugged",
            "charging",
            "pack_power_w",
            "soc_permille",
            "charge_limit_permille",
            "capacity_wh",
            "departure_ms",
            "tariff_nano_per_kwh",
        }
    )

    def __init__(self, source: Source, *, timeout_s: float = TIMEOUT_S) -> None:
        """UsageError if the address is none, or an option has no meaning here."""
        self._url = _url(source.address)
        for name in source.options:
            if name not in _OPTIONS:
                raise UsageError(f"evcc has no option {name}; it has {', '.join(_OPTIONS)}")
        self._options = dict(source.options)
        self._timeout_s = timeout_s

    async def run(self, tell: Tell, pace: Pace) -> None:
        """Task, until cancelled: ask every `pace.period_s`.

        VehicleLost names the address, if evcc does not answer in time or answers nonsense.
        """
        async with _client(self._url) as client:
            while True:
                try:
                    tell(await self._ask(client))
                except VehicleLost as error:
                    raise VehicleLost(f"evcc at {self._url}: {error}") from None
                await pace.rest()

    async def _ask(self, client: httpx.AsyncClient) -> VehicleState:
        at_ms = time.time_ns() // 1_000_000  # of the question: no reading is younger than it says
        with trio.move_on_after(self._timeout_s) as patience:
            body = await _body(client, self._url)
        if patience.cancelled_caught:
            raise VehicleLost(f"no answer within {self._timeout_s:g} s")
        return readings_of(_decoded(body), at_ms, **self._options)


def _url(address: str) -> str:
    """UsageError unless the address is one of HTTP, without a password that errors would show."""
    example = "for example http://evcc.local:7070"
    if not address:
        raise UsageError(f"vehicle.address is missing: where evcc listens, {example}")
    whole = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good or not _PLAIN.fullmatch(whole) or parts.username is not None:
        raise UsageError(f"vehicle.address {address!r} is no address of evcc, {example}")
    return f"{whole.rstrip('/')}/api/state"


# ---- HTTP


def _client(url: str) -> httpx.AsyncClient:
    # Here and not above: it takes a fifth of a second to load, for the few who have an evcc.
    import httpx

    for noisy in ("httpx", "httpcore"):  # a line for each question
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return httpx.AsyncClient(
        # A house's evcc is not behind a proxy that the environment names for the web.
        trust_env=False,
        # Redirects are not followed, so http stays http and needs no certificates loaded.
        verify=url.startswith("https:"),
        follow_redirects=False,
        timeout=None,  # `_ask` has one for the whole
        # As it is: a few compressed kB may hold a GB.
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        limits=httpx.Limits(max_connections=1),
    )


async def _body(client: httpx.AsyncClient, url: str) -> bytes:
    import httpx

    body = bytearray()
    try:
        with trio.CancelScope() as enough:
            async with client.stream("GET", url) as response:
                if response.status_code != 200:
                    moved = " (a redirect is not followed)" if response.is_redirect else ""
                    raise VehicleLost(f"HTTP {response.status_code}{moved}")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise VehicleLost("a compressed answer, which was not asked for")
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > ANSWER_BYTES_MAX:
                        # Who leaves this loop early leaves httpx's generators inside it half run.
                        enough.cancel()
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last: a host name
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise VehicleLost(f"no answer: {why}") from None
    if len(body) > ANSWER_BYTES_MAX:
        raise VehicleLost(f"an answer of more than {ANSWER_BYTES_MAX >> 20} MiB")
    return bytes(body)


def _decoded(body: bytes) -> object:
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError):
        raise VehicleLost("the answer is no JSON") from None


# ---- what the answer says


def readings_of(
    state: object, at_ms: int, loadpoint: str = "", vehicle: str = "", currency: str = ""
) -> VehicleState:
    """The readings in an answer of evcc to a question asked at `at_ms`. Pure.

    VehicleLost, and nothing else, if it names no loadpoint, or not the one that is meant.
    """
    site = _fields(state)
    if "loadpoints" not in site:
        site = _fields(site.get("result"))  # wrapped so until August 2025
    point = _loadpoint(site, loadpoint)
    connected = _flag(point, "connected")
    name = point.get("vehicleName")
    if vehicle and connected and vehicle not in (name, point.get("vehicleTitle")):
        connected, point = None, {}  # somebody else's car, so ours is somewhere else
    readings: dict[str, Any] = {"plugged": connected, "tariff_nano_per_kwh": None}
    if not currency or site.get("currency") == currency:
        # Negative at times: then energy costs nothing, says `budget`.
        readings["tariff_nano_per_kwh"] = _scaled(
            site.get("tariffGrid"), -TARIFF_MAX, TARIFF_MAX, 1_000_000_000
        )
    if connected:
        car = _fields(_fields(site.get("vehicles")).get(name)) if isinstance(name, str) else {}
        readings |= _of_the_car(point, car, at_ms)
    elif connected is False and _flag(point, "charging") is False:
        readings["charging"] = "no"
    return VehicleState(at_ms=at_ms, ages_ms=dict.fromkeys(EvccVehicle.provides, 0), **readings)


def _of_the_car(
    point: Mapping[str, object], car: Mapping[str, object], at_ms: int
) -> dict[str, Any]:
    """What is known only while a car is connected: else evcc repeats what it last knew."""
    soc = _permille(point.get("vehicleSoc"))
    # The loadpoint's limit, 100 without one, and the car's own: the charge ends at the lower.
    limits = [_permille(point.get(key)) for key in ("effectiveLimitSoc", "vehicleLimitSoc")]
    limit = min((one for one in limits if one is not None), default=None)
    charging = _charging(point, soc, limit)
    # kWh; at the loadpoint until January 2024.
    capacity = car.get("capacity", point.get("vehicleCapacity"))
    # The power of the charger, on the AC side: `budget` takes it times the policy's efficiency.
    power = point.get("chargePower") if charging == "charging" else None
    return {
        "soc_permille": soc,
        "charge_limit_permille": limit,
        "charging": charging,
        "capacity_wh": _scaled(capacity, CAPACITY_KWH_LEAST, CAPACITY_KWH_MAX, 1_000),
        "pack_power_w": _scaled(power, CHARGE_W_LEAST, CHARGE_W_MAX, 1),
        "departure_ms": _departure_ms(point, car, at_ms),
    }


def _charging(
    point: Mapping[str, object], soc: int | None, limit: int | None
) -> ChargingState | None:
    """Of a connected car.

    "complete" says that the plug carries the load. At its limit evcc switches the charger off
    (`enabled` false), and then the load drains the battery: that is "no".
    """
    charging = _flag(point, "charging")
    if charging is None:
        return None
    if charging:
        return "charging"
    full = soc is not None and limit is not None and soc >= limit
    return "complete" if full and _flag(point, "enabled") is True else "no"


def _departure_ms(point: Mapping[str, object], car: Mapping[str, object], at_ms: int) -> int | None:
    """The next time for which a charge is planned. The car's own plan is looked at too: once its
    goal is reached, evcc no longer calls it effective, but the driver comes all the same."""
    plan = _fields(car.get("plan"))
    texts = (point.get("effectivePlanTime"), point.get("planTime"), plan.get("time"))
    times = [_unix_ms(text) for text in texts]
    latest_ms = at_ms + DEPARTURE_S_MAX * 1_000
    ahead = [one for one in times if one is not None and at_ms < one <= latest_ms]
    return min(ahead, default=None)


def _loadpoint(site: Mapping[str, object], wanted: str) -> dict[str, object]:
    """By title, name or number; without a wish the only one that charges cars."""
    rows = site.get("loadpoints")
    points = [_fields(row) for row in rows] if isinstance(rows, list) else []
    if not any(points):
        raise VehicleLost("the answer names no loadpoint")
    found = cars = [one for one in points if _for_cars(one)]
    if wanted:
        found = [one for one in cars if wanted in (one.get("title"), one.get("name"))]
        if not found and re.fullmatch("[0-9]{1,3}", wanted):
            found = [one for one in points[int(wanted) :][:1] if _for_cars(one)]
    if len(found) == 1:
        return found[0]
    titles = ", ".join(_shown(one) for one in cars[:_TITLES_SHOWN])
    if wanted:
        how_many = "several loadpoints are" if found else "no loadpoint for cars is"
        raise VehicleLost(f"{how_many} called {wanted!r}; there are: {titles or 'none'}")
    if not cars:
        raise VehicleLost("no loadpoint is one for cars")
    raise VehicleLost(f"set the option loadpoint to one of: {titles}")


def _for_cars(point: Mapping[str, object]) -> bool:
    """Not a heat pump: its charge is a temperature, and always connected."""
    return bool(point) and not any(_flag(point, key) for key in _NOT_CARS)


def _shown(point: Mapping[str, object]) -> str:
    """A title in one line, however long or odd it is."""
    return repr(str(point.get("title", ""))[:_TITLE_CHARS_SHOWN])


# ---- fields of any type


def _fields(value: object) -> dict[str, object]:
    """A JSON object's; none if it is something else."""
    return value if isinstance(value, dict) else {}


def _flag(fields: Mapping[str, object], key: str) -> bool | None:
    value = fields.get(key)
    return value if isinstance(value, bool) else None


def _scaled(value: object, least: float, most: float, by: int) -> int | None:
    """None unless it is a number within. NaN, which Python's JSON lets pass, is within nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return round(value * by) if least <= value <= most else None


def _permille(value: object) -> int | None:
    """Of per cent."""
    return _scaled(value, math.nextafter(SOC_PERCENT_ABOVE, math.inf), SOC_PERCENT_MAX, 10)


def _unix_ms(value: object) -> int | None:
    """RFC 3339 with its offset; a time without one is nobody's."""
    if not isinstance(value, str):
        return None
    try:
        when = datetime.fromisoformat(value)
        return None if when.tzinfo is None else int(when.timestamp() * 1_000)
    except (ValueError, OverflowError):
        return None
