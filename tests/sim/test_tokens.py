"""Placement through a rendezvous: tokens, lines, exchange, and what each kind of liar can do."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol import messages
from meshnode.protocol.cell import Candidate, elect, epoch_of, shape
from meshnode.protocol.job import JobState
from meshnode.protocol.node import Node
from meshnode.protocol.objects import T_OFFER, T_TOKEN, Offer, OfferKind, Token
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rendezvous import SPARE_TOKENS
from meshnode.protocol.sealed import seal, unseal
from meshnode.protocol.stage import Placement, Stage
from meshnode.protocol.tallies import BELIEVED_MAX
from meshnode.protocol.types import Lane, Limits, NetworkId, Peer, TaskId
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh, Site

from .test_mesh import accepted_units, assert_whole, ended, job_of, mesh_of, order, submit


def node_of(site: Site) -> Node:
    assert site.node is not None
    return site.node


def cars_of(mesh: Mesh) -> list[Site]:
    return [site for site in mesh.sites.values() if site.identity.roles & PROVIDE]


def rendezvous_of(mesh: Mesh) -> Site:
    """The one of a small cell, as its cars see it."""
    car = next(site for site in cars_of(mesh) if site.node is not None)
    epoch = epoch_of(mesh.now().unix_ms)
    ((peer,),) = node_of(car).provider.tokens._roster.posts("cell", epoch)
    return mesh.by_peer[peer]


def settled(cars: int, seed: int = 1, **more: Any) -> Mesh:
    """All adverts have been heard, and every token lies where it should."""
    mesh = mesh_of(cars, seed, **more)
    mesh.rest(3_000)
    return mesh


def counted(mesh: Mesh, name: str) -> int:
    return sum(node_of(site).counters[name] for site in mesh.sites.values() if site.node)


def frames_since(mesh: Mesh, at_ms: int) -> Counter[str]:
    """What was sent, by message or type of object."""
    kinds: Counter[str] = Counter()
    for line in mesh.trace:
        when, _, rest = line.split(" ", 2)
        if int(when) >= at_ms and rest.startswith("Send("):
            frame = re.search(r"frame=(b'.*?'|b\".*?\"), after=", rest)
            assert frame is not None
            content: bytes = ast.literal_eval(frame.group(1))
            if content.startswith(b"\xd2"):
                kinds[content.split(b"mesh-")[1].split(b"/")[0].decode()] += 1
            else:
                kinds[type(messages.unpack(content)).__name__.lower()] += 1
    return kinds


def test_a_large_job_reaches_every_car() -> None:
    mesh = settled(12)
    submit(mesh, order(600, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 600)
    assert sorted(accepted_units(mesh.sites["submitter"])) == list(range(600))
    assert len({past.attempt.peer for past in job_of(mesh).history}) == 12
    assert all(node_of(car).provider.tokens for car in cars_of(mesh)), "idle again, and they say so"


def test_a_call_of_a_known_submitter_takes_three_messages() -> None:
    mesh = settled(6)
    submit(mesh, order(60, policy="tokens"))  # agreements with all
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(1_000)
    at_ms = mesh.now_ms
    submit(mesh, order(1, nonce=1, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    sent = frames_since(mesh, at_ms)
    assert [sent[kind] for kind in ("place", "assign", "lease")] == [1, 1, 1] or (
        sent["place"] == sent["lease"] == 1  # the rendezvous itself was the idle car
    )
    assert not sent["offer"] and not sent["refuse"] and not sent["announce"]


def test_a_first_meeting_costs_two_round_trips_after_the_dial() -> None:
    """Bid and terms, agreement, its countersignature, award: each is one way."""
    mesh = settled(1, delay_ms=(100, 100))
    submit(mesh, order(1, policy="tokens"))
    begun_ms = mesh.now_ms
    assert mesh.run(lambda: ended(mesh))

    def first(what: str) -> int:
        times = (int(line.split()[0]) for line in mesh.trace if what in line)
        return next(at_ms for at_ms in times if at_ms >= begun_ms)

    took_ms = first(" car-0 Admit(") - first(" car-0 Send(")
    assert 400 <= took_ms < 500, "the rest is storing what is signed"


def test_a_car_that_was_busy_gets_the_run_with_its_next_token() -> None:
    """Runs that come another way take the slot behind a token that is out already."""
    mesh = settled(2)
    for car in cars_of(mesh):
        provider = node_of(car).provider
        provider._take_placed = _busy_once(provider)  # type: ignore[method-assign]
    begun_ms = mesh.now_ms
    submit(mesh, order(1, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    assert counted(mesh, "refused_busy") == 2 and mesh.now_ms - begun_ms < 1_000


def _busy_once(provider: Any) -> Any:
    take = provider._take_placed
    said: list[bool] = []

    def taken(holder: Peer, sealed: Any, offer: Any, token: Any, *more: Any) -> Reason:
        if said:
            return take(holder, sealed, offer, token, *more)  # type: ignore[no-any-return]
        said.append(provider.tokens.spend(token, holder))
        return Reason.BUSY

    return taken


@pytest.mark.parametrize("seed", range(4))
def test_the_rendezvous_dies_in_the_middle(seed: int) -> None:
    mesh = settled(5, seed)
    submit(mesh, order(200, policy="tokens"))
    assert mesh.run(lambda: job_of(mesh).taken >= 40)
    mesh.crash(rendezvous_of(mesh).name)
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(5_000)
    assert_whole(mesh, 200)


def lie(site: Site, how: str, mesh: Mesh) -> None:
    """Its code is changed: this is what a hostile car could run instead."""
    role = node_of(site).rendezvous
    if how == "drops":
        role._find = lambda placement: None  # type: ignore[method-assign]
    elif how == "keeps tokens":  # hands each out again and again
        find = role._find

        def replay(placement: Any) -> None:
            held = role._best(placement)
            if held is None:
                find(placement)
            else:
                role._assign(placement, held)

        role._find = replay  # type: ignore[method-assign]
    elif how == "steers":  # everything to one car
        favourite = cars_of(mesh)[0].identity.peer
        fits = role._fits

        def only_it(placement: Any, held: Any) -> bool:
            return held.token.peer == favourite and fits(placement, held)

        role._fits = only_it  # type: ignore[method-assign]
    elif how == "assigns twice":
        assign = role._assign

        def twice(placement: Any, held: Any) -> None:
            assign(placement, held)
            for other in list(role._tokens.values())[:1]:
                placement.stage = Stage.SOUGHT  # against its own table
                assign(placement, other)

        role._assign = twice  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["drops", "keeps tokens", "steers", "assigns twice"])
@pytest.mark.parametrize("seed", range(2))
def test_a_lying_rendezvous_costs_time_and_nothing_else(how: str, seed: int) -> None:
    mesh = settled(5, seed)
    lie(rendezvous_of(mesh), how, mesh)
    for nonce in range(6):
        submit(mesh, order(20, nonce=nonce, policy="tokens"))
        assert mesh.run(lambda: ended(mesh))
    mesh.rest(5_000)
    jobs = node_of(mesh.sites["submitter"]).jobs.all.values()
    assert {job.state for job in jobs} == {JobState.DONE}
    accepted = Counter(accepted_units(mesh.sites["submitter"]))
    assert set(accepted.values()) == {6}, "each unit of each job was accepted once"


@pytest.mark.parametrize("policy", ["tokens", "gossip", "adverts"])
def test_with_the_role_switched_off_every_job_completes(policy: str) -> None:
    mesh = mesh_of(4, 3, limits=Limits(rendezvous_cars=0))
    mesh.rest(1_000)
    submit(mesh, order(60, policy=policy))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(3_000)
    assert_whole(mesh, 60)
    assert not counted(mesh, "tokens_deposited") and not counted(mesh, "places")


def test_two_laptops_are_a_mesh() -> None:
    mesh = settled(1)
    submit(mesh, order(10, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    assert job_of(mesh).state is JobState.DONE


def test_lines_take_turns() -> None:
    """Forty calls of one submitter do not keep the one call of another waiting behind them."""
    mesh = Mesh(7)
    mesh.add("greedy", REQUEST)
    mesh.add("modest", REQUEST)
    for number in range(2):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    mesh.rest(21_000)
    mesh.unit_ms = 500
    for name in ("greedy", "modest"):  # agreements first
        mesh.feed(mesh.sites[name], ev.Submit(1, order(2, nonce=99, policy="adverts")))
    mesh.rest(6_000)

    def call(name: str, nonce: int) -> None:
        the_order = order(1, nonce=nonce, policy="tokens", unit_ms_hint=500.0)
        mesh.feed(mesh.sites[name], ev.Submit(1, the_order))

    def done(name: str) -> int:
        jobs = node_of(mesh.sites[name]).jobs.all.values()
        return sum(job.state is JobState.DONE for job in jobs if job.spec.nonce[-1] != 99)

    for nonce in range(40):
        call("greedy", nonce)
    mesh.rest(1_200)
    call("modest", 50)
    before = done("greedy")
    assert mesh.run(lambda: done("modest") == 1)
    assert done("greedy") - before <= 4, "it waited for a turn of each car, and not for the line"
    assert mesh.run(lambda: done("greedy") == 40)


def test_what_waited_when_its_connection_ended_may_be_placed_again() -> None:
    mesh = settled(3)
    holder = rendezvous_of(mesh)
    role = node_of(holder).rendezvous
    role._fits = lambda placement, held: False  # type: ignore[method-assign]
    submit(mesh, order(4, policy="tokens"))
    assert mesh.run(lambda: role.queued > 0)
    waiting = next(p for line in role._lines.values() for p in line)
    submitter = mesh.sites["submitter"]
    mesh.cut("submitter", holder.name)
    assert role.queued == 0 and waiting.stage is Stage.OVER
    mesh.connect("submitter", holder.name)
    mesh.rest(50)  # both have said hello
    again = messages.pack(waiting.place)
    mesh.feed(holder, ev.FrameIn(submitter.identity.peer, Lane.CONTROL, again))
    assert waiting.key in [p.key for line in role._lines.values() for p in line]


def test_who_comes_alone_moves_its_tokens_once_it_has_heard_of_the_others() -> None:
    """A car that has just begun knows nobody, and elects itself."""
    mesh = mesh_of(8, 1)
    mesh.rest(3_000)
    holder = rendezvous_of(mesh)
    assert counted(mesh, "tokens_moved") > 0
    for car in cars_of(mesh):
        assert node_of(car).provider.tokens.holders() == {holder.identity.peer}
        assert node_of(car).rendezvous.tokens == (8 if car is holder else 0)


def waiting_place(mesh: Mesh) -> messages.Place:
    """Of a placement that waits at its rendezvous, and goes on waiting."""
    role = node_of(rendezvous_of(mesh)).rendezvous
    role._fits = lambda placement, held: False  # type: ignore[method-assign]
    submit(mesh, order(1, policy="tokens"))
    assert mesh.run(lambda: role.queued > 0)
    del role._fits
    return next(p for line in role._lines.values() for p in line).place


def test_nobody_waits_at_one_that_is_not_elected() -> None:
    mesh = settled(4)
    holder = rendezvous_of(mesh)
    other = next(car for car in cars_of(mesh) if car is not holder)
    place = messages.pack(waiting_place(mesh))
    submitter, at_ms = mesh.sites["submitter"].identity.peer, mesh.now_ms
    mesh.feed(other, ev.FrameIn(submitter, Lane.CONTROL, place))
    assert node_of(other).rendezvous.queued == 0
    assert frames_since(mesh, at_ms)["refuse"] == 1


@pytest.mark.parametrize("cars", [2, 3, 4])
def test_what_another_cell_sends_gets_what_can_be_spared(cars: int) -> None:
    mesh = settled(cars)
    role = node_of(rendezvous_of(mesh)).rendezvous
    sent_on = messages.pack(replace(waiting_place(mesh), hops=1, wait_ms=0))
    role.peer_down(mesh.sites["submitter"].identity.peer)  # what waits is forgotten
    assert role.tokens == cars
    mesh.feed(
        rendezvous_of(mesh),
        ev.FrameIn(mesh.sites["submitter"].identity.peer, Lane.CONTROL, sent_on),
    )
    assert role.tokens == (cars - 1 if cars > SPARE_TOKENS else cars)


@pytest.mark.parametrize(("idle", "taken"), [(1, 0), (2, 1)])
def test_a_hedge_gets_a_car_where_enough_are_idle(idle: int, taken: int) -> None:
    mesh = settled(12)
    submitter, holder = mesh.sites["submitter"], rendezvous_of(mesh)
    role, place = node_of(holder).rendezvous, waiting_place(mesh)
    role.peer_down(submitter.identity.peer)  # what waits is forgotten
    for car in [car for car in cars_of(mesh) if car is not holder][: 12 - idle]:
        role.peer_down(car.identity.peer)
    assert role.tokens == idle
    offer = replace(unseal(place.offer).open(Offer, T_OFFER), kind=OfferKind.HEDGE)
    hedge = seal(offer, T_OFFER, submitter.identity.peer, submitter.signer.sign)
    frame, at_ms = messages.pack(replace(place, offer=hedge.wire)), mesh.now_ms
    mesh.feed(holder, ev.FrameIn(submitter.identity.peer, Lane.CONTROL, frame))
    assert role.tokens == idle - taken and not role.queued
    assert frames_since(mesh, at_ms)["refuse"] == 1 - taken


def token_of(site: Site, mesh: Mesh, seq: int, **more: Any) -> bytes:
    identity = site.identity
    token = Token(
        1,
        identity.network,
        identity.peer,
        seq,
        "token",
        b"simclass",
        100_000,
        mesh.now().unix_ms + 20_000,
        0,
        7_200,
        0,
    )
    return seal(replace(token, **more), T_TOKEN, identity.peer, site.signer.sign).wire


@pytest.mark.parametrize(
    ("counter", "more"),
    [
        ("tokens_refused_expired", {"not_after_ms": 1}),
        ("tokens_refused_expired", {"not_after_ms": 1 << 60}),  # or its clock is a day ahead
        ("tokens_refused_other_network", {"network": NetworkId(b"another0")}),
        ("tokens_refused_not_yours", {"peer": Peer(bytes(38))}),
    ],
)
def test_a_bad_token_is_refused_with_a_reason_and_counted(
    counter: str, more: dict[str, Any]
) -> None:
    mesh = settled(3)
    holder = rendezvous_of(mesh)
    other = next(car for car in cars_of(mesh) if car is not holder)
    before = node_of(holder).rendezvous.tokens
    wire = token_of(other, mesh, 1_000, **more)
    mesh.feed(holder, ev.FrameIn(other.identity.peer, Lane.CONTROL, wire))
    assert node_of(holder).counters[counter] == 1
    assert node_of(holder).rendezvous.tokens == before


def test_a_flood_of_tokens_of_one_car_is_bounded_and_the_others_keep_theirs() -> None:
    mesh = settled(4)
    holder = rendezvous_of(mesh)
    flooder = next(car for car in cars_of(mesh) if car is not holder)
    before = node_of(holder).rendezvous.tokens
    for seq in range(1_000, 1_200):
        wire = token_of(flooder, mesh, seq)
        mesh.feed(holder, ev.FrameIn(flooder.identity.peer, Lane.CONTROL, wire))
    assert node_of(holder).rendezvous.tokens == before, "as many as it has slots"
    # What it invented its own machine does not honour: the submitter still gets its units.
    submit(mesh, order(40, policy="tokens"))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    assert_whole(mesh, 40)


def test_elections_split_a_cell_by_its_size_and_change_with_the_epoch() -> None:
    assert shape(4, 250) == (1, 1)
    assert shape(100, 250) == (1, 2)
    assert shape(1_000, 250) == (1, 4)
    assert shape(1_001, 250) == (2, 3)
    peers = [Candidate(Peer(bytes([n]) * 38)) for n in range(60)]
    epochs = [elect("c", epoch, peers, 1_000, 250) for epoch in range(200)]
    assert all(len(ranks) == 4 == len(set(ranks)) for (ranks,) in epochs)
    firsts = Counter(ranks[0] for (ranks,) in epochs)
    assert len(firsts) > 45 and max(firsts.values()) < 20, "hashing favours nobody"
    assert elect("c", 1, peers, 1_000, 250) == elect("c", 1, peers[::-1], 1_000, 250)


def test_what_waits_at_one_gets_what_the_other_of_its_cell_has() -> None:
    """One has a line, the other all the tokens, which came after the first had run dry."""
    mesh = mesh_of(40, 5)
    mesh.rest(3_000)
    node = node_of(cars_of(mesh)[0])
    ((one, two),) = node.provider.tokens._roster.posts("cell", epoch_of(mesh.now().unix_ms))
    dry, rich = mesh.by_peer[one], mesh.by_peer[two]
    assert node_of(rich).rendezvous.tokens >= 10
    for car in list(node_of(dry).rendezvous.depositors()):
        node_of(dry).rendezvous.peer_down(car)
    mesh.rest(1_000)  # the rich one has told what it has, and tells it again in two seconds
    node_of(dry).rendezvous._tallies.forget(two)
    mesh.cut("submitter", rich.name)
    submit(mesh, order(4, policy="tokens", lease_units_max=1))
    role = node_of(rich).rendezvous
    role._spare = lambda peer: 0  # type: ignore[method-assign]
    assert mesh.run(lambda: node_of(dry).rendezvous.queued > 0, ms_max=100)
    mesh.rest(100)  # it has asked, and there were none
    del role._spare
    assert mesh.run(lambda: ended(mesh), ms_max=700)


def test_a_token_that_nobody_spends_is_soon_renewed_at_the_other() -> None:
    mesh = mesh_of(40, 5)
    mesh.rest(3_000)
    before = {car.name: node_of(car).provider.tokens.holders() for car in cars_of(mesh)}
    mesh.rest(4_000)
    after = {car.name: node_of(car).provider.tokens.holders() for car in cars_of(mesh)}
    assert all(len(there) == 1 and there != before[name] for name, there in after.items())
    renewed = counted(mesh, "tokens_renewed")
    mesh.rest(60_000)
    assert counted(mesh, "tokens_renewed") - renewed <= 40 * 5, "8, 16, 20 and 20 s"


def test_who_has_it_now_may_keep_it_and_is_not_waited_for() -> None:
    mesh = settled(3)
    holder, submitter = rendezvous_of(mesh), mesh.sites["submitter"]
    holder.lie = lambda effect: []
    submit(mesh, order(1, policy="tokens"))
    assert mesh.run(lambda: bool(job_of(mesh).live))
    (task,) = job_of(mesh).tasks.values()
    said = messages.pack(messages.Queued(task.task_id, 0, 0, 40))
    mesh.feed(submitter, ev.FrameIn(holder.identity.peer, Lane.CONTROL, said))
    assert mesh.run(lambda: ended(mesh), ms_max=1_000), "three seconds for one that waits in line"


def stuck(mesh: Mesh) -> Placement:
    """One that waits at its rendezvous, where no token fits; its requester says nothing more."""
    role = node_of(rendezvous_of(mesh)).rendezvous
    role._fits = lambda placement, held: False  # type: ignore[method-assign]
    submit(mesh, order(1, policy="tokens"))
    assert mesh.run(lambda: role.queued > 0)
    mesh.sites["submitter"].lie = lambda effect: []
    return next(p for line in role._lines.values() for p in line)


def test_a_line_that_grows_each_moment_is_looked_at_all_the_same() -> None:
    mesh = settled(4)
    first = stuck(mesh)
    role = node_of(rendezvous_of(mesh)).rendezvous
    for number in range(100):
        mesh.rest(15)
        role._out.now = mesh.now()
        again = replace(first, key=(TaskId(number.to_bytes(16, "big")), 0), stage=Stage.SOUGHT)
        role._placed[again.key] = again
        role._queue(again)
        if len(role._lines[first.submitter]) > 40:
            role.on_cancel(again.origin, *again.key)
    assert mesh.now_ms - first.said_mono_ms < 1_400, "each second"


def test_who_says_again_and_again_that_it_has_tokens_holds_up_no_line() -> None:
    mesh = settled(4)
    first, holder = stuck(mesh), rendezvous_of(mesh)
    liar = next(car for car in cars_of(mesh) if car is not holder)
    first.refused_by.add(liar.identity.peer)
    node_of(holder).book.drop(liar.identity.peer)
    tally = messages.pack(messages.Tally("elsewhere", 1 << 16, 0))
    for _ in range(20):
        mesh.feed(holder, ev.FrameIn(liar.identity.peer, Lane.CONTROL, tally))
        mesh.rest(100)
    assert mesh.now_ms - first.said_mono_ms < 1_400
    assert node_of(holder).rendezvous._tallies._known[liar.identity.peer].tokens == BELIEVED_MAX


def test_what_neighbours_refuse_goes_on_waiting() -> None:
    mesh = settled(8)
    first, holder = stuck(mesh), rendezvous_of(mesh)
    tally = messages.pack(messages.Tally("elsewhere", 1, 0))
    role, at_ms = node_of(holder).rendezvous, mesh.now_ms
    for car in [car for car in cars_of(mesh) if car is not holder]:
        node_of(holder).book.drop(car.identity.peer)
        mesh.feed(holder, ev.FrameIn(car.identity.peer, Lane.CONTROL, tally))
    mesh.rest(1_000)
    assert frames_since(mesh, at_ms)["refuse"] >= 5, "each has none"
    assert first in role._lines[first.submitter] and first.stage is Stage.QUEUED


def test_what_is_lent_waits_in_no_line() -> None:
    mesh = settled(2)
    role = node_of(rendezvous_of(mesh)).rendezvous
    sent_on = messages.pack(replace(waiting_place(mesh), hops=1, wait_ms=10_000))
    submitter = mesh.sites["submitter"].identity.peer
    role.peer_down(submitter)
    mesh.feed(rendezvous_of(mesh), ev.FrameIn(submitter, Lane.CONTROL, sent_on))
    assert role.queued == 0 and role.tokens == 2


def test_a_renewed_token_of_a_car_with_several_slots_is_not_held_twice() -> None:
    mesh = Mesh(3)
    mesh.add("submitter", REQUEST)
    for number in range(3):
        mesh.add(f"car-{number}", PROVIDE, slots=4)
    mesh.connect_all()
    mesh.rest(3_000)
    car = next(car for car in cars_of(mesh) if car is not rendezvous_of(mesh))
    tokens = node_of(car).provider.tokens
    free = tokens._slots_free
    tokens._slots_free = lambda: min(1, free())
    tokens.changed()
    mesh.rest(6_000)
    assert counted(mesh, "tokens_renewed") > 0 and len(tokens) == 1
    role = node_of(rendezvous_of(mesh)).rendezvous
    assert len(role._by_car[car.identity.peer]) == 1
