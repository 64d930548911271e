"""The pages of docs/spec that the code decides; `python -m tests.reference` writes them.

The state tables come from the tables that the machine itself keeps to, the numbers from its
constants, the fields from the classes that read the wire. What is said about each is the comment or
the string beside it in the code, and a number with nothing beside it is an error: the page would
leave its reader to guess.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from meshnode.overlay.config import OverlayConfig
from meshnode.protocol import checkpoints, fleet, messages, objects, papers
from meshnode.protocol.attempt import TRANSITIONS
from meshnode.protocol.attempt import State as AttemptState
from meshnode.protocol.reasons import Reason
from meshnode.protocol.rule import (
    At,
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
from meshnode.protocol.sandbox import Layer
from meshnode.protocol.types import UINT_MAX

ROOT: Final = Path(__file__).resolve().parents[1]
PROTOCOL: Final = ROOT / "meshnode" / "protocol"
OVERLAY: Final = ROOT / "meshnode" / "overlay"
HEAD: Final = "<!-- Made by `make docs` from {sources}: change those, not this page. -->\n"

UNSEEN: Final = {
    "advert": {"EXPIRY_COMPANY_MS"},
    "budget": {"LEASE_S_MAX"},
    "owner": {"UNIT_MS_MAX"},
    "cell": {"KNOWN_MS_MAX"},
    "channel_check": {"LEASE_MS_MAX"},
    "fleet": {"SHORT_UNIT_MS", "FRESH_MS"},
    "forecast": {"STEP_S"},
    "hedging": {"LOOK_MS_LEAST", "LOOK_MS_SOON"},
    "pace": {"UNIT_MS_LEAST"},
    "placement": {"TURN_MS", "LEASE_MS_LEAST"},
    "acceptances": {"STORE_AGAIN_MS"},
    "receipts": {"STORE_AGAIN_MS"},
    "requester": {"PUMP_MS", "PUMP_PART", "PUMP_MS_MAX"},
    "delivery": {"RESEND_MS"},
    "shelf": {"SHELF_MS"},
}
"""Times by which a node rules itself: no peer can tell them from a slow machine."""

COUNTS: Final = {
    "acceptances": ("DISPUTE_RUNS_MAX",),
    "attempts": ("ATTEMPTS_MAX", "KERNEL_FAILURES_MAX"),
    "cell": (
        "RANKS_MAX",
        "ALONE_CARS_MAX",
        "CANDIDATES_MAX",
        "NEAR_LEAST",
        "NEAR_PART",
        "GOSSIP_CARS_MAX",
        "HEARD_CARS",
        "MOMENTS_CARS_MAX",
        "LAST_MILE_UNKNOWN_US",
    ),
    "hedging": ("LATE_PERMILLE", "GAIN", "HEDGES_MAX"),
    "pace": ("KNOWN_LEAST", "SLOW_RUNS", "SLOW_TIMES"),
    "gateway": ("PROVIDED_MAX", "DIALS_MAX", "TAKEN_IN_CELLS"),
    "messages": ("HOPS_MAX", "AVOID_MAX"),
    "placing": ("PLACES_MAX",),
    "keeping": ("ENDED_KEYS_MAX",),
    "rendezvous": (
        "TOKENS_PER_CAR_MAX",
        "TRIES_MAX",
        "SPARE_TOKENS",
        "HEDGE_PART",
        "ASKED_MAX",
        "SAME_PART",
    ),
    "reserve": ("RESERVE_LEAST", "RESERVE_ROOTS"),
    "tallies": ("NEIGHBOUR_CELLS", "NEW_CELLS", "BELIEVED_MAX"),
    "token": ("UNSPENT_MAX",),
}
"""Bounds that are no times and that a peer meets, beside those of types.py."""

LAYERS: Final = Layer.__members__

STREAM_LIMITS: Final = (
    "connections_per_peer_max",
    "link_timeout_s",
    "streams_per_peer_max",
    "conn_buffer_bytes_max",
    "frame_timeout_s",
    "write_stall_s",
    "ping_interval_s",
    "ping_timeout_s",
    "frames_per_s_max",
    "gossip_per_forwarder_per_s",
    "gossip_per_source_per_s",
    "blob_serves_max",
    "blob_serves_per_peer_max",
    "blob_stall_s",
)
"""Of the overlay's configuration, what a peer meets."""


# ---- what stands beside the code


def meaning_of(lines: list[str], node: ast.stmt | ast.expr, after: ast.stmt | None = None) -> str:
    """The string under a constant or a field, the comment beside it, or those right above."""
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        return " ".join(str(after.value.value).split())
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    _, mark, beside = lines[last][node.end_col_offset :].partition("#")
    if mark:
        return beside.strip()
    above: list[str] = []
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
        above.insert(0, lines[first].strip().lstrip("# "))
    return " ".join(above)


def target_of(node: ast.stmt) -> ast.expr | None:
    """What an assignment gives a value to."""
    if isinstance(node, ast.Assign):
        return node.targets[0]
    return node.target if isinstance(node, ast.AnnAssign) else None


def constants(name: str) -> dict[str, tuple[int | float, str]]:
    """Numbers of a module of the protocol, in its order, with what is said about each."""
    path = PROTOCOL / f"{name}.py"
    lines = path.read_text().splitlines()
    module = importlib.import_module(f"meshnode.protocol.{name}")
    found: dict[str, tuple[int | float, str]] = {}
    for node, following in pairwise([*ast.parse(path.read_text()).body, ast.Pass()]):
        target = target_of(node)
        if not isinstance(target, ast.Name) or not target.id.isupper() or target.id[0] == "_":
            continue
        value = getattr(module, target.id)
        if isinstance(value, int | float):
            found[target.id] = (value, meaning_of(lines, node, following))
    return found


def class_node(module: str, name: str, folder: Path) -> tuple[ast.ClassDef, list[str]]:
    text = (folder / f"{module}.py").read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, text.splitlines()
    raise LookupError(f"{module}.py has no class {name}")


def members(module: str, name: str, folder: Path = PROTOCOL) -> dict[str, str]:
    """Members or fields of a class, with what is said beside each."""
    node, lines = class_node(module, name, folder)
    found: dict[str, str] = {}
    for one, following in pairwise([*node.body, ast.Pass()]):
        target = target_of(one)
        if isinstance(target, ast.Name):
            found[target.id] = meaning_of(lines, one, following)
    return found


def edges(module: str) -> dict[tuple[str, str], str]:
    """(from, to) -> when, of the literal EDGES of a module: the comment beside each member."""
    text = (PROTOCOL / f"{module}.py").read_text()
    lines = text.splitlines()
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target) != "EDGES":
            continue
        assert isinstance(node.value, ast.Dict)
        for key, targets in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(targets, ast.Set) and isinstance(key, ast.Attribute):
                for target in targets.elts:
                    assert isinstance(target, ast.Attribute)
                    found[key.attr, target.attr] = meaning_of(lines, target)
    return found


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    made = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in made]


def told(said: str, name: str) -> str:
    if not said:
        raise LookupError(f"{name} stands in docs/spec: say beside it in the code what it is")
    return said


# ---- states


def states_page() -> str:
    """The lives of an attempt, a lease, a placement and a token."""
    lines = [
        "# States",
        "",
        HEAD.format(
            sources="the tables in meshnode/protocol: attempt.py, lease.py, stage.py, token.py"
        ),
        "Who has one of these four keeps it in one state and moves it along these edges only; a",
        "message that asks for another edge is answered as the prose says, and changes nothing.",
        "Names of messages after a colon are what is sent on an edge.",
        "",
        "## An attempt at its requester",
        "",
        "One run of units on one car. It ends in exactly one of *returned* and *lost*; units are",
        "taken from its parts whenever they come, also after it was given up, and whatever is",
        "missing goes out again under the next number.",
        "",
    ]
    lines += described("attempt", "State")
    rows: list[tuple[str, ...]] = []
    meanings = members("attempt", "Step")
    for state, steps in TRANSITIONS.items():
        for step, to in steps.items():
            when = f"{step.value}: {told(meanings[step.name], step.name)}"
            rows.append((state.value, when, to.value))
        if not steps:
            rows.append((state.value, "", "the end"))
    lines += table(("from", "what happens", "to"), rows)
    for title, module, intro in (
        (
            "A lease at its car",
            "lease",
            "From the grant on. A run of a lease that ended is never begun again.",
        ),
        (
            "A placement at a rendezvous",
            "stage",
            "From `place` on. One that is assigned or sent on is forgotten when 4,096 newer ones"
            " have come: its requester hears from the car, or asks elsewhere.",
        ),
    ):
        lines += ["", f"## {title}", "", intro, "", *described(module, "Stage"), *drawn(module)]
    lines += [
        "",
        "## An idle token at its car",
        "",
        "It is *out* from its deposit until it ends in one of these ways; whoever assigns one",
        "that is not out, or another's, is refused with `EXPIRED`. Its rendezvous holds it until",
        "it is spent, revoked, past its time, or its car's connection ends.",
        "",
    ]
    ends = members("token", "End")
    lines += table(
        ("from", "what happens", "to"),
        [("out", told(said, name), name.lower()) for name, said in ends.items()],
    )
    return "\n".join([*lines, ""])


def described(module: str, name: str) -> list[str]:
    rows = [
        (f"*{member.lower().replace('_', ' ')}*", told(said, f"{module}.{member}"))
        for member, said in members(module, name).items()
    ]
    return [*table(("state", "what it is"), rows), ""]


def drawn(module: str) -> list[str]:
    """The edges that the module keeps to; their comments are read beside them."""
    live: dict[Enum, set[Enum]] = importlib.import_module(f"meshnode.protocol.{module}").EDGES
    said = edges(module)
    drawn_pairs = {(a.name, b.name) for a, tos in live.items() for b in tos}
    assert drawn_pairs == set(said), f"{module}.EDGES is not the literal that it is read as"
    names = {state.name: state.value for state in live}
    rows = [
        (names[a], told(when, f"{module}: {a} to {b}"), names[b]) for (a, b), when in said.items()
    ]
    rows += [(state.value, "", "the end") for state, tos in live.items() if not tos]
    return table(("from", "what happens", "to"), rows)


# ---- times and bounds


def modules() -> Iterator[str]:
    for path in sorted(PROTOCOL.glob("*.py")):
        if path.stem not in ("__init__", "types"):
            yield path.stem


def timers_page() -> str:
    """Every time and bound that a peer can observe."""
    lines = [
        "# Timers and bounds",
        "",
        HEAD.format(sources="meshnode/protocol, `Limits` in its types.py, overlay/config.py"),
        "`_ms` are milliseconds, `_s` seconds. A bound of the wire is the same for all and a peer",
        "that passes it is refused; a time of the protocol is the same for all and MAY be missed",
        "by a slow machine; a limit is one node's own, with its default: a peer MUST bear others.",
        "",
        "## Bounds of the wire",
        "",
    ]
    rows = [
        (f"`{name}`", number(value), told(said, f"types.{name}"))
        for name, (value, said) in constants("types").items()
    ]
    lines += table(("name", "value", "what it is"), rows)
    lines += ["", "## Times and counts of the protocol", ""]
    rows = []
    for module in modules():
        for name, (value, said) in constants(module).items():
            timed = {"MS", "S"} & set(name.split("_"))
            seen = timed and name not in UNSEEN.get(module, ())
            if seen or name in COUNTS.get(module, ()):
                full = f"{module}.{name}"
                rows.append((f"`{full}`", number(value), told(said, full)))
    lines += table(("name", "value", "what it is"), rows)
    lines += ["", "## Limits of a node", ""]
    limits = importlib.import_module("meshnode.protocol.types").Limits()
    said_of = members("types", "Limits")
    rows = [
        (
            f"`{field.name}`",
            number(getattr(limits, field.name)),
            told(said_of[field.name], f"Limits.{field.name}"),
        )
        for field in dataclasses.fields(limits)
    ]
    lines += table(("name", "default", "what it is"), rows)
    lines += ["", "## Limits of a node's streams", ""]
    said_of = members("config", "OverlayConfig", OVERLAY)
    defaults = {field.name: field.default for field in dataclasses.fields(OverlayConfig)}
    rows = [(f"`{n}`", number(defaults[n]), told(said_of[n], n)) for n in STREAM_LIMITS]
    lines += table(("name", "default", "what it is"), rows)
    return "\n".join([*lines, ""])


def number(value: Any) -> str:
    """As a person reads it: powers of two as such, thousands apart."""
    if isinstance(value, int) and value >= 1 << 13:
        for less, word in ((0, ""), (1, " - 1")):
            if (value + less).bit_count() == 1:
                return f"2^{(value + less).bit_length() - 1}{word}"
    return f"{value:,}"


# ---- messages and objects


def kind_text(kind: Any) -> str:
    """What a field may be, in words of CBOR."""
    if isinstance(kind, Fixed):
        return f'"{kind.value}"' if isinstance(kind.value, str) else str(kind.value)
    if isinstance(kind, Uint):
        return "uint" if kind.most == UINT_MAX else f"uint <= {number(kind.most)}"
    if isinstance(kind, Int):
        return "int"
    if isinstance(kind, Code):
        if kind.enum is Reason:
            return "reason"
        return ", ".join(f"{code.value} {code.name.lower()}" for code in kind.enum)
    if isinstance(kind, Kid):
        return "38 or 32 bytes: peer or account"
    if isinstance(kind, Bstr | Tstr):
        word = "bytes" if isinstance(kind, Bstr) else "text of bytes"
        return f"{kind.size} {word}" if kind.size is not None else f"{word} <= {number(kind.most)}"
    if isinstance(kind, OrNull):
        return f"{kind_text(kind.kind)}, or null"
    if isinstance(kind, Many):
        return f"array of {kind.least} to {number(kind.most)}: {kind_text(kind.kind)}"
    if isinstance(kind, Row):
        names = getattr(kind.make, "_fields", None) or [""] * len(kind.kinds)
        items = [
            f"{name} {kind_text(item)}".strip()
            for name, item in zip(names, kind.kinds, strict=True)
        ]
        return f"[{'; '.join(items)}]"
    if isinstance(kind, Nested):
        return f"map: [{kind.rule_class.__name__}](#{kind.rule_class.__name__.lower()})"
    if isinstance(kind, objects.MeterMap):
        names = ", ".join(f"{n} {f}" for n, f in enumerate(objects.Measured._fields))
        return f"map of uint: {names}"
    raise TypeError(f"{kind!r}")


def fields_of(rule_class: type) -> list[str]:
    module = rule_class.__module__.rpartition(".")[2]
    said = members(module, rule_class.__name__)
    places: list[tuple[str, At]] = rules()[rule_class.__name__].ordered
    rows = [
        (
            str(place.key) + (" ?" if place.optional else ""),
            f"`{name}`",
            kind_text(place.kind),
            said.get(name, ""),
        )
        for name, place in places
    ]
    return table(("key", "field", "what it may be", "what it is"), rows)


def section(rule_class: type, title: str) -> list[str]:
    text = " ".join((rule_class.__doc__ or "").split())
    if text.startswith(f"{rule_class.__name__}("):  # dataclasses write one where there is none
        text = ""
    return ["", title, "", *([text, ""] if text else []), *fields_of(rule_class)]


def messages_page() -> str:
    """Every plain frame and every signed object, field by field."""
    lines = [
        "# Messages and objects",
        "",
        HEAD.format(sources="the rules in meshnode/protocol/messages.py, papers.py and objects.py"),
        "The same as [the grammar](meshnode.cddl), to be read by people. A key with `?` may be",
        "missing; in the other fields something must stand. Bytes of text are bytes of UTF-8; a",
        "`uint` goes to 2^63 - 1. The envelope of what is signed is in",
        "[the prose, section 3](meshnode.md#3-signed-objects).",
        "",
        "| number | message |",
        "|--:|---|",
    ]
    frames = sorted(messages.NUMBERS.items())
    lines += [f"| {n} | [{one.__name__}](#{one.__name__.lower()}) |" for n, one in frames]
    lines += ["", "## Plain frames", "", "Key 0 is the number."]
    for n, one in frames:
        lines += section(one, f"### {one.__name__}")
        lines[-len(fields_of(one)) + 1] += f"\n| 0 | number | {n} | |"
    lines += ["", "## Signed objects and what is in them"]
    numbered = set(messages.NUMBERS.values())
    for name in rules():
        rule_class = getattr(papers, name, None) or getattr(objects, name, None)
        if rule_class is not None and rule_class not in numbered:
            lines += section(rule_class, f"### {name}")
    lines += ["", "## Layers of a sandbox", "", "Bits of `sandbox_layers` and `sandbox_least`.", ""]
    said = members("sandbox", "Layer")
    bits = [(str(one.value), f"`{name}`", told(said[name], name)) for name, one in LAYERS.items()]
    lines += table(("bit", "layer", "what it is"), bits)
    return "\n".join([*lines, ""])


# ---- reasons


def reasons_page() -> str:
    """The registry, and what this implementation's requester does when one comes."""
    lines = [
        "# Reasons",
        "",
        HEAD.format(sources="meshnode/protocol/reasons.py, fleet.py and checkpoints.py"),
        "One registry for `refuse`, `decline`, `ended`, `revoke`, `handoff`, `cancel-task`,",
        "`heartbeat` and the advert. From 96 on a code says why something waits. What a requester",
        "does is said for a `refuse`, or an `ended` that left units undone; every other reason",
        "costs the task one try, and the car is left alone for `retry_ms` or half a second.",
        "",
    ]
    rows = [
        (str(reason.value), f"`{reason.name}`", reason.text, "; ".join(deeds(reason)))
        for reason in Reason
    ]
    lines += table(("code", "name", "meaning", "a requester then"), rows)
    return "\n".join([*lines, ""])


def deeds(reason: Reason) -> Iterator[str]:
    if reason in fleet.TOO_MUCH:
        yield "offers this car half the units; of one unit, leaves it out of the job"
    elif reason in fleet.UNSUITED:
        yield "leaves this car out of the job"
    if reason in fleet.BLAMELESS:
        yield "asks elsewhere; the car may have the next run"
    if reason in checkpoints.SPOILT:
        yield "begins a long unit without its checkpoint"


PAGES: Final = {
    "states.md": states_page,
    "timers.md": timers_page,
    "messages.md": messages_page,
    "reasons.md": reasons_page,
}
assert set(AttemptState) == set(TRANSITIONS), "attempt.TRANSITIONS leaves a state out"
