"""Layers as bits and names; a car whose workers lack some its owner asks for takes no work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.protocol import events as ev
from meshnode.protocol import sandbox
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.outbox import Identity
from meshnode.protocol.papers import T_CONSENT, T_POLICY, Consent, Policy
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sandbox import Layer
from meshnode.protocol.sealed import seal, unseal
from meshnode.protocol.view import look
from tests.sim.test_mesh import ended, job_of, mesh_of, order, submit


def test_layers_are_single_bits_that_the_wire_has_room_for() -> None:
    values = [int(layer) for layer in Layer]
    assert all(value.bit_count() == 1 for value in values)
    assert sum(values) == int(sandbox.ALL) < 1 << 16


def test_names_and_bits_say_the_same() -> None:
    assert sandbox.of_names("files, TCP,") == Layer.FILES | Layer.TCP
    assert sandbox.of_names("") == Layer(0)
    assert sandbox.names(0) == "none"
    for layers in (Layer.FILES, Layer.FILES | Layer.MEMORY, sandbox.ALL, sandbox.LEAST):
        assert sandbox.of_names(sandbox.names(layers)) == layers
    assert sandbox.listed(Layer.FILES | 1 << 15) == ["files", "bits 0x8000"]
    with pytest.raises(ValueError, match="fires is no sandbox layer; there are no_new_privs, "):
        sandbox.of_names("fires")


def test_what_is_asked_for_and_unknown_is_missing() -> None:
    assert sandbox.missing(Layer.FILES, Layer.FILES | Layer.TCP) == 0
    assert sandbox.missing(Layer.FILES | Layer.TCP, Layer.FILES) == Layer.TCP
    assert int(sandbox.missing(1 << 15, sandbox.ALL)) == 1 << 15


def with_least(identity: Identity, account_key: KeySigner, least: int) -> Identity:
    """The same papers, and a policy that asks for layers."""
    assert identity.policy is not None and identity.consent is not None
    policy = replace(unseal(identity.policy).open(Policy, T_POLICY), sandbox_least=least)
    policy_sealed = seal(policy, T_POLICY, identity.account, account_key.sign)
    consent = unseal(identity.consent).open(Consent, T_CONSENT)
    consent = replace(consent, policy=policy_sealed.digest)
    consent_sealed = seal(consent, T_CONSENT, identity.account, account_key.sign)
    return replace(identity, policy=policy_sealed.wire, consent=consent_sealed.wire)


@pytest.mark.parametrize(
    ("least", "layers", "reason"),
    [
        (0, 0, Reason.OK),
        (int(Layer.FILES), int(Layer.FILES | Layer.TCP), Reason.OK),
        (int(Layer.FILES | Layer.TCP), int(Layer.FILES), Reason.SANDBOX),
        (1 << 15, int(sandbox.ALL), Reason.SANDBOX),
    ],
)
def test_a_car_below_its_owners_least_takes_no_work(
    least: int, layers: int, reason: Reason
) -> None:
    mesh = mesh_of(1, seed=3)
    car = mesh.sites["car-0"]
    number = 2  # the second that `mesh_of` made an identity for
    account_key = KeySigner((number + (1 << 60)).to_bytes(32, "big"))
    car.identity = with_least(car.identity, account_key, least)
    mesh.crash("car-0")
    mesh.boot("car-0")
    worker = ev.WorkerClass("cpu", "sim", 4_096, 100_000, b"simclass")
    mesh.feed(car, ev.WorkerClasses((worker,), "0.0", (9, 10), layers, car.slots))
    mesh.connect_all()
    submit(mesh, order(4))
    done = mesh.run(lambda: ended(mesh))
    assert car.node is not None
    view = look(car.node, mesh.now())
    assert (view.may_run, view.sandbox_layers, view.sandbox_least) == (reason, layers, least)
    job = job_of(mesh)
    if reason is Reason.OK:
        assert done and job.reason is Reason.DONE
    else:
        assert job.reason is reason  # the submitter hears why
