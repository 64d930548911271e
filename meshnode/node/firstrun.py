"""First run and every run: make a home's real signed objects, and read back who this node is.

    init_submitter | init_car -> keys, genesis.mesh, mandate.mesh (policy.mesh, consent.mesh)
    load_identity             -> protocol Identity, with a fresh mandate if the account key is here

Files in the home are the objects in force (armor.py has the format); the ledger keeps every one
there ever was. An account key may live elsewhere: `consent_request` writes drafts, `account_sign`
answers them on the other machine, `read_answer` takes the answer.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import LocalResource, MeshError, Refused, UsageError, VerificationFailed
from ..ledger.load import signed_objects
from ..ledger.lock import hold_home
from ..ledger.store import Store
from ..protocol.codec import decode, encode
from ..protocol.effects import Persist
from ..protocol.events import Persisted
from ..protocol.identity import KeySigner, short
from ..protocol.narrowing import check_fleet
from ..protocol.outbox import Identity, row
from ..protocol.papers import (
    T_CONSENT,
    T_FLEET,
    T_GENESIS,
    T_MANDATE,
    T_POLICY,
    Consent,
    FleetTerms,
    Mandate,
    Policy,
    Role,
)
from ..protocol.rule import decode_map, encode_map
from ..protocol.sealed import Sealed, unseal
from ..protocol.types import MANDATE_MS_MAX, Account, Digest, Durability
from . import armor, keystore
from .founding import (
    CONSENT_MS_MAX,
    NOTICE_DIGEST,
    RENEW_BELOW_MS,
    ConsentTerms,
    Network,
    Papers,
    PolicyTerms,
    check_consent,
    check_mandate,
    draft_consent,
    draft_mandate,
    draft_policy,
    key_seed,
    load_genesis,
    papers_for,
    read_genesis,
    save_genesis,
    seeded_genesis,
    seeded_papers,
    sign_as,
)
from .home import make_home

log = logging.getLogger("meshnode.node")

GENESIS_FILE: Final = "genesis.mesh"
MANDATE_FILE: Final = "mandate.mesh"
POLICY_FILE: Final = "policy.mesh"
CONSENT_FILE: Final = "consent.mesh"
FLEET_FILE: Final = "fleet.mesh"  # the operator's terms
ACCOUNT_FILE: Final = "account"  # the public key in hex, where the account key is elsewhere
_FILE_OF: Final = {
    T_MANDATE: MANDATE_FILE,
    T_POLICY: POLICY_FILE,
    T_CONSENT: CONSENT_FILE,
    T_FLEET: FLEET_FILE,
}


@dataclass(frozen=True, slots=True)
class Standing:
    """What a home says of its node, for `status` and the init commands."""

    network: Network
    node: KeySigner
    account: Account
    account_here: bool
    car: bool
    mandate_until_ms: int | None
    consent_until_ms: int | None


# ---- making a home


def init_submitter(
    home: Path,
    network: Network,
    *,
    now_ms: int,
    account: Account | None = None,
    keys: tuple[bytes, bytes] | None = None,
) -> Standing:
    """Make (or renew) the home of a node that only asks. `keys` are node and account seed of a
    testnet; else they are made once and kept. With `account` the account key stays elsewhere."""
    node, signer = _prepare(home, network, account, keys)
    if signer is not None:
        papers = papers_for(signer, network.ident, node.peer, now_ms, policy_terms=None)
        install(home, papers.all())
    return standing(home)


def init_car(
    home: Path,
    network: Network,
    *,
    now_ms: int,
    notice_accepted: Digest | None,
    policy: PolicyTerms | None = None,
    consent: ConsentTerms | None = None,
    account: Account | None = None,
    keys: tuple[bytes, bytes] | None = None,
    vehicle: bytes | None = None,
) -> Standing:
    """Make (or renew) the home of a car. `notice_accepted` is the digest of the text that the
    person was shown and said yes to; without it the home is made and the car computes nothing."""
    if notice_accepted is not None and notice_accepted != NOTICE_DIGEST:
        raise Refused("another notice was accepted than the one of this version; read it again")
    node, signer = _prepare(home, network, account, keys)
    if signer is not None:
        terms = policy or PolicyTerms()
        if notice_accepted is None:
            mandate = draft_mandate(signer.account, network.ident, node.peer, 3, now_ms)
            install(home, (sign_as(signer, mandate),))
        else:
            papers = papers_for(
                signer,
                network.ident,
                node.peer,
                now_ms,
                policy_terms=terms,
                consent_terms=consent,
                vehicle=vehicle or secrets.token_bytes(16),
                replaces=_replaced(home),
            )
            install(home, papers.all())
    return standing(home)


def init_seeded(home: Path, seed: int, name: str, *, car: bool, now_ms: int) -> Standing:
    """The home of node `name` in the testnet of `seed`: the papers are those of `seeded_papers`."""
    network = seeded_genesis(seed)
    keys = (key_seed(seed, f"node/{name}"), key_seed(seed, f"account/{name}"))
    _prepare(home, network, None, keys)
    install(home, seeded_papers(seed, name, now_ms, car=car).all())
    return standing(home)


def _prepare(
    home: Path,
    network: Network,
    account: Account | None,
    keys: tuple[bytes, bytes] | None,
) -> tuple[KeySigner, KeySigner | None]:
    """Home, genesis and keys; None for an account key that lives elsewhere."""
    make_home(home)
    path = home / GENESIS_FILE
    if path.exists():
        known = load_genesis(path, allow_test=True)
        if known.ident != network.ident:
            raise UsageError(
                f"{home} belongs to the network {known.genesis.name} ({known.ident.hex()}); "
                "choose another --home for another network"
            )
    else:
        save_genesis(path, network)
    node = keystore.make(home, keystore.NODE, keys[0] if keys else None)
    if account is not None:
        own = keystore.find(home, keystore.ACCOUNT)
        if own is not None and own.account != account:
            raise UsageError(f"{home} has an account key of its own; --account names another")
        _write_account(home, account)
        return node, own
    if (home / ACCOUNT_FILE).exists():
        return node, keystore.find(home, keystore.ACCOUNT)
    return node, keystore.make(home, keystore.ACCOUNT, keys[1] if keys else None)


def _write_account(home: Path, account: Account) -> None:
    try:
        (home / ACCOUNT_FILE).write_text(account.hex() + "\n")
    except OSError as error:
        raise LocalResource(f"{home / ACCOUNT_FILE} cannot be written: {error.strerror}") from None


def install(home: Path, papers: tuple[Sealed, ...]) -> None:
    """Into the ledger first, durable, then into force."""
    with hold_home(home):
        store = Store(home)
        try:
            records = tuple(row(sealed) for sealed in papers)
            outcome = store.commit([Persist(0, records, Durability.POWER)])[0]
        finally:
            store.close()
    if not isinstance(outcome, Persisted):
        raise LocalResource(f"{home}: {outcome.reason.text}")
    for sealed in papers:
        armor.write_file(home / _FILE_OF[sealed.typ], [armor.block_of(sealed)], mode=0o600)


def _replaced(home: Path) -> Digest | None:
    path = home / CONSENT_FILE
    return armor.read_one(path, T_CONSENT).digest if path.exists() else None


# ---- reading it back


def read_network(home: Path) -> Network:
    """The network of a home. Whoever made the home has said yes to a test network then."""
    path = home / GENESIS_FILE
    if not path.exists():
        raise UsageError(f"{home} is no home of a node; make one with `mesh init`")
    return load_genesis(path, allow_test=True)


def account_of(home: Path) -> tuple[Account, KeySigner | None]:
    """The account, and its key if it is on this machine."""
    signer = keystore.find(home, keystore.ACCOUNT)
    if signer is not None:
        return signer.account, signer
    try:
        return Account(bytes.fromhex((home / ACCOUNT_FILE).read_text().strip())), None
    except (OSError, ValueError):
        raise UsageError(f"{home} has no account; run the init command again") from None


def standing(home: Path) -> Standing:
    network = read_network(home)
    account, signer = account_of(home)
    mandate_ms = consent_ms = None
    car = (home / CONSENT_FILE).exists()
    if (home / MANDATE_FILE).exists():
        mandate = armor.read_one(home / MANDATE_FILE, T_MANDATE).open(Mandate, T_MANDATE)
        mandate_ms = mandate.not_after_ms
        car = car or bool(mandate.roles & Role.PROVIDE)
    if (home / CONSENT_FILE).exists():
        consent = armor.read_one(home / CONSENT_FILE, T_CONSENT).open(Consent, T_CONSENT)
        consent_ms = consent.lapses_ms
    node = keystore.load(home, keystore.NODE)
    return Standing(network, node, account, signer is not None, car, mandate_ms, consent_ms)


def renew_mandate(home: Path, now_ms: int) -> Sealed:
    """The mandate in force, made anew if the account key is here and it soon runs out."""
    network = read_network(home)
    account, signer = account_of(home)
    node = keystore.load(home, keystore.NODE)
    path = home / MANDATE_FILE
    if not path.exists():
        raise UsageError(
            f"the account {account.hex()[:8]} has not signed for {home} yet: "
            "`meshnode consent request`, `mesh account sign`, `meshnode consent install`"
        )
    sealed = armor.read_one(path, T_MANDATE)
    mandate = sealed.open(Mandate, T_MANDATE)
    if signer is not None and mandate.not_after_ms - now_ms < RENEW_BELOW_MS:
        # The ledger gets it with the first agreement that cites it: the machine stores it then.
        fresh = draft_mandate(account, network.ident, node.peer, mandate.roles, now_ms)
        sealed = sign_as(signer, fresh)
        armor.write_file(path, [armor.block_of(sealed)], mode=0o600)
    check_mandate(sealed, network.ident, node.peer, mandate.roles, now_ms)
    return sealed


def load_identity(home: Path, *, cell: str, now_ms: int, agent: str = "meshnode") -> Identity:
    """Who this node is. A car whose consent does not hold gets None for it: it joins and computes
    nothing, and says why in its adverts."""
    from jaxkernels import registry

    network = read_network(home)
    account, _ = account_of(home)
    node = keystore.load(home, keystore.NODE)
    mandate = renew_mandate(home, now_ms)
    fleet = None
    try:
        consent, policy = _read_consent(home, network, account)
        if consent is not None:
            fleet = fleet_of(home, consent.open(Consent, T_CONSENT))
    except MeshError as error:
        # Half of a change that a crash has cut in two, or a file that somebody broke: the car joins
        # and computes nothing, and its owner can give consent again.
        log.warning("no consent holds: %s", error)
        consent = policy = None
    return Identity(
        network.ident,
        node.peer,
        account,
        cell,
        network.genesis.currency,
        mandate.open(Mandate, T_MANDATE).roles,
        mandate.wire,
        None if consent is None else consent.wire,
        None if policy is None else policy.wire,
        frozenset(Digest(artifact.digest) for artifact in registry.artifacts().values()),
        agent,
        None if fleet is None else fleet.wire,
    )


def _read_consent(
    home: Path, network: Network, account: Account
) -> tuple[Sealed | None, Sealed | None]:
    if not (home / CONSENT_FILE).exists() or not (home / POLICY_FILE).exists():
        return None, None
    consent = armor.read_one(home / CONSENT_FILE, T_CONSENT)
    policy = policy_for(home, consent)
    check_consent(consent, policy, network.ident, account)
    return consent, policy


def policy_for(home: Path, consent: Sealed) -> Sealed:
    """The policy that the consent was given to. A change writes the policy first, and then the
    consent: where a crash came between, the old policy is in the ledger, and both still hold."""
    policy = armor.read_one(home / POLICY_FILE, T_POLICY)
    wanted = consent.open(Consent, T_CONSENT).policy
    if policy.digest == wanted or policy.kid != consent.kid:
        return policy
    for stored in signed_objects(home, T_POLICY):
        if stored.digest == wanted:
            return unseal(stored.sealed)
    return policy


def fleet_of(home: Path, consent: Consent) -> Sealed | None:
    """The operator's terms for this car. Those of one whom the consent no longer names are not in
    force; a file that somebody broke is an error, because what it forbade is not known."""
    if not (home / FLEET_FILE).exists():
        return None
    try:
        sealed = armor.read_one(home / FLEET_FILE, T_FLEET)
        if sealed.open(FleetTerms, T_FLEET).account != consent.operator:
            return None
        check_fleet(sealed, consent)
    except MeshError as error:
        raise VerificationFailed(
            f"{error}; `meshnode fleet drop` takes the fleet's terms away"
        ) from None
    return sealed


# ---- an account key that lives elsewhere

_RULE_OF: Final[dict[str, type[Mandate] | type[Policy] | type[Consent]]] = {
    T_MANDATE: Mandate,
    T_POLICY: Policy,
    T_CONSENT: Consent,
}


def consent_request(
    home: Path,
    *,
    now_ms: int,
    notice_accepted: Digest | None,
    policy: PolicyTerms | None = None,
    consent: ConsentTerms | None = None,
) -> list[armor.Block]:
    """Drafts for the account to sign: genesis, mandate and, for a car, policy and consent."""
    network = read_network(home)
    account, _ = account_of(home)
    node = keystore.load(home, keystore.NODE)
    roles = Role.REQUEST if notice_accepted is None else Role.REQUEST | Role.PROVIDE
    drafts: list[Mandate | Policy | Consent] = [
        draft_mandate(account, network.ident, node.peer, int(roles), now_ms)
    ]
    if notice_accepted is not None:
        if notice_accepted != NOTICE_DIGEST:
            raise Refused("another notice was accepted than the one of this version")
        terms = draft_policy(account, network.ident, policy or PolicyTerms())
        payload = encode(encode_map(terms))
        drafts.append(terms)
        drafts.append(
            draft_consent(
                account,
                network.ident,
                armor.draft_of(T_POLICY, payload).digest,
                secrets.token_bytes(16),
                now_ms,
                consent or ConsentTerms(),
                _replaced(home),
            )
        )
    blocks = [armor.block_of(network.sealed)]
    for draft in drafts:
        typ = next(typ for typ, made in _RULE_OF.items() if made is type(draft))
        blocks.append(armor.draft_of(typ, encode(encode_map(draft))))
    return blocks


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the account's owner reads it before signing."""

    network: Network
    drafts: tuple[Mandate | Policy | Consent, ...]


def read_request(blocks: list[armor.Block], where: str) -> Request:
    if not blocks or blocks[0].typ != T_GENESIS:
        raise UsageError(f"{where} is no consent request")
    network = read_genesis(armor.open_block(blocks[0], T_GENESIS, where))
    drafts: list[Mandate | Policy | Consent] = []
    for block in blocks[1:]:
        made = _RULE_OF.get(block.typ.removeprefix(armor.DRAFT))
        if made is None or not block.typ.startswith(armor.DRAFT):
            raise UsageError(f"{where} asks for a signature under a {block.typ}, which is refused")
        try:
            draft = decode_map(made, decode(block.content), closed=True)
        except MeshError as error:
            raise VerificationFailed(f"{where}: {error}") from None
        if draft.network != network.ident:
            raise VerificationFailed(f"{where} mixes two networks")
        if isinstance(draft, Mandate):
            if draft.not_after_ms - draft.not_before_ms > MANDATE_MS_MAX:
                raise Refused("the mandate asked for runs for more than seven days")
            if draft.credit_nano:
                raise Refused("the mandate asks for credit, which this version does not give")
        if isinstance(draft, Consent):
            if draft.notice != NOTICE_DIGEST:
                raise Refused("the consent cites a notice that this version does not know")
            if draft.lapses_ms - draft.given_ms > CONSENT_MS_MAX:
                raise Refused("the consent asked for runs for more than a year")
        drafts.append(draft)
    if len({type(draft) for draft in drafts}) != len(drafts) or not drafts:
        raise UsageError(f"{where} is no consent request")
    return Request(network, tuple(drafts))


def account_sign(request: Request, account: KeySigner) -> list[armor.Block]:
    """Sign every draft; `sign_as` refuses one that names another account."""
    return [armor.block_of(sign_as(account, draft)) for draft in request.drafts]


def read_answer(home: Path, blocks: list[armor.Block], where: str, *, now_ms: int) -> Papers:
    """The account's answer, checked against this home; `install` puts it in force."""
    network = read_network(home)
    account, _ = account_of(home)
    node = keystore.load(home, keystore.NODE)
    found: dict[str, Sealed] = {}
    for block in blocks:
        if block.typ not in _RULE_OF or block.typ in found:
            raise UsageError(f"{where} is no answer to a consent request")
        found[block.typ] = armor.open_block(block, block.typ, where)
    mandate = found.get(T_MANDATE)
    if mandate is None:
        raise UsageError(f"{where} holds no mandate")
    if mandate.kid != account:
        raise VerificationFailed(f"{where} is signed by {short(mandate.kid)}, not by this account")
    check_mandate(mandate, network.ident, node.peer, int(Role.REQUEST), now_ms)
    consent, policy = found.get(T_CONSENT), found.get(T_POLICY)
    if (consent is None) != (policy is None):
        raise UsageError(f"{where} holds a policy or a consent without the other")
    if consent is not None and policy is not None:
        check_consent(consent, policy, network.ident, account)
    return Papers(mandate, policy, consent)
