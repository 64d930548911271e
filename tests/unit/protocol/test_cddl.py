"""docs/spec/meshnode.cddl and the dataclasses say the same, rule by rule and both ways."""

from __future__ import annotations

import random
import re
from enum import IntEnum
from typing import Any

import pycddl
import pytest

from meshnode.protocol import messages, objects, papers
from meshnode.protocol.codec import encode
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
    encode_map,
    rules,
)
from meshnode.protocol.types import UINT_MAX

from . import cddl
from .samples import SIGNED, sample

FRAMES = {message.__name__: number for number, message in messages.NUMBERS.items()}
RULES = sorted(rules())


def rule_name(class_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", class_name).lower()


def choice(enum: type[IntEnum]) -> str:
    codes = sorted(int(code) for code in enum)
    if codes == list(range(len(codes))):
        return f"0..{codes[-1]}"
    return "/".join(str(code) for code in codes)


def expected(kind: Any) -> str:
    """The CDDL type of a kind, written as `cddl.normal` writes it."""
    if isinstance(kind, Fixed):
        return f'"{kind.value}"' if isinstance(kind.value, str) else str(kind.value)
    if isinstance(kind, Uint):
        return f"0..{kind.most}"
    if isinstance(kind, Int):
        return "int"
    if isinstance(kind, Code):
        return choice(kind.enum)
    if isinstance(kind, Kid):
        return cddl.normal("kid")
    if isinstance(kind, Bstr | Tstr):
        word = "bstr" if isinstance(kind, Bstr) else "tstr"
        return (
            f"{word}.size{kind.size}" if kind.size is not None else f"{word}.size(0..{kind.most})"
        )
    if isinstance(kind, OrNull):
        return f"{expected(kind.kind)}/null"
    if isinstance(kind, Many):
        return f"[{kind.least}*{kind.most}{expected(kind.kind)}]"
    if isinstance(kind, Row):
        return f"[{','.join(expected(item) for item in kind.kinds)}]"
    if isinstance(kind, Nested):
        return rule_name(kind.rule_class.__name__)
    if isinstance(kind, objects.MeterMap):
        return "meters"
    raise TypeError(f"{kind!r}")


def named(kind: Any) -> list[str]:
    """Member names of a row that is a NamedTuple."""
    if isinstance(kind, Many):
        return named(kind.kind)
    make = kind.make if isinstance(kind, Row) else None
    return list(getattr(make, "_fields", ()))


@pytest.mark.parametrize("class_name", RULES)
def test_rule_has_the_keys_names_and_types_of_its_class(class_name: str) -> None:
    _, maps = cddl.read()
    entries = list(maps[rule_name(class_name)])
    if class_name in FRAMES:
        number = entries.pop(0)
        assert number == (0, False, str(FRAMES[class_name]), "number")
    places = sorted(rules()[class_name].places, key=lambda place: place[1].key)
    assert [(e.key, e.name, e.optional) for e in entries] == [
        (place.key, name, place.optional) for name, place in places
    ]
    for entry, (name, place) in zip(entries, places, strict=True):
        assert cddl.normal(entry.type) == expected(place.kind), name
        if named(place.kind):
            assert cddl.members(entry.type) == named(place.kind), name


def test_every_map_of_the_cddl_has_a_class() -> None:
    _, maps = cddl.read()
    assert set(maps) == {rule_name(name) for name in RULES} | {"protected-header", "meters"}
    assert tuple(e.name for e in maps["meters"]) == objects.Measured._fields
    assert {cddl.normal(e.type) for e in maps["meters"]} == {f"0..{UINT_MAX}"}


def test_lists_of_objects_frames_and_typs_are_whole() -> None:
    plain, _ = cddl.read()
    assert re.findall(r'"([^"]+)"', plain["typ"]) == list(SIGNED)
    signed = [rule_name(rule.__name__) for rule, _ in SIGNED.values()]
    assert plain["signed-object"].split(" / ") == signed
    assert plain["frame-message"].split(" / ") == [rule_name(name) for name in FRAMES]
    held = {**vars(papers), **vars(objects)}
    constants = {value for name, value in held.items() if name.startswith("T_")}
    assert constants == set(SIGNED)


def test_reason_codes_and_sentences_are_those_of_the_registry() -> None:
    plain, _ = cddl.read()
    written = {name: int(code) for name, code in plain.items() if name.startswith("reason-")}
    registry = {f"reason-{r.name.lower().replace('_', '-')}": int(r) for r in Reason}
    assert written == registry
    assert plain["reason"].split(" / ") == list(registry)
    sentences = dict(re.findall(r"^(reason-[a-z-]+) = \d+ +; (.*)$", cddl.text(), re.MULTILINE))
    assert sentences == {f"reason-{r.name.lower().replace('_', '-')}": r.text for r in Reason}


def checker(root: str) -> pycddl.Schema:
    return pycddl.Schema(cddl.schema(root))


@pytest.mark.parametrize("class_name", RULES)
def test_a_foreign_checker_accepts_samples_and_refuses_a_key_more(class_name: str) -> None:
    """pycddl, written by others, reads the file and judges our bytes."""
    schema = checker(rule_name(class_name))
    number = {0: FRAMES[class_name]} if class_name in FRAMES else {}
    held = {**vars(papers), **vars(objects)}
    rule_class = messages.NUMBERS[FRAMES[class_name]] if number else held[class_name]
    for seed in range(12):
        value = sample(rule_class, random.Random(seed), full=bool(seed % 2))
        fields = encode_map(value) | number
        schema.validate_cbor(encode(fields))
        with pytest.raises(pycddl.ValidationError):
            schema.validate_cbor(encode({**fields, 99: 0}))
        missing = dict(list(fields.items())[1:])
        with pytest.raises(pycddl.ValidationError):
            schema.validate_cbor(encode(missing))
