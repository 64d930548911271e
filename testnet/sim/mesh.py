"""A deterministic mesh of real machines: a seeded heap in microseconds, links, gossip, faults.

`Node.handle` decides; here its effects are carried out. Frames arrive after the link's delay, in
their order; persists after another; a crash drops every Persist whose Persisted has not been
handled and keeps the rest, as a power loss would. The machine's own clock has whole milliseconds,
rounded down; latencies are measured on the heap's.

Conventions of the network models (the throw-away ones that placement was designed with had the
same, so that results compare): `HANDLING_US` for every message that a node handles, `HOP_US` for
every hop of gossip. Both are attributes: 0 switches them off.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from meshnode.protocol import effects as fx
from meshnode.protocol import events as ev
from meshnode.protocol.acceptances import NoAudit
from meshnode.protocol.cell import Roster
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.node import Node
from meshnode.protocol.placement import AdvertPlacement
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Digest, Lane, Limits, NetworkId, Now, Peer, Rng

from .site import (
    ARTIFACT,
    DAY_MS,
    EPOCH_MS,
    NETWORK,
    PROVIDE,
    REQUEST,
    KeysOf,
    Papers,
    Site,
    account_keys,
    identity_of,
    mandate_of,
)
from .standing import Standing
from .trace import Trace
from .virtual import VirtualWorkers, output_of

HANDLING_US = 1_000
DHT_MS = 1_500  # of a look-up
PROVIDERS_FOUND = 20
HOP_US = 2_000
RELAY_US = 10_000  # between two members of a cell: 500 have it after 43 ms, 99 % of them after 86
GOSSIP_DEGREE = 8  # links of a member in the mesh of a topic; each sends on to all but one


class Links(Protocol):
    """How far apart two sites are, by their numbers. `network.Network` is one."""

    def one_way_us(self, a: int, b: int, rng: random.Random) -> int: ...

    def rtt_us(self, a: int, b: int) -> int:
        """As the overlay measures it; 0: it does not."""
        ...


class EvenLinks:
    """Every frame takes a whole number of milliseconds between two bounds."""

    def __init__(self, delay_ms: tuple[int, int]) -> None:
        self._delay_ms = delay_ms

    def one_way_us(self, a: int, b: int, rng: random.Random) -> int:
        return rng.randint(*self._delay_ms) * 1000

    def rtt_us(self, a: int, b: int) -> int:
        return 0


class Bent(Protocol):
    """What a fault plan does to frames under way: `faults.Weather`."""

    def arrivals_us(self, rng: random.Random, *, stream: bool) -> tuple[int, ...]:
        """Extra delay of each copy that arrives; none: it never does, and only gossip may."""
        ...


class Mesh(VirtualWorkers):
    node_class: type[Node] = Node

    def __init__(
        self,
        seed: int,
        *,
        delay_ms: tuple[int, int] = (1, 8),
        limits: Limits | None = None,
        links: Links | None = None,
        keys_of: KeysOf = KeySigner,
    ) -> None:
        super().__init__()
        self.roster: Roster | None = None  # None: each machine reads adverts
        self.standing: Standing | None = None  # None: each pair agrees by itself
        self.rng = random.Random(seed)
        self.seed = seed
        self.now_us = 0
        self.limits = limits or Limits()
        self.links = links or EvenLinks(delay_ms)
        self.keys_of = keys_of
        self.handling_us = HANDLING_US if links else 0
        self.hop_us = HOP_US if links else 0
        self.relay_us = RELAY_US if links else 0
        self.sites: dict[str, Site] = {}
        self.by_peer: dict[Peer, Site] = {}
        self.topics: dict[str, dict[str, Site]] = defaultdict(dict)
        self.trace: list[str] = []  # every effect, for people; a fleet keeps none
        self.digest: Trace | None = None  # every event
        self.keep_trace = True
        self.weather: Bent | None = None
        self.provided: dict[Digest, dict[Peer, str]] = defaultdict(dict)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._lane_clock: dict[tuple[int, int], int] = {}
        self.queue_full = 0.0  # chance that a frame of `full_lanes` finds its queue full
        self.full_lanes = {Lane.RESULT}
        self.no_blobs = False  # no holder ever answers
        self.lost: set[Digest] = set()  # blobs that nobody has any more
        self.partitioned: set[frozenset[str]] = set()
        self._closing: set[frozenset[str]] = set()  # hung up on, and not yet gone
        self._doers: dict[type, Callable[[Site, Any, int], None]] = {
            fx.Send: self._send,
            fx.Publish: self._publish,
            fx.Notify: self._notify,
            fx.Persist: self._persist,
            fx.StartExec: self._execute,
            fx.Admit: self._admit,
            fx.StopExec: self._stop,
            fx.Join: self._join,
            fx.Leave: self._leave,
            fx.Dial: self._dial,
            fx.Block: self._block,
            fx.Hangup: self._hang_up,
            fx.Pin: self._pin,
            fx.Unpin: self._unpin,
            fx.FetchBlob: self._fetch,
            fx.Provide: self._provide,
            fx.FindProviders: self._find_providers,
            fx.Sleep: self._sleep,
        }

    # ---- building

    def add(self, name: str, roles: int, **more: Any) -> Site:
        """`more`: slots, network, cell, papers."""
        site = self._enter(name, roles, **more)
        self.boot(name)
        return site

    def _enter(
        self,
        name: str,
        roles: int,
        *,
        slots: int = 1,
        network: NetworkId = NETWORK,
        cell: str = "cell",
        papers: Papers | None = None,
        seed: int | None = None,
    ) -> Site:
        number = len(self.sites)
        seed = number + 1 if seed is None else seed
        identity, signer = identity_of(
            seed, roles, network=network, cell=cell, keys_of=self.keys_of, papers=papers
        )
        site = Site(name, identity, signer, self.limits, number, slots=slots)
        self.sites[name] = site
        self.by_peer[identity.peer] = site
        return site

    def boot(self, name: str) -> None:
        site = self.sites[name]
        site.life += 1
        site.asleep = False
        site.tick_at = None
        site.waiting.clear()
        site.pending.clear()
        site.pins.clear()
        site.stopped.clear()
        site.node = self.node_of(site)
        self._carry(site, site.node.start(self.now(site)))
        self.feed(site, ev.AddrsKnown((f"/sim/{name}",)))
        if site.identity.roles & PROVIDE:
            self.feed(site, ev.BudgetRead(True, Reason.OK, 5_000_000, 300, 7_200, 0))
            worker = ev.WorkerClass("cpu", "sim", 4_096, 100_000, b"simclass")
            self.feed(site, ev.WorkerClasses((worker,), "0.0", (9, 10), 0, site.slots))

    def node_of(self, site: Site) -> Node:
        """The machine of a new life."""
        return self.node_class(
            site.identity,
            site.limits,
            site.signer,
            AdvertPlacement(),
            NoAudit(),
            self.rng_of(site),
            site.disk.restored(),
            self.roster,
            self.standing,
        )

    def rng_of(self, site: Site) -> Rng:
        return random.Random(f"{self.seed} {site.life} {site.name}")

    def connect(self, one: str, other: str) -> None:
        a, b = self.sites[one], self.sites[other]
        if frozenset((one, other)) in self._closing:
            self.cut(one, other)  # a new connection takes the place of the one that is ending
        if other in a.links or not a.awake or not b.awake or self._split(a, b):
            return
        a.links.add(other)
        b.links.add(one)
        self.feed(a, ev.PeerUp(b.identity.peer, "lan", (f"/sim/{other}",), False))
        self.feed(b, ev.PeerUp(a.identity.peer, "lan", (f"/sim/{one}",), True))
        rtt_us = self.links.rtt_us(a.number, b.number)
        if rtt_us and other in a.links:
            self.feed(a, ev.RttMeasured(b.identity.peer, rtt_us))
            self.feed(b, ev.RttMeasured(a.identity.peer, rtt_us))

    def connect_all(self) -> None:
        names = list(self.sites)
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                self.connect(one, other)

    def cut(self, one: str, other: str) -> None:
        a, b = self.sites[one], self.sites[other]
        self._closing.discard(frozenset((one, other)))
        if other not in a.links:
            return
        a.links.discard(other)
        b.links.discard(one)
        self.feed(a, ev.PeerDown(b.identity.peer, Reason.PEER_DOWN))
        self.feed(b, ev.PeerDown(a.identity.peer, Reason.PEER_DOWN))

    def crash(self, name: str) -> None:
        """Its power goes, or it drives out of the network: nobody is told but by silence."""
        site = self.sites[name]
        site.life += 1
        site.node = None
        self._closing = {pair for pair in self._closing if name not in pair}
        for other in sorted(site.links):
            self.sites[other].links.discard(name)
            self.feed(self.sites[other], ev.PeerDown(site.identity.peer, Reason.PEER_DOWN))
        site.links.clear()

    def drive_away(
        self, name: str, grace_ms: int, gone: Callable[[Site, list[str]], None] | None = None
    ) -> None:
        """Its driver is back: work stops within the grace, then the car is out of reach. `gone` is
        told then, with whom it was connected to."""
        site = self.sites[name]
        life = site.life
        self.feed(site, ev.Recall(Reason.DRIVING, grace_ms))

        def leave() -> None:
            if site.life == life:
                known = sorted(site.links)
                self.crash(name)
                if gone is not None:
                    gone(site, known)

        self.at(grace_ms, leave)

    def _sleep(self, site: Site, effect: fx.Sleep, life: int) -> None:
        """Its machine is suspended: its connections end, and it does nothing until it wakes."""

        def falls() -> None:
            if site.life == life and site.node is not None and site.node.standby.still():
                for other in sorted(site.links):
                    self.cut(site.name, other)
                site.asleep, site.tick_at = True, None
                self.stirred(site)

        def wakes() -> None:
            if site.life == life and site.asleep:
                site.asleep = False
                self.stirred(site)
                self.feed(site, ev.Woke())

        self.at(effect.settle_ms, falls)
        self.at(effect.for_ms, wakes)

    def stirred(self, site: Site) -> None:
        """It has fallen asleep or is awake again; for who watches."""

    def role_holders(self) -> list[str]:
        """Sites that are rendezvous now, for who wants to break them."""
        return []

    # ---- running

    def renew(self, name: str, begins_ms: int) -> None:
        """Its account signs for it anew."""
        site = self.sites[name]
        own, account = site.identity, account_keys(site.number + 1, self.keys_of)
        mandate = mandate_of(own.peer, account, own.roles, own.network, EPOCH_MS + begins_ms)
        site.identity = replace(own, mandate=mandate)
        self.feed(site, ev.MandateRenewed(mandate))

    @property
    def now_ms(self) -> int:
        return self.now_us // 1000

    def skip(self, ms: int) -> None:
        """So long nothing happens at all: what was due comes late."""
        self.now_us += ms * 1000
        self._heap = [(at + ms * 1000, number, call) for at, number, call in self._heap]

    def now(self, site: Site | None = None) -> Now:
        ms = self.now_us // 1000
        return Now(ms, EPOCH_MS + ms + (site.skew_ms if site else 0))

    def at(self, delay_ms: int, call: Callable[[], None]) -> None:
        self.at_us(delay_ms * 1000, call)

    def at_us(self, delay_us: int, call: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now_us + delay_us, self._order, call))

    def feed_life(self, site: Site, life: int, event: ev.Event) -> None:
        """What was under way reaches only the life of the site that asked for it."""
        if site.life == life:
            self.feed(site, event)

    def feed(self, site: Site, event: ev.Event) -> None:
        if site.node is None or site.asleep:
            return
        if self.digest is not None:
            self.digest.add(self.now_us, site.number, event)
        self._carry(site, site.node.handle(event, self.now(site)))

    def run(self, until: Callable[[], bool], *, ms_max: int = 120_000) -> bool:
        end = self.now_us + ms_max * 1000
        while not until():
            if not self._heap or self._heap[0][0] > end:
                return False
            self.now_us, _, call = heapq.heappop(self._heap)
            call()
        return True

    def run_to(self, end_us: int) -> None:
        """Everything until then, without a look at anything in between."""
        heap = self._heap
        while heap and heap[0][0] <= end_us:
            self.now_us, _, call = heapq.heappop(heap)
            call()
        self.now_us = end_us

    def rest(self, ms: int) -> None:
        self.run_to(self.now_us + ms * 1000)

    # ---- carrying effects out

    def _carry(self, site: Site, effects: list[fx.Effect]) -> None:
        for effect in effects:
            if site.pending and isinstance(effect, fx.Send | fx.Publish):
                if effect.after is not None and effect.after in site.pending:
                    site.waiting[effect.after].append(effect)
                    continue
            self._do(site, effect)
        self._wake(site)

    def _wake(self, site: Site) -> None:
        node = site.node
        if node is None or site.asleep:
            return
        due = node.deadline_mono_ms()
        if due is None or (site.tick_at is not None and site.tick_at <= due):
            return
        site.tick_at = due
        life = site.life

        def tick() -> None:
            if site.life != life or site.tick_at != due:
                return  # an earlier one took its place, and set what comes next
            site.tick_at = None
            self.feed(site, ev.Tick())

        now_ms = self.now_us // 1000
        self.at_us(max(due, now_ms + 1) * 1000 - self.now_us, tick)

    def _do(self, site: Site, effect: fx.Effect) -> None:
        if self.keep_trace:
            self.trace.append(f"{self.now_ms} {site.name} {effect!r}")
        doer = self._doers.get(type(effect))
        if doer is not None:
            doer(site, effect, site.life)

    def _notify(self, site: Site, effect: fx.Notify, life: int) -> None:
        site.notices.append((effect.subject, effect.notice))

    def _pin(self, site: Site, effect: fx.Pin, life: int) -> None:
        site.pins[effect.blob_id] += 1

    def _unpin(self, site: Site, effect: fx.Unpin, life: int) -> None:
        site.pins[effect.blob_id] -= 1

    def _block(self, site: Site, effect: fx.Block, life: int) -> None:
        other = self.by_peer[effect.peer]
        self.at(1, lambda: self.cut(site.name, other.name))

    def _hang_up(self, site: Site, effect: fx.Hangup, life: int) -> None:
        """What is under way to the other side arrives; then both see the end."""
        other = self.by_peer[effect.peer]
        pair = frozenset((site.name, other.name))
        self._closing.add(pair)

        def end() -> None:
            if pair in self._closing:
                self.cut(site.name, other.name)

        after_us = self._lane_clock.get((site.number, other.number), 0) - self.now_us
        self.at_us(max(self._one_way_us(site, other), after_us), end)

    def _one_way_us(self, site: Site, other: Site) -> int:
        return self.links.one_way_us(site.number, other.number, self.rng)

    def _split(self, a: Site, b: Site) -> bool:
        return bool(self.partitioned) and frozenset((a.name, b.name)) in self.partitioned

    # ---- frames

    def _send(self, site: Site, effect: fx.Send, life: int) -> None:
        other = self.by_peer[effect.peer]
        if other.name not in site.links:
            failed = ev.SendFailed(effect.send_id, effect.peer, Reason.PEER_DOWN)
            self.at(0, lambda: self.feed_life(site, life, failed))
            return
        if self.queue_full and effect.lane in self.full_lanes:
            if self.rng.random() < self.queue_full:
                full = ev.SendFailed(effect.send_id, effect.peer, Reason.QUEUE_FULL)
                self.at(0, lambda: self.feed_life(site, life, full))
                return
        if site.lie is None:
            self._transmit(site, other, effect)
            return
        for said in site.lie(effect):
            to = self.by_peer[said.peer]
            if to.name in site.links:
                self._transmit(site, to, said)

    def send_late(self, site: Site, other: Site, said: fx.Send, life: int) -> None:
        """What a liar held back, if both are still there."""
        if site.life == life and other.name in site.links:
            self._transmit(site, other, said)

    def _transmit(self, site: Site, other: Site, said: fx.Send) -> None:
        """One stream, in order: a frame that is late holds up all behind it."""
        key = (site.number, other.number)
        late = (0,) if self.weather is None else self.weather.arrivals_us(self.rng, stream=True)
        lives = (site.life, other.life)
        frame = ev.FrameIn(site.identity.peer, said.lane, said.frame)

        def deliver() -> None:
            if (site.life, other.life) == lives and other.name in site.links:
                self.feed(other, frame)

        for extra_us in late:
            way_us = self._one_way_us(site, other) + self.handling_us + extra_us
            at = max(self.now_us + way_us, self._lane_clock.get(key, 0))
            self._lane_clock[key] = at
            self.at_us(at - self.now_us, deliver)

    def _join(self, site: Site, effect: fx.Join, life: int) -> None:
        self.topics[effect.topic][site.name] = site

    def _leave(self, site: Site, effect: fx.Leave, life: int) -> None:
        self.topics[effect.topic].pop(site.name, None)

    def _publish(self, site: Site, effect: fx.Publish, life: int) -> None:
        members = self.topics[effect.topic]
        event = ev.GossipIn(effect.topic, site.identity.peer, effect.frame)
        for other in list(members.values()):
            if other is not site and other.awake and not self._split(site, other):
                self._gossip(site, other, event, len(members))

    def _gossip(self, site: Site, other: Site, event: ev.GossipIn, members: int) -> None:
        life = other.life
        late = (0,) if self.weather is None else self.weather.arrivals_us(self.rng, stream=False)
        for extra_us in late:
            way_us = self._hops_us(site, other, members) + self.handling_us + extra_us
            self.at_us(way_us, lambda: self.feed_life(other, life, event))

    def _hops_us(self, site: Site, other: Site, members: int) -> int:
        """Hop after hop through the topic's mesh: 8 members are one hop away, 7 times as many
        each hop further, until all have it (GossipSub, arXiv:2007.02754, without loss). The way
        between the two counts once; what lies between is the quickest of many ways."""
        between, reached, wave = 0, GOSSIP_DEGREE, GOSSIP_DEGREE
        if members > GOSSIP_DEGREE + 1:
            lot = self.rng.randrange(members - 1)
            while reached <= lot:
                wave *= GOSSIP_DEGREE - 1
                reached += wave
                between += 1
        return self._one_way_us(site, other) + self.hop_us + between * (self.relay_us + self.hop_us)

    def _dial(self, site: Site, effect: fx.Dial, life: int) -> None:
        other = self.by_peer.get(effect.peer)

        def answer() -> None:
            if site.life != life:
                return
            if other is None or not other.awake or self._split(site, other):
                self.feed(site, ev.DialFailed(effect.peer, Reason.UNREACHABLE))
            else:
                self.connect(site.name, other.name)

        self.at_us(self._dial_us(site, other), answer)

    def _dial_us(self, site: Site, other: Site | None) -> int:
        """Five round trips where distances are known: TCP, select, Noise, muxer, select."""
        if other is None:
            return 1_000
        return 5 * self.links.rtt_us(site.number, other.number) or self._one_way_us(site, other)

    def _provide(self, site: Site, effect: fx.Provide, life: int) -> None:
        self.provided[effect.key][site.identity.peer] = site.name

    def _find_providers(self, site: Site, effect: fx.FindProviders, life: int) -> None:
        """The DHT: right, and slow."""
        found = [
            (peer, (f"/sim/{name}",))
            for peer, name in self.provided[effect.key].items()
            if self.sites[name].awake and not self._split(site, self.sites[name])
        ][:PROVIDERS_FOUND]
        event = ev.ProvidersFound(effect.query_id, tuple(found))
        self.at(DHT_MS, lambda: self.feed_life(site, life, event))

    # ---- disk and blobs

    def _fetch(self, site: Site, effect: fx.FetchBlob, life: int) -> None:
        """From any holder that is still there; what is here already needs none."""
        if self.no_blobs:
            return

        def fetched() -> None:
            blob_id = effect.ref.blob_id
            holders = [self.by_peer[peer] for peer in effect.holders if peer in self.by_peer]
            here = blob_id in site.disk.blobs or any(h.node is not None for h in holders)
            event: ev.Event = ev.BlobFailed(effect.fetch_id, blob_id, Reason.BLOB_MISSING)
            if here and blob_id not in self.lost and site.life == life:
                site.disk.blobs.add(blob_id)
                event = ev.BlobReady(effect.fetch_id, effect.ref, effect.byte_count)
            self.feed_life(site, life, event)

        holder = self.by_peer.get(effect.holders[0], site) if effect.holders else site
        self.at_us(1_000 if holder is site else self._one_way_us(site, holder), fetched)

    def _persist(self, site: Site, effect: fx.Persist, life: int) -> None:
        site.pending.add(effect.seq)
        # in their order, as the journal stores them
        site.stored_us = max(site.stored_us, self.now_us + self.rng.randint(1, 6) * 1000)
        self.at_us(site.stored_us - self.now_us, lambda: self._persisted(site, effect, life))

    def _persisted(self, site: Site, effect: fx.Persist, life: int) -> None:
        if site.life != life:
            return  # the crash came first: nothing of it is kept
        if site.disk.full:
            site.waiting.pop(effect.seq, None)
            site.pending.discard(effect.seq)
            self.feed(site, ev.PersistFailed(effect.seq, Reason.DISK_FULL))
            return
        for record in effect.records:
            site.disk.store(record)
            self.stored(site, record)
        site.pending.discard(effect.seq)
        for waiting in site.waiting.pop(effect.seq, []):
            self._do(site, waiting)
        self.feed(site, ev.Persisted(effect.seq))

    def stored(self, site: Site, record: fx.Record) -> None:
        """It is durable; for who watches."""


__all__ = [
    "ARTIFACT",
    "DAY_MS",
    "EPOCH_MS",
    "NETWORK",
    "PROVIDE",
    "REQUEST",
    "Mesh",
    "Site",
    "identity_of",
    "output_of",
]
