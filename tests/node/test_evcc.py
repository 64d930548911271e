"""The evcc adapter against an HTTP server on the loopback: alive, changing, slow, gone and bad."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from meshnode.vehicle.evcc import ANSWER_BYTES_MAX, EvccVehicle
from meshnode.vehicle.state import Pace, Source, VehicleLost, VehicleState

POINT = {"title": "Carport", "connected": True, "charging": False, "vehicleSoc": 50}


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode() + body


def answer_of(**point: Any) -> bytes:
    return answer(json.dumps({"loadpoints": [{**POINT, **point}]}).encode())


class House:
    """An evcc: whoever asks it gets `says` at once, or after it thaws."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.says = answer_of()
        self.endless = False
        self.asked: list[bytes] = []
        self.thawed = trio.Event()
        self.thawed.set()
        self.port = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Serve within; on the port of the last time, once there was one."""
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(self.port, host=self.host)
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            self.port = listeners[0].socket.getsockname()[1]
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        heard = b""
        try:
            async for chunk in stream:
                heard += chunk
                while b"\r\n\r\n" in heard:
                    question, heard = heard.split(b"\r\n\r\n", 1)
                    self.asked.append(question)
                    await self.thawed.wait()
                    await stream.send_all(self.says)
                    while self.endless:
                        await stream.send_all(b" " * 65_536)
        except trio.BrokenResourceError:
            pass  # hung up on

    def car(self, **options: float) -> EvccVehicle:
        return EvccVehicle(Source(address=f"{self.host}:{self.port}"), **options)


class Watch:
    """An adapter at work, and what it told."""

    def __init__(self) -> None:
        self.told: list[VehicleState] = []
        self.pace = Pace(30.0)
        self._more = trio.Event()

    def tell(self, state: VehicleState) -> None:
        self.told.append(state)
        self._more.set()
        self._more = trio.Event()

    async def next(self) -> VehicleState:
        await self._more.wait()
        return self.told[-1]


def play(scene: Callable[[House, Watch], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            await scene(House(), Watch())

    trio.run(main)


async def loses(car: EvccVehicle, watch: Watch) -> str:
    with pytest.raises(VehicleLost) as caught:
        await car.run(watch.tell, watch.pace)
    text = str(caught.value)
    assert text.isprintable() and text.startswith("evcc at http://127.0.0.1:")
    return text


def test_a_change_is_seen_at_the_next_look_over_one_connection() -> None:
    async def scene(house: House, watch: Watch) -> None:
        async with house.open(), trio.open_nursery() as nursery:
            nursery.start_soon(house.car().run, watch.tell, watch.pace)
            assert (await watch.next()).soc_permille == 500
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert len(house.asked) == 1
            house.says = answer_of(connected=False)
            watch.pace.hurry()
            state = await watch.next()
            assert (state.plugged, state.charging, state.soc_permille) == (False, "no", None)
            assert len(house.asked) == len(watch.told) == 2
            nursery.cancel_scope.cancel()
        question = house.asked[0].lower()
        assert question.startswith(b"get /api/state http/1.1\r\n")
        assert b"accept-encoding: identity" in question

    play(scene)


def test_it_asks_once_a_period() -> None:
    async def scene(house: House, watch: Watch) -> None:
        watch.pace.set(0.01)
        async with house.open(), trio.open_nursery() as nursery:
            nursery.start_soon(house.car().run, watch.tell, watch.pace)
            while len(watch.told) < 3:
                await watch.next()
            nursery.cancel_scope.cancel()
        assert watch.told[0].at_ms < watch.told[-1].at_ms

    play(scene)


def test_a_server_that_dies_and_comes_back() -> None:
    async def scene(house: House, watch: Watch) -> None:
        async with house.open():
            car = house.car()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(car.run, watch.tell, watch.pace)
                await watch.next()
                nursery.cancel_scope.cancel()
        assert "no answer: " in await loses(car, watch)
        assert len(watch.told) == 1
        async with house.open(), trio.open_nursery() as nursery:
            nursery.start_soon(car.run, watch.tell, watch.pace)
            assert (await watch.next()).plugged is True
            nursery.cancel_scope.cancel()

    play(scene)


def test_a_server_that_dies_while_it_is_watched() -> None:
    async def scene(house: House, watch: Watch) -> None:
        async def lose(car: EvccVehicle) -> None:
            assert "no answer: " in await loses(car, watch)

        async with trio.open_nursery() as nursery:
            async with house.open():
                nursery.start_soon(lose, house.car())
                await watch.next()
            watch.pace.hurry()
        assert len(watch.told) == 1

    play(scene)


def test_a_frozen_server() -> None:
    async def scene(house: House, watch: Watch) -> None:
        async with house.open():
            house.thawed = trio.Event()
            text = await loses(house.car(timeout_s=0.05), watch)
            assert text.endswith("no answer within 0.05 s")
            house.thawed.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.car().run, watch.tell, watch.pace)
                await watch.next()
                nursery.cancel_scope.cancel()

    play(scene)


def test_a_server_that_stops_in_the_middle() -> None:
    async def scene(house: House, watch: Watch) -> None:
        async with house.open():
            house.says = answer_of()[:-5]
            text = await loses(house.car(timeout_s=0.05), watch)
            assert text.endswith("no answer within 0.05 s")

    play(scene)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (answer(b"", "500 Internal Server Error"), "HTTP 500"),
        (answer(b"", "404 Not Found"), "HTTP 404"),
        (answer(b"", "204 No Content"), "HTTP 204"),
        (
            answer(b"", "302 Found", "Location: http://127.0.0.1:1/elsewhere"),
            "HTTP 302 (a redirect is not followed)",
        ),
        (answer(b"<html>"), "the answer is no JSON"),
        (answer(b""), "the answer is no JSON"),
        (answer(b'{"loadpoints": [{"title": "\xff"}]}'), "the answer is no JSON"),
        (answer(b"[" * 100_000), "the answer is no JSON"),
        (answer(b"9" * 100_000), "the answer is no JSON"),
        (answer(b"[]"), "the answer names no loadpoint"),
        (answer(gzip.compress(b"{}"), "200 OK", "Content-Encoding: gzip"), "compressed answer"),
        (answer(b" " * (ANSWER_BYTES_MAX + 1)), "an answer of more than 1 MiB"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no answer: "),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n", "no answer: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_answer(says: bytes, why: str) -> None:
    async def scene(house: House, watch: Watch) -> None:
        async with house.open():
            house.says = says
            assert why in await loses(house.car(), watch)
        assert (watch.told, len(house.asked)) == ([], 1)

    play(scene)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "xn--zzzz"])
def test_a_host_name_that_is_none(host: str) -> None:
    async def main() -> None:
        car = EvccVehicle(Source(address=f"{host}:7070"))
        with pytest.raises(VehicleLost, match=f"^evcc at http://{host}:7070/api/state: no answer"):
            await car.run(Watch().tell, Pace(30.0))

    trio.run(main)


def test_an_answer_without_an_end() -> None:
    async def scene(house: House, watch: Watch) -> None:
        async with house.open():
            house.says, house.endless = b"HTTP/1.1 200 OK\r\n\r\n", True
            assert "an answer of more than 1 MiB" in await loses(house.car(), watch)

    play(scene)


def test_one_number_that_is_none_costs_that_reading_only() -> None:
    async def scene(house: House, watch: Watch) -> None:
        house.says = answer(
            b'{"tariffGrid": NaN, "forecast": {"solar": [Infinity, 1e999]},'
            b' "loadpoints": [{"connected": true, "charging": false, "vehicleSoc": 50}]}'
        )
        async with house.open(), trio.open_nursery() as nursery:
            nursery.start_soon(house.car().run, watch.tell, watch.pace)
            state = await watch.next()
            assert (state.soc_permille, state.tariff_nano_per_kwh) == (500, None)
            nursery.cancel_scope.cancel()

    play(scene)
