"""The owner's papers in force: another policy, another consent, a withdrawal, their history.

    change  -> signed papers -> install (nobody runs) | control socket -> accept (the node runs)
    withdraw -> the consent again with `withdrawn_ms`, or, without the account's key, none at all
    fleet   -> what the consent's operator has signed narrows the policy: `protocol.narrowing`

Between the CLI and `firstrun`. Taking consent back never needs the account's key: whoever holds the
car may stop it; that the account did so is what the signed withdrawal adds.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import LocalResource, MeshError, UsageError, VerificationFailed
from ..ledger.load import signed_objects
from ..ledger.lock import hold_home
from ..protocol.narrowing import check_fleet, policy_in_effect
from ..protocol.papers import T_CONSENT, T_MANDATE, T_POLICY, Consent, Mandate, Policy
from ..protocol.sealed import Sealed, unseal
from . import armor, keystore
from .firstrun import (
    CONSENT_FILE,
    FLEET_FILE,
    MANDATE_FILE,
    POLICY_FILE,
    account_of,
    fleet_of,
    install,
    policy_for,
    read_network,
)
from .founding import (
    NOTICE_DIGEST,
    ConsentTerms,
    PolicyTerms,
    check_consent,
    check_mandate,
    draft_consent,
    draft_policy,
    sign_as,
)

WITHDRAWAL_MS = 5_000
"""From the owner's word to the time that a withdrawal names: what was in hand ends within a slice
and is receipted, and no receipt of it may look as if it came afterwards."""
WITHDRAWN_FILE = "consent.withdrawn.mesh"


class NoConsent(UsageError):
    """The owner of this car has given no consent."""


@dataclass(frozen=True, slots=True)
class InForce:
    """What stands in the home: sealed, and read."""

    policy_sealed: Sealed
    policy: Policy
    consent_sealed: Sealed
    consent: Consent
    fleet_sealed: Sealed | None
    in_effect: Policy  # as far as the fleet goes with it


def in_force(home: Path, *, fleet: bool = True) -> InForce | None:
    """The papers of this car, withdrawn or not; None if its owner has never signed any. Without
    `fleet` whatever its operator says is left aside: what the owner signs needs none of it."""
    if not (home / POLICY_FILE).exists() or not (home / CONSENT_FILE).exists():
        return None
    account, _ = account_of(home)
    consent_sealed = armor.read_one(home / CONSENT_FILE, T_CONSENT)
    policy_sealed = policy_for(home, consent_sealed)
    consent, policy = check_consent(
        consent_sealed, policy_sealed, read_network(home).ident, account
    )
    narrower = fleet_of(home, consent) if fleet and consent.withdrawn_ms is None else None
    in_effect = policy_in_effect(policy_sealed.wire, None if narrower is None else narrower.wire)
    return InForce(policy_sealed, policy, consent_sealed, consent, narrower, in_effect)


def change(
    home: Path,
    policy: PolicyTerms | Policy,
    consent: ConsentTerms,
    *,
    vehicle: bytes,
    now_ms: int,
) -> tuple[Sealed, Sealed]:
    """Policy and consent signed by the account's key, which must be here; nothing is installed."""
    account, signer = account_of(home)
    if signer is None:
        raise UsageError(
            "the account's key is not on this machine: `meshnode consent request --policy FILE`, "
            "`mesh account sign` there, `meshnode consent install` here"
        )
    network = read_network(home).ident
    if isinstance(policy, PolicyTerms):
        policy = draft_policy(account, network, policy)
    policy_sealed, replaced = sign_as(signer, policy), None
    with suppress(MeshError):  # what is damaged is replaced by nothing that names it
        before = in_force(home, fleet=False)
        replaced = None if before is None else before.consent_sealed.digest
    draft = draft_consent(
        account, network, policy_sealed.digest, vehicle, now_ms, consent, replaced
    )
    return policy_sealed, sign_as(signer, draft)


def withdrawal(home: Path, now_ms: int) -> Sealed | None:
    """The account's signed word that its consent has ended; None without the account's key."""
    found = in_force(home, fleet=False)
    if found is None or found.consent.withdrawn_ms is not None:
        raise NoConsent("there is no consent to withdraw: this car computes nothing")
    _, signer = account_of(home)
    if signer is None:
        return None
    # The same again, naming the one that it ends: a verifier that has both knows until when the
    # first one held.
    ended = replace(
        found.consent,
        replaces=found.consent_sealed.digest,
        withdrawn_ms=max(now_ms, found.consent.given_ms) + WITHDRAWAL_MS,
    )
    return sign_as(signer, ended)


def ends_consent(papers: tuple[bytes, ...]) -> bool:
    """Whether they take the consent back: none at all, or one that says so. Not checked: whoever
    brings something wrong has the car stopped, which its own user may do anyway."""
    if not papers:
        return True
    with suppress(MeshError):
        return any(
            sealed.open(Consent, T_CONSENT).withdrawn_ms is not None
            for sealed in map(unseal, papers)
            if sealed.typ == T_CONSENT
        )
    return False


def accept(home: Path, papers: tuple[bytes, ...], now_ms: int) -> InForce | None:
    """Check sealed papers (none: a withdrawal without the account's key) against this home and put
    them in its files; what is in force then. Its caller stores them in the ledger. A mandate among
    them is found where `renew_mandate` looks."""
    if not papers:
        put_away(home)
        return None
    sealed = tuple(map(unseal, papers))
    for each in sealed:
        if each.typ == T_MANDATE:
            node = keystore.load(home, keystore.NODE)
            mandate = each.open(Mandate, T_MANDATE)
            check_mandate(each, read_network(home).ident, node.peer, mandate.roles, now_ms)
            if each.kid != account_of(home)[0]:
                raise VerificationFailed("the mandate is another account's")
            armor.write_file(home / MANDATE_FILE, [armor.block_of(each)], mode=0o600)
    rest = tuple(each for each in sealed if each.typ != T_MANDATE)
    if rest:
        consent, policy = _sorted(home, rest)
        given = consent.open(Consent, T_CONSENT)
        if given.withdrawn_ms is None:
            fleet_of(home, given)  # what does not hold is told before anything is written
        _write(home, consent, policy)
    return in_force(home)


def accept_fleet(home: Path, fleet: bytes | None) -> InForce | None:
    """As `accept`, for the operator's terms or their end."""
    if fleet is None:
        drop_fleet(home)
    else:
        sealed = unseal(fleet)
        check_fleet(sealed, _consent_of(home))
        armor.write_file(home / FLEET_FILE, [armor.block_of(sealed)], mode=0o600)
    return in_force(home)


def install_fleet(home: Path, fleet: Sealed | None) -> None:
    """As `accept_fleet`, where no node runs: into the ledger, then into force."""
    if fleet is None:
        with hold_home(home):
            drop_fleet(home)
        return
    check_fleet(fleet, _consent_of(home))
    install(home, (fleet,))


def _consent_of(home: Path) -> Consent:
    """Whatever stands in its fleet's file, which may be damaged."""
    if not (home / CONSENT_FILE).exists():
        raise NoConsent("this car gives no consent that a fleet could narrow")
    return armor.read_one(home / CONSENT_FILE, T_CONSENT).open(Consent, T_CONSENT)


def drop_fleet(home: Path) -> None:
    try:
        (home / FLEET_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise LocalResource(f"{home / FLEET_FILE}: {error.strerror}") from None


def install_terms(home: Path, papers: tuple[Sealed, ...]) -> None:
    """As `accept`, where no node runs: into the ledger, then into force."""
    if not papers:
        put_away(home)
        return
    consent, policy = _sorted(home, papers)
    given = consent.open(Consent, T_CONSENT)
    if given.withdrawn_ms is None:
        fleet_of(home, given)
    try:
        install(home, tuple(each for each in (policy, consent) if each is not None))
    except LocalResource:
        if ends_consent((consent.wire,)):
            put_away(home)  # a full disk: renaming needs no room
        raise


def put_away(home: Path) -> None:
    """The consent out of the node's reach: it computes nothing until another is installed."""
    try:
        os.replace(home / CONSENT_FILE, home / WITHDRAWN_FILE)
    except FileNotFoundError:
        return  # somebody was faster
    except OSError as error:
        raise LocalResource(f"{home / CONSENT_FILE}: {error.strerror}") from None


def _sorted(home: Path, papers: tuple[Sealed, ...]) -> tuple[Sealed, Sealed | None]:
    """The consent and the policy among them; the policy in force goes on where none comes."""
    found = {sealed.typ: sealed for sealed in papers}
    consent, policy = found.get(T_CONSENT), found.get(T_POLICY)
    if consent is None or len(found) != len(papers) or found.keys() - {T_CONSENT, T_POLICY}:
        raise UsageError("a consent, and perhaps its policy, was expected")
    account, _ = account_of(home)
    policy_in_force = policy or policy_for(home, consent)
    checked, _ = check_consent(consent, policy_in_force, read_network(home).ident, account)
    ended = {one.consent.replaces for one in history(home) if one.consent.withdrawn_ms is not None}
    if checked.withdrawn_ms is None and consent.digest in ended:
        raise VerificationFailed("this consent has been withdrawn; it takes a new one")
    if checked.notice != NOTICE_DIGEST and checked.withdrawn_ms is None:
        raise VerificationFailed("the consent was given to another notice than this version's")
    return consent, policy


def _write(home: Path, consent: Sealed, policy: Sealed | None) -> None:
    """The policy first: a consent to a policy that is not there holds for nothing."""
    if policy is not None:
        armor.write_file(home / POLICY_FILE, [armor.block_of(policy)], mode=0o600)
    armor.write_file(home / CONSENT_FILE, [armor.block_of(consent)], mode=0o600)


@dataclass(frozen=True, slots=True)
class Past:
    """One consent of the ledger, the oldest first, and the policy that it was given to."""

    digest: bytes
    consent: Consent
    policy: Policy | None


def history(home: Path) -> list[Past]:
    """Every consent that this home's ledger holds."""
    policies: dict[bytes, Policy] = {}
    given: list[tuple[bytes, Consent]] = []
    account, _ = account_of(home)
    for stored in signed_objects(home, T_POLICY, T_CONSENT):
        sealed = unseal(stored.sealed)
        if sealed.kid != account:
            continue
        if sealed.typ == T_POLICY:
            policies[sealed.digest] = sealed.open(Policy, T_POLICY)
        else:
            given.append((sealed.digest, sealed.open(Consent, T_CONSENT)))
    return [Past(digest, consent, policies.get(consent.policy)) for digest, consent in given]
