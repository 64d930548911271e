"""Hypothesis strategies for every rule of the CDDL, made from the field kinds themselves."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from meshnode.protocol import fields, messages, objects, papers
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
from meshnode.protocol.types import JOB_UNITS_MAX, LEASE_UNITS_MAX, PEER_PREFIX, UINT_MAX

ITEMS_MAX = 4  # of an array: the bound itself is tested with vectors
BYTES_MAX = 64


def kind(of: Any) -> st.SearchStrategy[Any]:
    if isinstance(of, Fixed):
        return st.just(of.value)
    if isinstance(of, Uint):
        return st.integers(0, of.most)
    if isinstance(of, Int):
        return st.integers(-UINT_MAX - 1, UINT_MAX)
    if isinstance(of, Code):
        return st.sampled_from(list(of.enum))
    if isinstance(of, Bstr):
        if of.size is not None:
            return st.binary(min_size=of.size, max_size=of.size)
        return st.binary(max_size=min(of.most, BYTES_MAX))
    if isinstance(of, Kid):
        account = st.binary(min_size=32, max_size=32)
        return account | account.map(lambda key: PEER_PREFIX + key)
    if isinstance(of, Tstr):
        if of.size is not None:
            return st.text(st.characters(codec="ascii"), min_size=of.size, max_size=of.size)
        return st.text(max_size=of.most // 4)
    if isinstance(of, OrNull):
        return st.none() | kind(of.kind)
    if isinstance(of, Many):
        most = max(of.least, min(of.most, ITEMS_MAX))
        return st.lists(kind(of.kind), min_size=of.least, max_size=most).map(tuple)
    if isinstance(of, Row):
        make = of.make or (lambda *items: items)
        return st.tuples(*map(kind, of.kinds)).map(lambda items: make(*items))
    if isinstance(of, Nested):
        return rule(of.rule_class)
    if isinstance(of, objects.MeterMap):
        return st.tuples(*[kind(Uint())] * 9).map(lambda items: objects.Measured(*items))
    raise TypeError(f"no strategy for {of!r}")


@st.composite
def rule(draw: st.DrawFn, rule_class: type) -> Any:
    values: dict[str, Any] = {
        name: draw(st.none() | kind(place.kind) if place.optional else kind(place.kind))
        for name, place in rules()[rule_class.__name__].places
    }
    if rule_class is papers.Consent:
        mine = draw(st.integers(0, 10_000))
        one, two = draw(kind(fields.ACCOUNT)), draw(kind(fields.ACCOUNT))
        values["shares"] = (papers.Share(one, 0, mine), papers.Share(two, 4, 10_000 - mine))
    elif rule_class in (objects.Agreement, messages.Terms):
        values["rates"] = tuple(rate._replace(unit=max(1, rate.unit)) for rate in values["rates"])
    elif rule_class is objects.Manifest:
        state, constant = draw(kind(fields.ARRAY)), draw(kind(fields.ARRAY))
        stepped = values["steps"] is not None
        role = objects.ArgRole.STATE if stepped else objects.ArgRole.MAPPED
        fixed = objects.ManifestArg(objects.ArgRole.CONSTANT, constant)
        values["args"] = (fixed, objects.ManifestArg(role, state))
        values["outs"] = (state,)
        values["steps"] = objects.Steps((0,), (0,), 100, 10) if stepped else None
    elif rule_class is objects.Offer:
        first = draw(st.integers(0, JOB_UNITS_MAX - 1))
        size = draw(st.integers(1, min(LEASE_UNITS_MAX, JOB_UNITS_MAX - first)))
        before = draw(st.integers(0, first))
        named = {f: getattr(values["job"], f) for f in values["job"].__slots__}
        values["job"] = objects.JobSpec(**{**named, "units": first + size})
        values["task"] = fields.Span(before, first + size - before)
        values["run"] = fields.Span(first, size)
        if values["provider"] is None or values["channel"] is None:
            values["provider"] = values["channel"] = None
    return rule_class(**values)
