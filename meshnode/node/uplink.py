"""What carries this node's bytes: a cable, Wi-Fi, or a mobile network that bills them.

    /proc/net/route, /sys/class/net -> Uplink -> Link -> budget.spendable (`METERED`)
    overlay.counters (bytes)        -/

Read by `vehicle_watch` at each look, the machine's files at most every few seconds. The way out is
the default route with the lowest metric; what kind of device it leads through is the kernel's word
(proc(5), sysfs-class-net: `wireless`, `DEVTYPE=wwan`). Behind a router that dials out itself no
machine can see it: `node.link` in the configuration says so then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from meshnode.protocol.budget import Link
from meshnode.protocol.types import Now

LOOK_MS: Final = 5_000
_UP, _DEFAULT, _NOWHERE = 1, "00000000", "0" * 32  # RTF_UP, and addresses of all zeros
_BYTES_MAX: Final = 1 << 20
_POINT_TO_POINT: Final = ("ppp", "wwan", "rmnet", "wwp", "cdc-wdm")
"""What mobile modems are called where the kernel does not say more of them (systemd's names, and
those of Qualcomm's drivers)."""

Kind = Literal["wired", "wifi", "cellular"]


def kind_of_link(root: Path = Path("/")) -> Kind | None:
    """Of the default route; without one, of whatever is up: routing by rules keeps its default in
    a table that is not in these files. None: not known."""
    device = _way_out(root)
    if device is not None:
        return _kind_of(root, device)
    up = {_kind_of(root, each) for each in _devices_up(root)}
    return "wired" if up <= {"wired"} else None


def _devices_up(root: Path) -> list[str]:
    try:
        found = sorted(each.name for each in (root / "sys/class/net").iterdir())
    except OSError:
        return []
    return [
        name
        for name in found
        if name != "lo"
        and _read(root / "sys/class/net" / name / "operstate").strip() in ("up", "unknown")
    ]


def _kind_of(root: Path, device: str) -> Kind | None:
    folder = root / "sys/class/net" / device
    said = _read(folder / "uevent")
    if "DEVTYPE=wwan" in said or device.startswith(_POINT_TO_POINT):
        return "cellular"
    if "DEVTYPE=wlan" in said or (folder / "wireless").exists() or (folder / "phy80211").exists():
        return "wifi"
    # ARPHRD_ETHER; a tunnel could lead anywhere.
    return "wired" if _read(folder / "type").strip() == "1" else None


def _way_out(root: Path) -> str | None:
    """The device of the best default route, IPv4's before IPv6's."""
    found: list[tuple[int, int, str]] = []
    for line in _read(root / "proc/net/route").splitlines()[1:]:
        words = line.split()
        if len(words) >= 8 and words[1] == words[7] == _DEFAULT and int(words[3], 16) & _UP:
            found.append((4, int(words[6]), words[0]))
    for line in _read(root / "proc/net/ipv6_route").splitlines():
        words = line.split()
        if len(words) == 10 and words[0] == _NOWHERE and words[1] == "00" and words[9] != "lo":
            found.append((6, int(words[5], 16), words[9]))
    return min(found)[2] if found else None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX).decode("ascii", "replace")
    except OSError:
        return ""


class Uplink:
    """`moved()`: bytes that this node has sent and received since it began."""

    def __init__(
        self, setting: str, moved: Callable[[], int], look: Callable[[], Kind | None] = kind_of_link
    ) -> None:
        self._fixed: Kind | None = None if setting == "auto" else setting  # type: ignore[assignment]
        self._moved = moved
        self._look = look
        self._kind: Kind | None = self._fixed
        self._looked_mono_ms: int | None = None
        self._last_bytes = moved()
        self._last_kind = self._fixed  # when bytes were counted last, whoever has asked since

    def kind(self, now: Now) -> Kind | None:
        due = self._looked_mono_ms is None or self._looked_mono_ms + LOOK_MS <= now.mono_ms
        if self._fixed is None and due:
            self._looked_mono_ms = now.mono_ms
            try:
                self._kind = self._look()
            except ValueError:  # a table that is not the kernel's
                self._kind = None
        return self._kind

    def metered(self, now: Now) -> int:
        """Bytes since the last time it was asked, as far as somebody is billed for them: all of
        them if the link is a mobile one at either end of that time."""
        before, moved = self._last_kind, self._moved()
        kind = self._last_kind = self.kind(now)
        since, self._last_bytes = moved - self._last_bytes, moved
        free = before in ("wired", "wifi") and kind in ("wired", "wifi")
        return 0 if free else since

    def link(self, now: Now, metered_bytes: int) -> Link:
        return Link(self.kind(now), metered_bytes)
