"""What an account signs: the genesis of a network, and a node's mandate, policy and consent.

Makers and checks are functions of their arguments (keys, time, terms), so that a testnet derives
every object from its seed. `firstrun` stores what is made here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import MeshError, Refused, UsageError, VerificationFailed
from ..protocol import sandbox
from ..protocol.identity import KeySigner
from ..protocol.papers import (
    NO_CURRENCY,
    PURPOSE_COMPUTE,
    PURPOSE_ENERGY_PLUG,
    PURPOSE_NETWORK,
    T_CONSENT,
    T_FLEET,
    T_GENESIS,
    T_MANDATE,
    T_POLICY,
    AdmitRule,
    Band,
    Caps,
    Consent,
    Credit,
    Departure,
    FleetTerms,
    Genesis,
    Mandate,
    NetworkKind,
    Policy,
    Quiet,
    Resume,
    Role,
    Share,
    Submitters,
)
from ..protocol.sealed import Sealed, seal
from ..protocol.types import (
    MANDATE_MS_MAX,
    PROTOCOL_VERSION,
    Account,
    Digest,
    NetworkId,
    Peer,
)
from . import armor

DAY_MS: Final = 86_400_000
CONSENT_MS_MAX: Final = 365 * DAY_MS  # a consent is asked for anew at least once a year
RENEW_BELOW_MS: Final = 2 * DAY_MS
OWNER_ROLE: Final = 0
PARTS: Final = 10_000

PURPOSES_DEFAULT: Final = PURPOSE_COMPUTE | PURPOSE_NETWORK | PURPOSE_ENERGY_PLUG

NOTICE_LANGUAGE: Final = "en"
NOTICE: Final = """\
What you agree to when this car joins a mesh

1. Compute. While your policy allows it, this car runs programs of other members of the network on
   its processors, in a sandbox without files and without network. You see which, how long, and for
   whom; `meshnode status` shows it.
2. Network. The car sends and receives the inputs and results of that work and short notices of
   what it can do. Its position and its identification number never leave it. Other members see
   its network address, its capacity and its battery budget in coarse steps.
3. Energy. The work draws energy from the plug and, only if you chose so, from the battery. It
   never draws below your charge floor or into what you reserve for departures.
4. You come first. When you take the car the work stops at once.
5. Records. Each piece of work ends in a receipt signed by both sides. Both keep it. It names keys
   and not persons, but who knows your account key knows that the receipts are yours.
6. Payment. What is earned is split as your consent says. On a network without a currency nothing
   is owed.
7. Your right to end it. You may withdraw at any time, on the car, at no cost; it takes effect
   with the slice of work in hand. Without a renewal this consent lapses within a year.
"""
NO_CAPS: Final = Caps(0, 0, 0)
NOTICE_DIGEST: Final = Digest(hashlib.sha256(NOTICE.encode()).digest())


@dataclass(frozen=True, slots=True)
class Network:
    """A genesis whose signature and form hold."""

    genesis: Genesis
    sealed: Sealed

    @property
    def ident(self) -> NetworkId:
        return NetworkId(self.sealed.digest[:8])

    @property
    def is_test(self) -> bool:
        return self.genesis.kind is NetworkKind.TEST


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """An owner's policy in the product's defaults: careful, and plugged in only."""

    soc_floor_permille: int = 300
    reserve_wh: int = 10_000
    day_wh: int = 5_000
    watt_max: int = 300
    plugged_rule: int = 0  # 0 only plugged, 1 plugged or battery, 2 only on surplus
    temp_dc: tuple[int, int] = (50, 400)
    low_voltage_mv: int = 12_600
    wear_nano_per_kwh: int = 50_000_000
    tariff: tuple[Band, ...] = (Band(0, 1439, 300_000_000),)
    efficiency_permille: int = 900
    awake_w: int = 250
    submitters: Submitters = Submitters.FLEET
    accounts: tuple[Account, ...] = ()
    caps: Caps = NO_CAPS
    departures: tuple[Departure, ...] | None = None
    metered_bytes_a_day: int | None = None
    sandbox_least: int = int(sandbox.LEAST)
    resume: Resume | None = None  # None: two points of charge, one degree
    stationary: bool = False
    quiet: tuple[Quiet, ...] | None = None
    idle_s: int | None = None
    wifi_only: bool = False
    disk_interval_s: int | None = None


@dataclass(frozen=True, slots=True)
class ConsentTerms:
    """What the owner says yes to beside the policy."""

    operator: Account | None = None  # None: the owner runs the car alone
    shares: tuple[Share, ...] | None = None  # None: all of the margin is the owner's
    purposes: int = PURPOSES_DEFAULT
    span_ms: int = CONSENT_MS_MAX


# ---- genesis


def make_genesis(
    maker: KeySigner,
    name: str,
    kind: NetworkKind,
    *,
    created_ms: int,
    currency: str = NO_CURRENCY,
    credit: Credit = Credit.FREE,
    bootstrap: tuple[str, ...] = (),
    release_keys: tuple[Account, ...] = (),
) -> Network:
    """Name a network. `currency` is an ISO 4217 code; NO_CURRENCY means that nothing is owed."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name):
        raise UsageError(f"{name!r} is no name of a network: use a-z, 0-9, dot and dash")
    if not re.fullmatch(r"[A-Z]{3}", currency):
        raise UsageError(f"{currency!r} is no ISO 4217 code; {NO_CURRENCY} means no currency")
    if currency == NO_CURRENCY and credit is not Credit.FREE:
        raise UsageError("a network without a currency gives credit freely")
    genesis = Genesis(
        1,
        maker.account,
        "genesis",
        name,
        kind,
        currency,
        credit,
        bootstrap,
        release_keys,
        PROTOCOL_VERSION,
        created_ms,
    )
    return read_genesis(seal(genesis, T_GENESIS, maker.account, maker.sign))


def read_genesis(sealed: Sealed) -> Network:
    try:
        genesis = sealed.open(Genesis, T_GENESIS)
    except MeshError as error:
        raise VerificationFailed(f"the genesis does not hold: {error}") from None
    if sealed.kid != genesis.maker:
        raise VerificationFailed("the genesis is not signed by the maker that it names")
    if genesis.protocol != PROTOCOL_VERSION:
        raise Refused(
            f"the network {genesis.name} speaks protocol {genesis.protocol}; "
            f"this version speaks {PROTOCOL_VERSION}"
        )
    return Network(genesis, sealed)


def load_genesis(path: Path, *, allow_test: bool = False) -> Network:
    """Read a genesis file and check all that can be checked without asking anyone."""
    network = read_genesis(armor.read_one(path, T_GENESIS))
    refuse_test(network, allow_test)
    return network


def refuse_test(network: Network, allow_test: bool) -> None:
    # The keys of a test network can be derived by anyone: whoever joins one trusts everybody.
    if network.is_test and not allow_test:
        raise Refused(
            f"{network.genesis.name} is a test network, its keys are public; "
            "pass --allow-test if that is what you want"
        )


def save_genesis(path: Path, network: Network) -> None:
    genesis = network.genesis
    comment = f"network {genesis.name} ({genesis.kind.name.lower()}), id {network.ident.hex()}"
    armor.write_file(path, [armor.block_of(network.sealed)], comment)


# ---- what an account signs for one node

Sign = Callable[[bytes], bytes]


def draft_mandate(
    account: Account,
    network: NetworkId,
    peer: Peer,
    roles: int,
    now_ms: int,
    span_ms: int = MANDATE_MS_MAX,
) -> Mandate:
    span_ms = min(span_ms, MANDATE_MS_MAX)
    return Mandate(1, network, account, peer, "mandate", roles, 0, now_ms, now_ms + span_ms)


def draft_policy(account: Account, network: NetworkId, terms: PolicyTerms) -> Policy:
    return Policy(
        1,
        network,
        account,
        "policy",
        terms.soc_floor_permille,
        terms.reserve_wh,
        terms.day_wh,
        terms.watt_max,
        terms.plugged_rule,
        terms.temp_dc,
        terms.low_voltage_mv,
        terms.wear_nano_per_kwh,
        terms.tariff,
        terms.efficiency_permille,
        terms.awake_w,
        AdmitRule(terms.submitters, terms.accounts),
        terms.caps,
        terms.departures,
        terms.metered_bytes_a_day,
        resume=terms.resume,
        sandbox_least=terms.sandbox_least,
        stationary=int(terms.stationary) or None,
        quiet=terms.quiet,
        idle_s=terms.idle_s,
        wifi_only=int(terms.wifi_only) or None,
        disk_interval_s=terms.disk_interval_s,
    )


def draft_consent(
    account: Account,
    network: NetworkId,
    policy: Digest,
    vehicle: bytes,
    now_ms: int,
    terms: ConsentTerms,
    replaces: Digest | None = None,
) -> Consent:
    """`vehicle` is a pseudonym, fresh for every consent: it must not link two of them."""
    return Consent(
        1,
        network,
        account,
        "consent",
        terms.operator or account,
        vehicle,
        terms.purposes,
        terms.shares or (Share(account, OWNER_ROLE, PARTS),),
        policy,
        NOTICE_DIGEST,
        NOTICE_LANGUAGE,
        now_ms,
        now_ms + min(terms.span_ms, CONSENT_MS_MAX),
        replaces,
    )


def sign_as(account: KeySigner, obj: Mandate | Policy | Consent | FleetTerms) -> Sealed:
    typ = {Mandate: T_MANDATE, Policy: T_POLICY, Consent: T_CONSENT, FleetTerms: T_FLEET}[type(obj)]
    if obj.account != account.account:
        raise Refused("the object names another account than the key that should sign it")
    return seal(obj, typ, account.account, account.sign)


def check_mandate(
    sealed: Sealed, network: NetworkId, peer: Peer, roles: int, now_ms: int
) -> Mandate:
    """A mandate that lets `peer` act now; VerificationFailed or Refused says why not."""
    mandate = sealed.open(Mandate, T_MANDATE)
    if sealed.kid != mandate.account:
        raise VerificationFailed("the mandate is not signed by the account that it names")
    if mandate.network != network:
        raise VerificationFailed("the mandate belongs to another network")
    if mandate.peer != peer:
        raise VerificationFailed("the mandate names another node key")
    if mandate.roles & roles != roles:
        raise Refused("the mandate does not allow this role")
    if mandate.not_after_ms - mandate.not_before_ms > MANDATE_MS_MAX:
        raise VerificationFailed("the mandate runs for more than seven days")
    if mandate.not_after_ms <= now_ms:
        raise Refused("the mandate has run out; run the init command, or install a new one")
    return mandate


def check_consent(
    consent_sealed: Sealed, policy_sealed: Sealed, network: NetworkId, account: Account
) -> tuple[Consent, Policy]:
    """Consent and policy that belong together, to this account and to this network."""
    consent = consent_sealed.open(Consent, T_CONSENT)
    policy = policy_sealed.open(Policy, T_POLICY)
    for sealed, obj in ((consent_sealed, consent), (policy_sealed, policy)):
        name = obj.name_of_object
        if sealed.kid != obj.account or obj.account != account:
            raise VerificationFailed(f"the {name} is not signed by the car's account")
        if obj.network != network:
            raise VerificationFailed(f"the {name} belongs to another network")
    if consent.policy != policy_sealed.digest:
        raise VerificationFailed("the consent was given to another policy")
    if consent.lapses_ms - consent.given_ms > CONSENT_MS_MAX:
        raise VerificationFailed("the consent runs for more than a year")
    return consent, policy


# ---- a test network from its seed

TEST_CREATED_MS: Final = 1_767_225_600_000  # 2026-01-01: a seed names the same network every day
TEST_POLICY: Final = PolicyTerms(
    soc_floor_permille=200,
    reserve_wh=0,
    day_wh=50_000,
    watt_max=1_000,
    plugged_rule=1,
    submitters=Submitters.NETWORK,
)


def key_seed(seed: int, role: str) -> bytes:
    """The secret of `role` (`maker`, `node/car-0`, `account/car-0`) in the testnet of `seed`."""
    text = b"mesh testnet key\0" + seed.to_bytes(8, "big") + role.encode()
    return hashlib.sha256(text).digest()


def seeded_key(seed: int, role: str) -> KeySigner:
    return KeySigner(key_seed(seed, role))


def seeded_genesis(seed: int) -> Network:
    """No addresses inside: the ports of a testnet differ from run to run, its id does not."""
    maker = seeded_key(seed, "maker")
    return make_genesis(
        maker,
        f"testnet-{seed}",
        NetworkKind.TEST,
        created_ms=TEST_CREATED_MS,
        release_keys=(seeded_key(seed, "release").account,),
    )


@dataclass(frozen=True, slots=True)
class Papers:
    """One node's standing objects; a submitter has neither policy nor consent."""

    mandate: Sealed
    policy: Sealed | None = None
    consent: Sealed | None = None

    def all(self) -> tuple[Sealed, ...]:
        return tuple(s for s in (self.mandate, self.policy, self.consent) if s is not None)


def papers_for(
    account: KeySigner,
    network: NetworkId,
    peer: Peer,
    now_ms: int,
    *,
    policy_terms: PolicyTerms | None,
    consent_terms: ConsentTerms | None = None,
    vehicle: bytes = b"",
    replaces: Digest | None = None,
) -> Papers:
    """Everything an account signs for a node; with `policy_terms` the node is a car."""
    if policy_terms is None:
        roles = int(Role.REQUEST)
        draft = draft_mandate(account.account, network, peer, roles, now_ms)
        return Papers(sign_as(account, draft))
    roles = Role.PROVIDE | Role.REQUEST
    mandate = draft_mandate(account.account, network, peer, roles, now_ms)
    policy = sign_as(account, draft_policy(account.account, network, policy_terms))
    consent = draft_consent(
        account.account,
        network,
        policy.digest,
        vehicle,
        now_ms,
        consent_terms or ConsentTerms(),
        replaces,
    )
    return Papers(sign_as(account, mandate), policy, sign_as(account, consent))


def seeded_papers(seed: int, name: str, now_ms: int, *, car: bool) -> Papers:
    """The papers of node `name`: a function of seed, name and time alone."""
    account, node = seeded_key(seed, f"account/{name}"), seeded_key(seed, f"node/{name}")
    return papers_for(
        account,
        seeded_genesis(seed).ident,
        node.peer,
        now_ms,
        policy_terms=TEST_POLICY if car else None,
        consent_terms=ConsentTerms(operator=seeded_key(seed, "account/submitter").account),
        vehicle=key_seed(seed, f"vehicle/{name}")[:16],
    )
