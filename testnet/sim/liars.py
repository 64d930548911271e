"""Rendezvous that lie, on the seam `Site.lie`: their machine is honest, what leaves it is not.

`lies_of` makes one of five: it drops placements, delays them, steers them to the slowest cars whose
tokens it could keep, hands tokens out again, or invents them. `best_keys` are those of somebody
who wants every rendezvous of one cell: ids are keys, an epoch is known beforehand, so keys can be
tried until they rank first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from meshnode.protocol import effects as fx
from meshnode.protocol.cell import score, shape
from meshnode.protocol.messages import Assign, pack, unpack
from meshnode.protocol.objects import T_TOKEN, Token
from meshnode.protocol.sealed import seal, unseal
from meshnode.protocol.types import Peer

from .frames import kind_of

if TYPE_CHECKING:
    from .mesh import Mesh, Site

KINDS: Final = ("drop", "delay", "steer", "replay", "invent")
ABOUT_PLACEMENT: Final = frozenset({"assign", "place", "queued", "refuse"})
DELAY_US: Final = (200_000, 2_000_000)
KEPT: Final = 8  # tokens that one who steers has to choose from
TRIED: Final = 20  # keys that are tried for each that is kept
Lie = Callable[[fx.Send], list[fx.Send]]


def lies_of(mesh: Mesh, site: Site, kind: str, rng: random.Random) -> Lie:
    """What leaves a rendezvous of that kind instead of each frame. ValueError for no such kind."""
    if kind == "drop":
        return lambda send: [] if kind_of(send.frame) in ABOUT_PLACEMENT else [send]
    if kind == "delay":
        return _delays(mesh, site, rng)
    changed = {"steer": _steers, "replay": _replays, "invent": _invents}.get(kind)
    if changed is None:
        raise ValueError(f"{kind!r} is no lie: choose one of {', '.join(KINDS)}")
    assigns = changed(mesh, site)

    def lie(send: fx.Send) -> list[fx.Send]:
        return assigns(send) if kind_of(send.frame) == "assign" else [send]

    return lie


def _delays(mesh: Mesh, site: Site, rng: random.Random) -> Lie:
    def lie(send: fx.Send) -> list[fx.Send]:
        if kind_of(send.frame) not in ABOUT_PLACEMENT:
            return [send]
        life, other = site.life, mesh.by_peer[send.peer]
        mesh.at_us(rng.randint(*DELAY_US), lambda: mesh.send_late(site, other, send, life))
        return []

    return lie


def _with(send: fx.Send, car: Peer, token: bytes) -> fx.Send:
    assign = unpack(send.frame)
    return replace(send, peer=car, frame=pack(Assign(token, assign.offer, assign.addrs)))


def _steers(mesh: Mesh, site: Site) -> Lie:
    kept: list[tuple[Peer, bytes]] = []

    def lie(send: fx.Send) -> list[fx.Send]:
        assign = unpack(send.frame)
        kept.append((send.peer, assign.token))
        if len(kept) <= KEPT:
            return []
        submitter = mesh.by_peer[Peer(unseal(assign.offer).kid)].number
        worst = max(kept, key=lambda one: mesh.links.rtt_us(mesh.by_peer[one[0]].number, submitter))
        kept.remove(worst)
        return [_with(send, *worst)]

    return lie


def _replays(mesh: Mesh, site: Site) -> Lie:
    """Each second placement gets the token of the one before it."""
    spent: list[tuple[Peer, bytes]] = []

    def lie(send: fx.Send) -> list[fx.Send]:
        if spent:
            return [_with(send, *spent.pop())]
        spent.append((send.peer, unpack(send.frame).token))
        return [send]

    return lie


def _invents(mesh: Mesh, site: Site) -> Lie:
    """A token that the car never gave, signed by whoever could sign one here."""

    def lie(send: fx.Send) -> list[fx.Send]:
        real = unseal(unpack(send.frame).token).open(Token, T_TOKEN)
        token = replace(real, seq=real.seq + 1_000)
        made = seal(token, T_TOKEN, site.identity.peer, site.signer.sign)
        return [_with(send, send.peer, made.wire)]

    return lie


def ground_seeds(keys: int) -> range:
    """Seeds of keys that nobody else has, `TRIED` for each that is kept."""
    return range(1 << 40, (1 << 40) + TRIED * keys)


def best_keys(
    cell: str, epoch: int, cars: int, rendezvous_cars: int, peers: Mapping[int, Peer], keys: int
) -> list[int]:
    """Those `keys` of the seeds whose ids rank best in any of the cell's shards, the best first."""
    shards, _ = shape(cars + keys, rendezvous_cars)
    best = {
        seed: min(score(cell, shard, epoch, peer) for shard in range(shards))
        for seed, peer in peers.items()
    }
    return sorted(best, key=lambda seed: best[seed])[:keys]
