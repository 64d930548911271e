"""The adapter `vss` over real gRPC: what the broker says is told at once, and its death too."""

from __future__ import annotations

import datetime
import ipaddress
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshnode.config import VehicleSettings
from meshnode.errors import LocalResource, UsageError
from meshnode.protocol.budget import FRESH_MS
from meshnode.vehicle.state import PERIOD_S_MAX, Pace, Source, VehicleAdapter, VehicleLost
from meshnode.vehicle.vss import adapter, signals, wire
from meshnode.vehicle.vss.adapter import VssVehicle

from .vss_broker import PARKED, Broker

NEVER = PERIOD_S_MAX  # longer than a test may take: what is told, was pushed
OFTEN = 0.01
DEADLINE_S = 20.0


@pytest.fixture
def broker() -> Iterator[Broker]:
    one = Broker()
    one.start()
    yield one
    one.stop()


class Told:
    """The states that an adapter tells."""

    def __init__(self) -> None:
        self.states: list[Any] = []
        self._more = trio.Event()

    def __call__(self, state: Any) -> None:
        self.states.append(state)
        self._more.set()
        self._more = trio.Event()

    async def until(self, holds: Callable[[Any], bool]) -> Any:
        """The first state of which it holds, of those not yet looked at."""
        seen = 0
        with trio.fail_after(DEADLINE_S):
            while True:
                for state in self.states[seen:]:
                    seen += 1
                    if holds(state):
                        self.states = self.states[seen:]
                        return state
                await self._more.wait()


def watching(source: Source, period_s: float, test: Callable[[Told], Any]) -> None:
    """Run the adapter beside `test`, and end it when that is over."""

    async def main() -> None:
        told = Told()
        car: VehicleAdapter = VssVehicle(source)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(car.run, told, Pace(period_s))
                await test(told)
                nursery.cancel_scope.cancel()

    trio.run(main)


def lost(source: Source, *, period_s: float = NEVER, told: Any = lambda state: None) -> str:
    """Run the adapter until it says why it has lost the car."""

    async def main() -> str:
        with trio.fail_after(DEADLINE_S), pytest.raises(VehicleLost) as caught:
            await VssVehicle(source).run(told, Pace(period_s))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return trio.run(main)


def in_client() -> int:
    """Threads that are inside of the adapter's client now."""
    found = 0
    for frame in sys._current_frames().values():
        here: Any = frame
        while here is not None and not here.f_code.co_filename.endswith("vss/client.py"):
            here = here.f_back
        found += here is not None
    return found


# ---- what the broker has is told


def test_the_first_state_has_all_that_the_car_gives(broker: Broker) -> None:
    async def test(told: Told) -> None:
        state = await told.until(lambda state: True)
        assert (state.soc_permille, state.usable_wh, state.capacity_wh) == (800, 48_000, 60_000)
        assert (state.plugged, state.charging, state.pack_power_w) == (True, "complete", 0)
        assert (state.charge_limit_permille, state.pack_temp_dc) == (800, (200, 225))
        assert (state.ambient_dc, state.low_voltage_mv) == (180, 13_200)
        assert (state.moving, state.ignition, state.departure_ms) == (False, "off", None)
        assert abs(state.at_ms - time.time() * 1000) < 60_000
        assert dict(state.ages_ms) == dict.fromkeys(VssVehicle.provides, 0)
        (subscribed,) = [request for name, request in broker.asked if name == "Subscribe"]
        assert set(subscribed.signal_paths) == set(PARKED), "only what this broker has"
        assert subscribed.buffer_size > 1, "one update does not push out another"

    watching(Source(broker.address), NEVER, test)


@pytest.mark.parametrize(
    ("path", "value", "reading", "meaning"),
    [
        (signals.IGNITION, "ON", "ignition", "on"),
        (signals.MOVING, True, "moving", True),
        (signals.SPEED, 7.0, "moving", True),
        (signals.CABLE_5, False, "plugged", False),
        (signals.CHARGE, math.nan, "soc_permille", None),
        (signals.CHARGE, "full", "soc_permille", None),
        (signals.IGNITION, None, "ignition", None),  # the broker has no value any more
    ],
)
def test_what_is_published_is_told_at_once(
    broker: Broker, path: str, value: Any, reading: str, meaning: Any
) -> None:
    async def test(told: Told) -> None:
        before = await told.until(lambda state: True)
        broker.publish(path, value)
        after = await told.until(lambda state: True)
        assert getattr(before, reading) != getattr(after, reading) == meaning
        assert after.ages_ms[reading] == 0
        assert broker.calls("GetValues") == 0, "nobody had to look"

    watching(Source(broker.address), NEVER, test)


def test_what_changes_no_reading_is_not_told_again(broker: Broker) -> None:
    async def test(told: Told) -> None:
        await told.until(lambda state: True)
        for speed in (0.1, 0.2, 0.3):
            broker.publish(signals.SPEED, speed)
        broker.publish(signals.SPEED, 9.0)
        state = await told.until(lambda state: True)
        assert state.moving

    watching(Source(broker.address), NEVER, test)


def test_a_look_tells_that_all_is_as_it_was(broker: Broker) -> None:
    async def test(told: Told) -> None:
        first = await told.until(lambda state: True)
        second = await told.until(lambda state: True)
        assert second.at_ms >= first.at_ms and second.ages_ms["moving"] < 5_000
        assert (second.moving, second.ignition, second.soc_permille) == (False, "off", 800)
        (asked, *_) = [request for name, request in broker.asked if name == "GetValues"]
        assert {each.path for each in asked.signal_ids} == set(signals.MOTION)

    watching(Source(broker.address), OFTEN, test)


def test_a_look_sees_what_no_update_said(broker: Broker) -> None:
    """An update may be dropped: by a broker whose queue is full, while this machine slept."""

    async def test(told: Told) -> None:
        await told.until(lambda state: True)
        broker.points[signals.IGNITION] = {"value": {"string": "ON"}}
        assert await told.until(lambda state: state.ignition == "on")
        broker.points[signals.MOVING] = {}
        broker.points[signals.SPEED] = {}
        assert await told.until(lambda state: state.moving is None)

    watching(Source(broker.address), OFTEN, test)


def test_an_update_during_a_look_is_newer_than_its_answer(broker: Broker) -> None:
    async def test(told: Told) -> None:
        await told.until(lambda state: True)
        broker.answers.clear()
        asked = broker.calls("GetValues")
        await trio.to_thread.run_sync(broker.until, lambda: broker.calls("GetValues") > asked)
        broker.publish(signals.IGNITION, "ON")
        assert await told.until(lambda state: state.ignition == "on")
        broker.points[signals.IGNITION] = {"value": {"string": "OFF"}}  # what the look will say
        told.states.clear()
        broker.answers.set()
        state = await told.until(lambda state: True)
        assert state.ignition == "on"
        assert await told.until(lambda state: state.ignition == "off"), "the next look counts"

    watching(Source(broker.address), OFTEN, test)


def test_a_broker_that_answers_in_its_own_order(broker: Broker) -> None:
    """As 0.6.0 to 0.7.0 do while a provider has claimed signals; see `signals.matched`."""
    broker.claimed = [signals.IGNITION, signals.MOVING]

    async def test(told: Told) -> None:
        for _ in range(3):
            state = await told.until(lambda state: True)
            assert (state.moving, state.ignition) == (False, "off")
        broker.points[signals.IGNITION] = {"value": {"string": "ACC"}}
        assert (await told.until(lambda state: state.ignition != "off")).ignition == "acc"

    watching(Source(broker.address), OFTEN, test)


# ---- what the broker has not


def test_a_signal_that_the_broker_does_not_know_is_unknown() -> None:
    """A car of VSS 4.0 without a speed: the others are told, and looked at."""
    older = {path: row for path, row in PARKED.items() if path != signals.SPEED}
    older[signals.CABLE_4] = older.pop(signals.CABLE_5)
    del older[signals.CHARGE]
    broker = Broker({**older, "Vehicle.CurrentLocation.Latitude": ("degrees", 48.2)})
    broker.start()

    async def test(told: Told) -> None:
        for _ in range(3):
            state = await told.until(lambda state: True)
            assert (state.plugged, state.moving, state.soc_permille) == (True, False, None)
        asked = {path for name, request in broker.asked for path in paths_of(name, request)}
        assert asked == set(older), "and where the car is, nobody asks"

    watching(Source(broker.address), OFTEN, test)
    broker.stop()


def paths_of(name: str, request: Any) -> list[str]:
    if name == "Subscribe":
        return list(request.signal_paths)
    return [each.path for each in request.signal_ids] if name == "GetValues" else []


def test_a_signal_in_another_unit_is_unknown() -> None:
    broker = Broker({**PARKED, signals.HOTTEST: ("fahrenheit", 72.5)})
    broker.start()

    async def test(told: Told) -> None:
        assert (await told.until(lambda state: True)).pack_temp_dc is None

    watching(Source(broker.address), NEVER, test)
    broker.stop()


def test_a_signal_that_the_token_does_not_cover_is_unknown(broker: Broker) -> None:
    broker.hidden = {signals.SPEED}

    async def test(told: Told) -> None:
        for _ in range(3):
            assert (await told.until(lambda state: True)).moving is False

    watching(Source(broker.address), OFTEN, test)


def test_a_token_that_covers_nothing_is_a_lost_car(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "CONNECT_TIMEOUT_S", 0.5)
    broker.hidden = set(PARKED)
    assert lost(Source(broker.address)).endswith("sends no values")


def test_a_broker_of_something_else_is_no_car() -> None:
    broker = Broker({"Vehicle.Cabin.Door.Row1.DriverSide.IsOpen": ("", False)})
    broker.start()
    assert "none of the signals" in lost(Source(broker.address))
    broker.stop()


# ---- the broker goes


def test_a_broker_that_dies_is_lost_and_comes_back(broker: Broker) -> None:
    async def main() -> None:
        car = VssVehicle(Source(broker.address))
        with trio.fail_after(DEADLINE_S):
            for charge in (80.0, 70.0):
                told = Told()
                broker.publish(signals.CHARGE, charge)

                async def die(told: Told = told) -> None:
                    await told.until(lambda state: True)
                    await trio.to_thread.run_sync(broker.stop)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(die)
                    with pytest.raises(VehicleLost, match=broker.address) as caught:
                        await car.run(told, Pace(NEVER))
                assert "\n" not in str(caught.value)
                with pytest.raises(VehicleLost, match="UNAVAILABLE"):
                    await car.run(told, Pace(NEVER))
                broker.start()
                assert told.states == []
                told = Told()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(car.run, told, Pace(NEVER))
                    state = await told.until(lambda state: True)
                    assert state.soc_permille == charge * 10
                    nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_broker_that_freezes_is_lost_in_time(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "LOOK_TIMEOUT_S", 0.2)

    def freeze(state: Any) -> None:
        broker.answers.clear()

    assert lost(Source(broker.address), period_s=OFTEN, told=freeze).endswith("does not answer")


def test_silence_is_noticed_before_a_reading_is_too_old() -> None:
    """With the default pace a look begins every 2 s, and motion is fresh for 5 s."""
    assert (VehicleSettings().poll_s + adapter.LOOK_TIMEOUT_S) * 1000 < FRESH_MS["moving"]
    # A broker that waits a second for a mute provider is slow and not silent.
    assert adapter.LOOK_TIMEOUT_S > 1
    assert FRESH_MS["moving"] > (1 + adapter.REST_TO_LOOK) * 1000


def test_a_broker_that_sends_no_values_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "CONNECT_TIMEOUT_S", 0.5)
    broker = Broker()
    broker.mute = True
    broker.start()
    assert lost(Source(broker.address)).endswith("sends no values")
    broker.stop()


def test_nobody_at_the_address() -> None:
    nobody = Broker()
    nobody.start()
    nobody.stop()
    assert nobody.address in lost(Source(nobody.address))


def test_nonsense_is_no_reading(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is no message."""

    class Nonsense:
        def SerializeToString(self) -> bytes:
            return b"\x0a\xff\xff"

    monkeypatch.setattr(wire, "GetValuesResponse", lambda **_: Nonsense())
    real = wire.classes(wire.MESSAGES)["GetValuesResponse"]
    wire.GetValuesResponse.FromString = real.FromString  # the adapter reads as always
    assert broker.address in lost(Source(broker.address), period_s=OFTEN)


def test_a_cancelled_adapter_leaves_no_call_and_no_thread(broker: Broker) -> None:
    async def test(told: Told) -> None:
        await told.until(lambda state: True)
        assert not broker.is_left() and in_client() == 1

    watching(Source(broker.address), NEVER, test)
    assert in_client() == 0
    broker.until(broker.is_left)


def test_a_look_is_cancelled_too(broker: Broker) -> None:
    async def test(told: Told) -> None:
        broker.answers.clear()
        await trio.to_thread.run_sync(broker.until, lambda: broker.calls("GetValues") > 0)

    began = time.monotonic()
    watching(Source(broker.address), OFTEN, test)
    assert time.monotonic() - began < adapter.LOOK_TIMEOUT_S
    broker.until(broker.is_left)


class Slow:
    """A broker that answers after a second, as one does that waits for a mute provider."""

    def __init__(self) -> None:
        self.looks = 0

    async def units(self, timeout_s: float) -> dict[str, str]:
        return {path: unit for path, (unit, _) in PARKED.items()}

    async def look(self, paths: list[str], timeout_s: float) -> list[Any]:
        self.looks += 1
        with trio.move_on_after(1.0):
            await trio.Event().wait()
        return [PARKED[path][1] for path in paths]

    async def follow(self, paths: Any, got: Callable[[dict[str, Any]], None]) -> None:
        got({path: PARKED[path][1] for path in paths})
        await trio.sleep_forever()


def test_a_slow_broker_is_left_in_peace_for_three_quarters_of_the_time() -> None:
    async def main() -> int:
        slow, told = Slow(), Told()
        with trio.move_on_after(60):
            client: Any = slow
            await adapter._Watch(client, told, Pace(0.5)).run("a broker")
        ages_ms = [state.ages_ms["moving"] for state in told.states]
        assert ages_ms[0] == 0 and set(ages_ms[1:]) == {1000}, "it may be as old as its question"
        return slow.looks

    looks = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert looks == pytest.approx(60 / (1 + adapter.REST_TO_LOOK), abs=1)


# ---- who may ask


def test_a_token_goes_along_and_its_lack_is_said(tmp_path: Path) -> None:
    broker = Broker(token="abc.def.ghi")
    broker.start()
    (tmp_path / "token").write_text("abc.def.ghi\n")

    async def test(told: Told) -> None:
        for _ in range(3):
            assert (await told.until(lambda state: True)).ignition == "off"

    source = Source(broker.address, token_file=tmp_path / "token")
    watching(source, OFTEN, test)
    assert "wants a token" in lost(Source(broker.address))
    (tmp_path / "token").write_text("old.old.old")
    why = lost(source)
    assert "wants a token" in why and "old.old" not in why
    (tmp_path / "token").unlink()
    with pytest.raises(LocalResource, match="cannot read"):
        VssVehicle(source)
    broker.stop()


def test_a_broker_behind_a_socket_of_this_machine() -> None:
    with tempfile.TemporaryDirectory(prefix="mn-") as folder:  # such a path has 107 bytes at most
        broker = Broker(token="abc", socket=Path(folder) / "kuksa")
        broker.start()
        (Path(folder) / "token").write_text("abc")

        async def test(told: Told) -> None:
            assert (await told.until(lambda state: True)).ignition == "off"

        watching(Source(broker.address, token_file=Path(folder) / "token"), NEVER, test)
        broker.stop()


@pytest.mark.parametrize("content", ["", "\n", "two words", "a\nb", "tök", "x" * 8000, "x" * 99999])
def test_a_file_that_holds_no_token_is_said_at_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(LocalResource, match="token") as caught:
        VssVehicle(Source(token_file=tmp_path / "token"))
    assert content not in str(caught.value) or not content.strip()


def test_a_token_that_went_away_is_a_lost_car(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc")
    car = VssVehicle(Source(token_file=tmp_path / "token"))
    (tmp_path / "token").unlink()

    async def main() -> None:
        with pytest.raises(VehicleLost, match="cannot read"):
            await car.run(lambda state: None, Pace(NEVER))

    trio.run(main)


@pytest.mark.parametrize("address", ["car.local:55555", "grpc://192.168.1.7:55555", "[fe80::1]:1"])
def test_a_token_never_leaves_this_machine_in_the_clear(tmp_path: Path, address: str) -> None:
    (tmp_path / "token").write_text("abc")
    with pytest.raises(UsageError, match="in the clear"):
        VssVehicle(Source(address, token_file=tmp_path / "token"))
    VssVehicle(Source(address))
    VssVehicle(Source("grpcs://" + address.removeprefix("grpc://"), token_file=tmp_path / "token"))
    for home in ("", "localhost:1", "127.8.8.8:1", "[::1]:1", "unix:/run/kuksa"):
        VssVehicle(Source(home, token_file=tmp_path / "token"))


@pytest.mark.parametrize(
    "address",
    [
        "car",
        "car:",
        ":55555",
        "http://car:55555",
        "grpc://user:secret@car:1",
        "grpc://car:1/path",
        "car:1\nx",
        "[::1:1",
        "unix:run/kuksa",
        "unix:",
    ],
)
def test_an_address_that_is_none_is_said_at_the_start(address: str) -> None:
    with pytest.raises(UsageError, match=r"vehicle\.address"):
        VssVehicle(Source(address))


def test_options_are_named() -> None:
    with pytest.raises(UsageError, match="ca_files is no option"):
        VssVehicle(Source(options={"ca_files": "/x"}))
    with pytest.raises(UsageError, match="grpcs"):
        VssVehicle(Source(options={"ca_file": "/x"}))
    with pytest.raises(LocalResource, match="cannot read"):
        VssVehicle(Source("grpcs://car:1", options={"ca_file": "/nowhere"}))


def certified(folder: Path) -> Any:
    """Server credentials whose authority stands in folder/ca.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(certificate)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return grpc.ssl_server_credentials([(private, certificate)])


def test_tls_with_the_owner_s_authority_and_with_no_other(tmp_path: Path) -> None:
    broker = Broker(token="abc", credentials=certified(tmp_path))
    broker.start()
    (tmp_path / "token").write_text("abc")
    address = f"grpcs://{broker.address}"

    async def test(told: Told) -> None:
        assert (await told.until(lambda state: True)).ignition == "off"

    options = {"ca_file": str(tmp_path / "ca.pem")}
    watching(Source(address, token_file=tmp_path / "token", options=options), NEVER, test)
    heard = len(broker.asked)
    assert address in lost(Source(address, token_file=tmp_path / "token"))
    assert len(broker.asked) == heard, "a broker that nobody vouches for hears no token"
    broker.stop()
