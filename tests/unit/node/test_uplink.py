"""What kind of link the machine's bytes go over, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.node.uplink import LOOK_MS, Kind, Uplink, kind_of_link
from meshnode.protocol.types import Now

HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
DEFAULT = "{}\t00000000\t0100A8C0\t0003\t0\t0\t{}\t00000000\t0\t0\t0\n"
HOME = "{}\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
ZEROS = "0" * 32
SIX = f"{ZEROS} 00 {ZEROS} 00 fe80{'0' * 28} {{:08x}} 00000001 00000000 00000003 {{:>8}}\n"


def device(
    root: Path, name: str, uevent: str = "", *, kind: int = 1, wireless: bool = False
) -> None:
    folder = root / "sys/class/net" / name
    folder.mkdir(parents=True)
    (folder / "uevent").write_text(f"{uevent}\nINTERFACE={name}\nIFINDEX=2\n")
    (folder / "type").write_text(f"{kind}\n")
    if wireless:
        (folder / "wireless").mkdir()


def machine(root: Path, four: str, six: str = "") -> Path:
    (root / "proc/net").mkdir(parents=True)
    (root / "proc/net/route").write_text(HEAD + four)
    (root / "proc/net/ipv6_route").write_text(six)
    device(root, "eth0")
    device(root, "wlan0", "DEVTYPE=wlan")
    device(root, "wlp3s0", wireless=True)
    device(root, "wwan0", "DEVTYPE=wwan")
    device(root, "ppp0", kind=512)
    device(root, "tun0", kind=65534)
    return root


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eth0", "wired"),
        ("wlan0", "wifi"),
        ("wlp3s0", "wifi"),
        ("wwan0", "cellular"),
        ("ppp0", "cellular"),
        ("tun0", None),
        ("gone0", None),
    ],
)
def test_the_kind_of_the_default_route(tmp_path: Path, name: str, kind: Kind | None) -> None:
    root = machine(tmp_path, HOME.format("eth0") + DEFAULT.format(name, 100))
    assert kind_of_link(root) == kind


def test_the_route_with_the_lowest_metric_and_ipv4_first(tmp_path: Path) -> None:
    four = DEFAULT.format("wwan0", 700) + DEFAULT.format("wlan0", 600)
    root = machine(tmp_path, four, SIX.format(1, "eth0"))
    assert kind_of_link(root) == "wifi"
    (root / "proc/net/route").write_text(HEAD)
    assert kind_of_link(root) == "wired"
    (root / "proc/net/ipv6_route").write_text(SIX.format(1024, "wwan0"))
    assert kind_of_link(root) == "cellular"


def test_a_machine_without_a_way_out_pays_nobody(tmp_path: Path) -> None:
    root = machine(tmp_path, HOME.format("wwan0"))
    assert kind_of_link(root) == "wired", "all of its devices are down"
    (root / "sys/class/net/eth0/operstate").write_text("up\n")
    assert kind_of_link(root) == "wired"
    (root / "sys/class/net/wwan0/operstate").write_text("unknown\n")
    assert kind_of_link(root) is None, "it may be the way out by a rule"
    assert kind_of_link(tmp_path / "nothing") == "wired"


def test_bytes_count_if_the_link_was_mobile_at_either_end() -> None:
    moved, kind, looks = 1_000, "wifi", 0

    def look() -> Kind | None:
        nonlocal looks
        looks += 1
        if kind == "junk":
            raise ValueError("no number")
        return kind if kind in ("wired", "wifi", "cellular") else None  # type: ignore[return-value]

    uplink = Uplink("auto", lambda: moved, look)

    def after(ms: int, to: str, more: int) -> int:
        nonlocal moved, kind
        kind, moved = to, moved + more
        return uplink.metered(Now(ms, 0))

    after(0, "wifi", 0)
    assert after(LOOK_MS - 1, "cellular", 7) == 0, "not looked at yet"
    assert looks == 1
    assert after(LOOK_MS, "cellular", 10) == 10
    assert after(LOOK_MS + 1, "cellular", 20) == 20
    kind = "wired"
    assert uplink.kind(Now(2 * LOOK_MS, 0)) == "wired", "somebody asks for the status"
    assert after(2 * LOOK_MS + 1, "wired", 30) == 30
    assert after(3 * LOOK_MS, "wired", 40) == 0
    assert after(4 * LOOK_MS, "junk", 50) == 50, "what cannot be read is taken for mobile"
    assert Uplink("cellular", lambda: moved, look).kind(Now(0, 0)) == "cellular"
