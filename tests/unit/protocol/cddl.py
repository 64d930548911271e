"""Reads docs/spec/meshnode.cddl, as far as its own writing rules go, for the tests that hold it.

The file keeps one map entry a line with the entry's name at the head of its comment, so a few
regular expressions are enough and what they cannot read is an error, not a silent pass.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).parents[3] / "docs" / "spec" / "meshnode.cddl"
_RULE = re.compile(r"^([a-z][a-z0-9-]*) = (.*)$")
_ENTRY = re.compile(r"^  (\? )?(\d+) => (\S.*?) *; ([a-z_0-9]+)(?::.*)?$")


class Entry(NamedTuple):
    key: int
    optional: bool
    type: str  # as written
    name: str


@cache
def text() -> str:
    return PATH.read_text(encoding="utf-8")


@cache
def read() -> tuple[dict[str, str], dict[str, list[Entry]]]:
    """Rules that are no maps, by name, and rules that are."""
    plain: dict[str, str] = {}
    maps: dict[str, list[Entry]] = {}
    name, in_map = "", False
    for line in text().splitlines():
        code = line.split(";")[0].rstrip()
        if not code:
            continue
        if in_map:
            if code == "}":
                in_map = False
                continue
            entry = _ENTRY.match(line)
            assert entry, f"not an entry with a name: {line}"
            optional, key, kind, field = entry.groups()
            maps[name].append(Entry(int(key), bool(optional), kind, field))
            continue
        rule = _RULE.match(code)
        if rule is None:
            assert code.startswith(" ") and name, f"not a rule: {line}"
            plain[name] += " " + code.strip()
            continue
        name, body = rule.groups()
        assert name not in plain and name not in maps, f"{name} stands twice"
        if body == "{":
            maps[name], in_map = [], True
        else:
            plain[name] = body
    return plain, maps


def normal(kind: str) -> str:
    """A type with every named rule that is no map put in its place, member names and blanks off."""
    plain, maps = read()
    kind = re.sub(r"[a-z][a-z0-9-]*: ", "", kind)

    def put(found: re.Match[str]) -> str:
        word = found.group()
        if word in plain:
            return normal(plain[word])
        assert word in maps or word in ("bstr", "tstr", "int", "null", "size"), word
        return word

    kind = re.sub(r'"[^"]*"|[a-z][a-z0-9-]*', lambda m: m[0] if m[0][0] == '"' else put(m), kind)
    return re.sub(r"\s+", "", kind)


def members(kind: str) -> list[str]:
    """The names of an array rule's members, or of the rule that `kind` names; [] if they have
    none."""
    plain, _ = read()
    while kind in plain:
        kind = plain[kind]
    inner = re.match(r"\[\d+\*\d+ ([a-z0-9-]+)\]$", kind)
    if inner:
        return members(inner[1])
    return [name.replace("-", "_") for name in re.findall(r"([a-z][a-z0-9-]*): ", kind)]


def schema(root: str) -> str:
    """The whole CDDL with `root` as its first rule, which is the one that is checked."""
    return f"start = {root}\n" + text()
