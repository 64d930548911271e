"""The pages of docs/spec are what the code does: tables of states, numbers, fields."""

from __future__ import annotations

import re
from enum import Enum
from types import ModuleType

import pytest

from meshnode.protocol import attempt, lease, messages, stage, token
from meshnode.protocol.rule import rules
from meshnode.protocol.types import Limits
from tests import drawn

PAGE = (drawn.ROOT / "docs" / "spec" / "states.md").read_text()


def rows_of(title: str) -> list[tuple[str, str]]:
    """(from, to) of each row in the last table under a heading."""
    _, _, below = PAGE.partition(f"## {title}\n")
    text = below.partition("\n## ")[0].partition("| from |")[2]
    found = re.findall(r"^\| ([a-z ]+) \| .* \| ([a-z ]+) \|$", text, re.MULTILINE)
    return [(a, b) for a, b in found if b not in ("to", "the end")]


@pytest.mark.parametrize(
    ("title", "module"),
    [("A lease at its car", lease), ("A placement at a rendezvous", stage)],
)
def test_the_page_has_the_edges_that_the_code_keeps_to(title: str, module: ModuleType) -> None:
    edges: dict[Enum, set[Enum]] = module.EDGES
    assert set(rows_of(title)) == {(a.value, b.value) for a, tos in edges.items() for b in tos}
    first, *_, last = edges
    reached = {first}.union(*edges.values())
    assert reached == set(edges) and [a for a, tos in edges.items() if not tos] == [last]


def test_the_page_has_the_steps_of_an_attempt_and_the_ends_of_a_token() -> None:
    steps = [
        (state.value, to.value)
        for state, edges in attempt.TRANSITIONS.items()
        for to in edges.values()
    ]
    assert sorted(rows_of("An attempt at its requester")) == sorted(steps)
    assert rows_of("An idle token at its car") == [("out", end.value) for end in token.End]


def test_a_number_of_which_nothing_is_said_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LookupError, match="FOO_MS"):
        drawn.told("", "FOO_MS")
    monkeypatch.setattr(drawn, "meaning_of", lambda *_: "")
    for page in (drawn.states_page, drawn.timers_page):
        with pytest.raises(LookupError, match="say beside it"):
            page()


def test_every_time_of_the_protocol_is_told_or_named_as_unseen() -> None:
    page = drawn.timers_page()
    for module in drawn.modules():
        for name in drawn.constants(module):
            if {"MS", "S"} & set(name.split("_")):
                assert (f"`{module}.{name}`" in page) != (name in drawn.UNSEEN.get(module, ()))
    for module, names in (*drawn.UNSEEN.items(), *drawn.COUNTS.items()):
        assert set(names) <= set(drawn.constants(module)), f"{module} has no such constant any more"
    assert all(f"| `{name}` |" in page for name in Limits.__dataclass_fields__)


def test_every_rule_has_its_fields_on_the_page() -> None:
    page = drawn.messages_page()
    for name, layout in rules().items():
        section = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert all(f" | `{field}` | " in section for field, _ in layout.places), name
    for number, message in messages.NUMBERS.items():
        assert f"| {number} | [{message.__name__}](#{message.__name__.lower()}) |" in page
