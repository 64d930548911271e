"""The documents against the tree: links lead somewhere, commands and their options exist.

Commands are read from code blocks and from `inline code` of every Markdown file, from the
sentences of the reason codes and from the docstrings of the errors, since a person is told to run
those.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from meshnode import errors
from meshnode.protocol.reasons import Reason
from tests.reference import FACES, group_of, inner
from tests.unit.test_tidy import ROOT, files, name_of

PAGES = sorted(path for path in files() if path.suffix == ".md")
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The fragment that a forge gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def links() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        for target in LINK.findall(text):
            if not target.startswith(("http://", "https://", "mailto:")):
                yield name_of(page), target


def commands() -> Iterator[tuple[str, str]]:
    """(where, command line) of everything a document tells a person to type."""
    places = [(name_of(page), page.read_text()) for page in PAGES]
    for place, text in places:
        for block in FENCE.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                yield place, line.strip().removeprefix("$ ")
        for code in CODE.findall(FENCE.sub("", text)):
            yield place, code
    for reason in Reason:
        yield f"Reason.{reason.name}", "".join(CODE.findall(reason.text)[:1])
    for name, cls in vars(errors).items():
        if isinstance(cls, type):
            for code in CODE.findall(cls.__doc__ or ""):
                yield f"errors.{name}", code


def words_of(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # prose in backquotes, or output
        return []


def test_links_lead_somewhere() -> None:
    broken = []
    for page, target in links():
        path, _, fragment = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if not there.exists():
            broken.append(f"{page}: {target}")
        elif fragment and there.suffix == ".md":
            anchors = {anchor(heading) for heading in HEADING.findall(there.read_text())}
            if fragment not in anchors:
                broken.append(f"{page}: {target}")
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached = {"README.md"}
    todo = ["README.md"]
    while todo:
        page = todo.pop()
        for source, target in links():
            path = target.partition("#")[0]
            if source == page and path:
                name = name_of(((ROOT / page).parent / path).resolve())
                if name.endswith(".md") and name not in reached:
                    reached.add(name)
                    todo.append(name)
    # docs/spec is read beside the code and links from its own index.
    assert [p for p in map(name_of, PAGES) if p not in reached and "docs/spec/" not in p] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for place, line in commands():
        words = words_of(line)
        if words[:1] == ["make"]:
            named = [w for w in words[1:] if re.fullmatch(r"[a-z-]+", w)]
            missing += [f"{place}: make {word}" for word in named if word not in targets]
    assert missing == []


def test_mesh_commands_exist() -> None:
    faces = {name: group for name in FACES if (group := group_of(name)) is not None}
    missing = []
    for place, line in commands():
        words = words_of(line)
        if not words or words[0] not in faces or words[1:2] == ["="]:
            continue
        command: click.Command = faces[words[0]]
        context = click.Context(command)
        options = {"--help"}
        for word in words[1:]:
            if word in ("|", ">", "&&", ";", "&"):
                break
            options |= {o for param in command.params for o in (*param.opts, *param.secondary_opts)}
            if word.startswith("--"):
                if word.partition("=")[0] not in options:
                    missing.append(f"{place}: {line}: no option {word}")
            elif isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z-]*", word):
                found = inner(command, context).get(word)
                if found is None:
                    missing.append(f"{place}: {line}: no command {word}")
                    break
                command, context = found, click.Context(found, parent=context)
    assert missing == []
