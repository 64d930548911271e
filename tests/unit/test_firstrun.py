"""First run: real objects, kept, read back, renewed; and what is refused with which exit code."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from meshnode.errors import LocalResource, MeshError, Refused, UsageError, VerificationFailed
from meshnode.ledger.load import signed_objects
from meshnode.ledger.lock import hold_home
from meshnode.node import armor, firstrun, founding, keystore
from meshnode.protocol.codec import encode
from meshnode.protocol.identity import KeySigner
from meshnode.protocol.papers import (
    T_CONSENT,
    T_GENESIS,
    T_MANDATE,
    T_POLICY,
    Consent,
    Mandate,
    NetworkKind,
    Policy,
    Role,
    Submitters,
)
from meshnode.protocol.rule import encode_map
from meshnode.protocol.sealed import seal, unseal
from meshnode.protocol.types import Digest

NOW_MS = 1_800_000_000_000
DAY_MS = founding.DAY_MS
MAKER = KeySigner(bytes(range(32)))
HOME_NET = founding.make_genesis(MAKER, "garage", NetworkKind.HOME, created_ms=NOW_MS)


def car_home(home: Path, now_ms: int = NOW_MS) -> firstrun.Standing:
    return firstrun.init_car(home, HOME_NET, now_ms=now_ms, notice_accepted=founding.NOTICE_DIGEST)


# ---- genesis


def test_a_genesis_file_reads_back_and_names_the_network(tmp_path: Path) -> None:
    path = tmp_path / "garage.mesh"
    founding.save_genesis(path, HOME_NET)
    assert founding.load_genesis(path).ident == HOME_NET.ident == HOME_NET.sealed.digest[:8]
    assert path.read_text().startswith(f"# network garage (home), id {HOME_NET.ident.hex()}\n")


def test_a_test_genesis_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "t.mesh"
    founding.save_genesis(path, founding.seeded_genesis(7))
    with pytest.raises(Refused, match="--allow-test"):
        founding.load_genesis(path)
    assert founding.load_genesis(path, allow_test=True).is_test


@pytest.mark.parametrize("place", range(0, 270, 7))
def test_a_touched_genesis_file_is_refused(tmp_path: Path, place: int) -> None:
    path = tmp_path / "g.mesh"
    founding.save_genesis(path, HOME_NET)
    header, body = path.read_text().splitlines()[1:]
    wrong = body[:place] + ("A" if body[place] != "A" else "B") + body[place + 1 :]
    path.write_text(f"{header}\n{wrong}\n")
    with pytest.raises((VerificationFailed, UsageError)) as caught:
        founding.load_genesis(path)
    assert "\n" not in str(caught.value)


def test_a_genesis_signed_by_another_key_is_refused() -> None:
    other = KeySigner(bytes(32))
    forged = seal(HOME_NET.genesis, T_GENESIS, other.account, other.sign)
    with pytest.raises(VerificationFailed, match="maker"):
        founding.read_genesis(forged)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\n\xff", b"a sha256:00\n!!", b"a\nb\nc"])
def test_a_file_of_something_else_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.mesh"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no file of mesh objects"):
        founding.load_genesis(path)
    with pytest.raises(UsageError, match="there is no file"):
        founding.load_genesis(tmp_path / "none")


# ---- homes


def test_a_car_home_has_real_objects_in_file_and_ledger(tmp_path: Path) -> None:
    home = tmp_path / "car"
    made = car_home(home)
    assert made.car and made.account_here and made.mandate_until_ms == NOW_MS + 7 * DAY_MS
    identity = firstrun.load_identity(home, cell="home", now_ms=NOW_MS)
    assert identity.network == HOME_NET.ident and identity.roles == Role.PROVIDE | Role.REQUEST
    assert identity.consent is not None and identity.policy is not None
    consent = unseal(identity.consent).open(Consent, T_CONSENT)
    assert consent.policy == unseal(identity.policy).digest
    assert consent.notice == founding.NOTICE_DIGEST and any(consent.vehicle)
    assert unseal(identity.policy).open(Policy, T_POLICY).submitters.mode is Submitters.FLEET
    assert identity.artifacts
    stored = {obj.typ: obj.sealed for obj in signed_objects(home)}
    assert stored[T_CONSENT] == identity.consent and stored[T_MANDATE] == identity.mandate
    for name in (keystore.NODE, keystore.ACCOUNT):
        assert (home / name).stat().st_mode & 0o777 == 0o600


def test_a_submitter_home_has_no_consent(tmp_path: Path) -> None:
    made = firstrun.init_submitter(tmp_path / "me", HOME_NET, now_ms=NOW_MS)
    assert not made.car
    identity = firstrun.load_identity(tmp_path / "me", cell="home", now_ms=NOW_MS)
    assert identity.roles == Role.REQUEST and identity.consent is None


def test_a_car_without_a_yes_computes_nothing(tmp_path: Path) -> None:
    firstrun.init_car(tmp_path / "car", HOME_NET, now_ms=NOW_MS, notice_accepted=None)
    identity = firstrun.load_identity(tmp_path / "car", cell="home", now_ms=NOW_MS)
    assert identity.consent is None and identity.roles & Role.PROVIDE
    with pytest.raises(Refused, match="another notice"):
        firstrun.init_car(
            tmp_path / "car",
            HOME_NET,
            now_ms=NOW_MS,
            notice_accepted=Digest(bytes(32)),
        )


def test_a_second_init_keeps_keys_and_replaces_the_consent(tmp_path: Path) -> None:
    first = car_home(tmp_path / "car")
    before = armor.read_one(tmp_path / "car" / "consent.mesh", T_CONSENT)
    again = car_home(tmp_path / "car", NOW_MS + DAY_MS)
    assert (again.node.peer, again.account) == (first.node.peer, first.account)
    after = armor.read_one(tmp_path / "car" / "consent.mesh", T_CONSENT).open(Consent, T_CONSENT)
    assert after.replaces == before.digest
    assert after.vehicle != before.open(Consent, T_CONSENT).vehicle
    assert sum(obj.typ == T_CONSENT for obj in signed_objects(tmp_path / "car")) == 2
    with pytest.raises(UsageError, match="belongs to the network garage"):
        firstrun.init_submitter(tmp_path / "car", founding.seeded_genesis(1), now_ms=NOW_MS)


def test_a_home_in_use_is_not_touched(tmp_path: Path) -> None:
    car_home(tmp_path / "car")
    with hold_home(tmp_path / "car"), pytest.raises(LocalResource, match="in use"):
        car_home(tmp_path / "car")


def test_a_mandate_is_renewed_below_two_days_and_only_with_the_account_key(tmp_path: Path) -> None:
    home = tmp_path / "car"
    car_home(home)
    early = firstrun.renew_mandate(home, NOW_MS + 4 * DAY_MS)
    assert early.open(Mandate, T_MANDATE).not_before_ms == NOW_MS
    late = firstrun.renew_mandate(home, NOW_MS + 6 * DAY_MS)
    assert late.open(Mandate, T_MANDATE).not_before_ms == NOW_MS + 6 * DAY_MS
    assert late.open(Mandate, T_MANDATE).roles == early.open(Mandate, T_MANDATE).roles
    account = keystore.load(home, keystore.ACCOUNT).account
    (home / keystore.ACCOUNT).unlink()
    (home / firstrun.ACCOUNT_FILE).write_text(account.hex())
    with pytest.raises(Refused, match="has run out"):
        firstrun.renew_mandate(home, NOW_MS + 20 * DAY_MS)


@pytest.mark.parametrize("file", ["consent.mesh", "policy.mesh"])
@pytest.mark.parametrize("content", ["another car's", "garbage"])
def test_with_papers_that_do_not_hold_a_car_joins_and_computes_nothing(
    tmp_path: Path, file: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of a change that a crash cut in two must not keep the owner out of the node."""
    car_home(tmp_path / "a")
    car_home(tmp_path / "b")
    whole = firstrun.load_identity(tmp_path / "a", cell="home", now_ms=NOW_MS)
    assert whole.consent is not None and whole.policy is not None
    other = (tmp_path / "b" / file).read_text()
    (tmp_path / "a" / file).write_text(other if content == "another car's" else content)
    found = firstrun.load_identity(tmp_path / "a", cell="home", now_ms=NOW_MS)
    assert (found.consent, found.policy) == (None, None)
    assert "no consent holds" in caplog.text


def test_damaged_mandates_and_missing_keys_stop_the_node(tmp_path: Path) -> None:
    car_home(tmp_path / "a")
    car_home(tmp_path / "b")
    mandate = tmp_path / "a" / "mandate.mesh"
    mandate.write_bytes((tmp_path / "b" / "mandate.mesh").read_bytes())
    with pytest.raises(VerificationFailed, match="another node key"):
        firstrun.load_identity(tmp_path / "a", cell="home", now_ms=NOW_MS)
    (tmp_path / "b" / keystore.NODE).unlink()
    with pytest.raises(LocalResource, match=r"node\.key is missing"):
        firstrun.load_identity(tmp_path / "b", cell="home", now_ms=NOW_MS)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    car_home(tmp_path / "car")
    os.chmod(tmp_path / "car" / keystore.NODE, 0o644)
    with pytest.raises(LocalResource, match="chmod 600"):
        firstrun.load_identity(tmp_path / "car", cell="home", now_ms=NOW_MS)


# ---- an account that lives elsewhere


def test_request_sign_install(tmp_path: Path) -> None:
    account = KeySigner(bytes([5]) * 32)
    home = tmp_path / "car"
    made = firstrun.init_car(
        home,
        HOME_NET,
        now_ms=NOW_MS,
        notice_accepted=founding.NOTICE_DIGEST,
        account=account.account,
    )
    assert not made.account_here and made.mandate_until_ms is None
    assert not (home / keystore.ACCOUNT).exists()
    with pytest.raises(UsageError, match="has not signed"):
        firstrun.load_identity(home, cell="home", now_ms=NOW_MS)

    asked = tmp_path / "request.mesh"
    blocks = firstrun.consent_request(home, now_ms=NOW_MS, notice_accepted=founding.NOTICE_DIGEST)
    armor.write_file(asked, blocks)
    request = firstrun.read_request(armor.read_file(asked), str(asked))
    assert request.network.ident == HOME_NET.ident
    with pytest.raises(Refused, match="another account"):
        firstrun.account_sign(request, KeySigner(bytes([6]) * 32))
    answer = firstrun.account_sign(request, account)
    firstrun.install(home, firstrun.read_answer(home, answer, "answer", now_ms=NOW_MS).all())
    identity = firstrun.load_identity(home, cell="home", now_ms=NOW_MS)
    assert identity.account == account.account and identity.consent is not None

    other = tmp_path / "other"
    firstrun.init_car(other, HOME_NET, now_ms=NOW_MS, notice_accepted=None, account=account.account)
    with pytest.raises(VerificationFailed, match="names another node key"):
        firstrun.read_answer(other, answer, "answer", now_ms=NOW_MS)
    with pytest.raises(MeshError):
        firstrun.read_answer(home, blocks, "the request itself", now_ms=NOW_MS)


def test_a_request_for_anything_else_is_refused() -> None:
    genesis = armor.block_of(HOME_NET.sealed)
    receipt = armor.draft_of("mesh-receipt/1", b"\xa0")
    with pytest.raises(UsageError, match="which is refused"):
        firstrun.read_request([genesis, receipt], "request")
    account = KeySigner(bytes([5]) * 32)
    long = founding.draft_mandate(account.account, HOME_NET.ident, account.peer, 3, NOW_MS)
    long = dataclasses.replace(long, not_after_ms=NOW_MS + 8 * DAY_MS)
    payload = armor.draft_of(T_MANDATE, encode(encode_map(long)))
    with pytest.raises(Refused, match="seven days"):
        firstrun.read_request([genesis, payload], "request")


# ---- a testnet from its seed


def test_everything_of_a_testnet_follows_from_its_seed(tmp_path: Path) -> None:
    one = firstrun.init_seeded(tmp_path / "1", 7, "car-0", car=True, now_ms=NOW_MS)
    two = firstrun.init_seeded(tmp_path / "2", 7, "car-0", car=True, now_ms=NOW_MS)
    for name in ("genesis", "mandate", "policy", "consent"):
        assert (tmp_path / "1" / f"{name}.mesh").read_bytes() == (
            tmp_path / "2" / f"{name}.mesh"
        ).read_bytes()
    assert one.node.peer == two.node.peer
    other = firstrun.init_seeded(tmp_path / "3", 8, "car-0", car=True, now_ms=NOW_MS)
    assert other.network.ident != one.network.ident and other.node.peer != one.node.peer
    identity = firstrun.load_identity(tmp_path / "1", cell="testnet", now_ms=NOW_MS)
    assert identity.consent is not None
