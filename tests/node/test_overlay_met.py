"""Whom an overlay has met, and how it finds them again."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.overlay import overlay
from meshnode.protocol.events import PeerUp

from .overlay_kit import connect, next_event, overlays, until


def test_whom_it_has_met_it_finds_again_when_no_bootstrap_answers(tmp_path: Path) -> None:
    async def main() -> None:
        async with overlays("abc", tmp_path) as (a, b, c):
            await connect(a, b)
            b.remember(a.peer)
            await until(lambda: bool(b.met))
            met = ("nonsense", "/ip4/127.0.0.1/tcp/1/p2p/Qm", *b.met)
            where, gone = tuple(addr.split("/p2p/")[0] for addr in a.addrs), c.addrs
        for bootstrap in ((), gone):
            async with overlays("a", tmp_path, listen=where):  # noqa: SIM117 - b is later
                async with overlays("b", tmp_path, bootstrap=bootstrap, met=met) as (b,):
                    assert (await next_event(b, PeerUp)).peer == a.peer
                    assert b.met == met[2:]

    trio.run(main)


def test_strangers_do_not_push_out_whom_it_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay, "MET_MAX", 2)

    async def main() -> None:
        async with overlays("ab", tmp_path) as (a, b):
            await connect(a, b)
            a.remember(b.peer)
            for name in "cdef":
                async with overlays(name, tmp_path) as (other,):
                    await connect(other, a)
                    assert other.peer not in a._met, "it has said nothing of itself"
                    a.remember(other.peer)
                    assert other.peer in a._met
            assert b.peer in a._met and len(a._met) == 2

    trio.run(main)
