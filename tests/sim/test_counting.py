"""Counted signatures decide what real ones do: two runs that differ in nothing else."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from meshnode.protocol import effects as fx
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.sealed import unseal
from testnet.sim.counting import CountingSigner, SmallRandom, counted, verify
from testnet.sim.faults import PLANS, Weather
from testnet.sim.mesh import PROVIDE, REQUEST, Mesh, Site
from testnet.sim.site import Keys, account_keys, papers_of
from tests.sim.test_mesh import ended, order, submit

SIGNATURE = re.compile("5840(?=([0-9a-f]{128}))")  # 64 bytes, as CBOR begins them


def plain(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if is_dataclass(value):
        value = [type(value).__name__, *(getattr(value, field.name) for field in fields(value))]
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(plain, value))}]"
    return repr(value)


class Hexed(Mesh):
    """Keeps its effects with all bytes in hex."""

    def __init__(self, seed: int, **more: Any) -> None:
        super().__init__(seed, **more)
        self.said: list[str] = []

    def _do(self, site: Site, effect: fx.Effect) -> None:
        self.said.append(f"{self.now_us} {site.name} {plain(effect)}")
        super()._do(site, effect)


class Signing:
    """Remembers every signature by the order in which it was made."""

    def __init__(self, made: dict[bytes, int], keys: Keys) -> None:
        self.made, self.keys = made, keys
        self.peer, self.account = keys.peer, keys.account

    def sign(self, message: bytes, /) -> bytes:
        signature = self.keys.sign(message)
        self.made.setdefault(signature, len(self.made))
        return signature


def story(real: bool, policy: str) -> list[str]:
    """Every effect of a small mesh in bad weather, each signature replaced by its number."""
    made: dict[bytes, int] = {}

    def keys_of(seed: bytes) -> Signing:
        keys = KeySigner(seed)
        return Signing(made, keys if real else CountingSigner(seed, bytes(keys.account)))

    mesh = Hexed(9, keys_of=keys_of)
    mesh.weather = Weather(PLANS["storm"], 9)
    mesh.add("submitter", REQUEST)
    for number in range(3):
        mesh.add(f"car-{number}", PROVIDE)
    mesh.connect_all()
    submit(mesh, order(60, policy=policy))
    mesh.at(150, lambda: mesh.crash("car-1"))
    assert mesh.run(lambda: ended(mesh))
    mesh.rest(2_000)
    numbers = {signature.hex(): number for signature, number in made.items()}
    return [numbered(line, numbers) for line in mesh.said]


def numbered(line: str, numbers: dict[str, int]) -> str:
    for found in SIGNATURE.findall(line):
        if found in numbers:
            line = line.replace(found, f"#{numbers[found]}")
    return line


@pytest.mark.parametrize("policy", ["adverts", "gossip"])
def test_the_trace_is_the_same_apart_from_signatures(policy: str) -> None:
    real = story(True, policy)
    with counted():
        assert story(False, policy) == real
    assert any("#" in line for line in real)


def test_a_counted_signature_holds_for_its_key_and_message_alone() -> None:
    one, other = CountingSigner(b"1"), CountingSigner(b"2")
    signature = one.sign(b"m")
    assert len(signature) == 64 and verify(one.peer, b"m", signature)
    assert verify(one.account, b"m", signature)
    assert not verify(other.peer, b"m", signature) and not verify(one.peer, b"n", signature)


def test_real_checks_are_back_afterwards() -> None:
    real, fake = KeySigner(bytes(32)), CountingSigner(bytes(32))
    policy: dict[str, Any] = {}
    with counted():
        policy["fake"] = papers_of(account_keys(1, CountingSigner)).policy
        unseal(policy["fake"])
    with pytest.raises(Exception, match="does not hold"):
        unseal(policy["fake"])
    unseal(papers_of(account_keys(1)).policy)
    assert real.peer != fake.peer


def test_small_random_is_a_stream_of_its_seed() -> None:
    one, again, other = SmallRandom("1"), SmallRandom("1"), SmallRandom("2")
    assert one.randbytes(16) == again.randbytes(16) != other.randbytes(16)
    draws = [one.random() for _ in range(2_000)]
    assert all(0 <= draw < 1 for draw in draws) and 0.45 < sum(draws) / 2_000 < 0.55
    assert sorted(one.sample(range(10), 10)) == list(range(10))
    assert {one.randrange(3) for _ in range(100)} == {0, 1, 2}
