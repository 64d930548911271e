"""Samples of every rule of the CDDL from a seed: what the vectors hold and the tests start from.

Values are drawn from each field's own kind, edges first, so a new field is in the vectors without
a line here; only rules whose fields bind each other need one (`_whole`).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from meshnode.protocol import fields, messages, objects, papers
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rule import (
    Bstr,
    Code,
    Fixed,
    Int,
    Kid,
    Many,
    Nested,
    OrNull,
    Row,
    Tstr,
    Uint,
    rules,
)
from meshnode.protocol.types import PEER_PREFIX, UINT_MAX

# typ -> (rule, the field that names who signs)
SIGNED: dict[str, tuple[type[Any], str]] = {
    papers.T_GENESIS: (papers.Genesis, "maker"),
    papers.T_MANDATE: (papers.Mandate, "account"),
    papers.T_POLICY: (papers.Policy, "account"),
    papers.T_CONSENT: (papers.Consent, "account"),
    papers.T_FLEET: (papers.FleetTerms, "account"),
    objects.T_AGREEMENT: (objects.Agreement, "requester"),
    objects.T_ADVERT: (objects.Advert, "peer"),
    objects.T_ANNOUNCE: (objects.Announce, "requester"),
    objects.T_TOKEN: (objects.Token, "peer"),
    objects.T_OFFER: (objects.Offer, "requester"),
    objects.T_LEASE: (objects.Lease, "provider"),
    objects.T_RECEIPT: (objects.Receipt, "provider"),
    objects.T_ACCEPT: (objects.Acceptance, ""),  # whose channel it is says who
    objects.T_MANIFEST: (objects.Manifest, "maker"),
}
EDGES = (0, 1, 23, 24, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, UINT_MAX)
# Of every group one: a new reason must not change the vectors of objects that do not name it.
REASONS = (Reason.OK, Reason.BAD_FRAME, Reason.PRICE, Reason.BUSY, Reason.DONE, Reason.WAITS_BIDS)
TEXTS = ("", "a", "cpu", "Größe", "電池", "x" * 600)


def draw(kind: Any, rng: random.Random) -> Any:
    """A value that `kind` admits, as the dataclasses hold it."""
    if isinstance(kind, Fixed):
        return kind.value
    if isinstance(kind, Uint):
        return rng.choice([edge for edge in EDGES if edge <= kind.most] + [kind.most])
    if isinstance(kind, Int):
        return rng.choice([*EDGES, -1, -24, -25, -UINT_MAX - 1])
    if isinstance(kind, Code):
        return rng.choice(REASONS if kind.enum is Reason else list(kind.enum))
    if isinstance(kind, Bstr):
        size = kind.size if kind.size is not None else min(kind.most, rng.choice((0, 1, 23, 300)))
        return rng.randbytes(size)
    if isinstance(kind, Kid):
        return rng.choice((PEER_PREFIX, b"")) + rng.randbytes(32)
    if isinstance(kind, Tstr):
        if kind.size is not None:
            return "XXXEURUSD"[: kind.size]
        return rng.choice(TEXTS).encode()[: kind.most].decode(errors="ignore")
    if isinstance(kind, OrNull):
        return rng.choice((None, draw(kind.kind, rng)))
    if isinstance(kind, Many):
        count = max(kind.least, min(kind.most, rng.choice((0, 1, 2, 3))))
        return tuple(draw(kind.kind, rng) for _ in range(count))
    if isinstance(kind, Row):
        items = tuple(draw(k, rng) for k in kind.kinds)
        return items if kind.make is None else kind.make(*items)
    if isinstance(kind, Nested):
        return sample(kind.rule_class, rng, full=True)
    if isinstance(kind, objects.MeterMap):
        return objects.Measured(*(draw(Uint(), rng) for _ in range(9)))
    raise TypeError(f"no sample for {kind!r}")


def sample(rule_class: type, rng: random.Random, *, full: bool) -> Any:
    """An object of the rule, with all of its optional fields or none."""
    places = rules()[rule_class.__name__].places
    values = {
        name: draw(place.kind, rng) if full or not place.optional else None
        for name, place in places
    }
    return rule_class(**_whole(rule_class, values, rng))


def _whole(rule_class: type, values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Fields that bind each other."""
    if rule_class is papers.Consent:
        account = draw(fields.ACCOUNT, rng)
        values["shares"] = (
            papers.Share(account, 0, 7_000),
            papers.Share(account, 1, 3_000),
        )
    if rule_class in (objects.Agreement, messages.Terms):
        values["rates"] = tuple(rate._replace(unit=rate.unit or 1) for rate in values["rates"])
    if rule_class is objects.JobSpec and values["steps"] is not None:
        values["steps"] = objects.JobSteps(400, (0,), ())
    if rule_class is objects.Offer:
        first, size = rng.choice((0, 24, 1 << 31)), rng.choice((1, 256, 4096))
        values["job"] = replace(values["job"], units=first + 3 * size)
        values["task"] = fields.Span(first, 2 * size)
        values["run"] = fields.Span(first + size, size)
        if values["provider"] is None or values["channel"] is None:
            values["provider"] = values["channel"] = None
    if rule_class is objects.Manifest:
        stepped = values["steps"] is not None
        array = draw(fields.ARRAY, rng)
        role = objects.ArgRole.STATE if stepped else objects.ArgRole.MAPPED
        constant = objects.ManifestArg(objects.ArgRole.CONSTANT, array)
        values["args"] = (constant, objects.ManifestArg(role, array))
        values["outs"] = (array,)
        if stepped:
            values["steps"] = objects.Steps((0,), (), 100, 10)
    return values
