"""`python -m tests.reference [--check]`: the pages of docs that the code decides.

Flow: `make docs` writes them, `make check` compares. errors.md comes from the error tree and the
reason codes, config.md from the fields of the configuration and the limits and what is said beside
them, cli.md from the commands' own help: what is not said there is not said anywhere. Those
of docs/spec are `drawn`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import click

from meshnode import errors
from meshnode.protocol.reasons import Reason

from . import drawn
from .drawn import HEAD, meaning_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FACES = {"mesh": "meshnode.cli.mesh", "meshnode": "meshnode.cli.car"}


def errors_page() -> str:
    """Exit codes, error classes and reason codes."""
    rows = sorted(
        (cls.exit_code, cls.__name__, " ".join((cls.__doc__ or "").split()))
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.MeshError)
    )
    lines = [
        "# Errors, exit codes and reasons",
        "",
        HEAD.format(sources="meshnode/errors.py and meshnode/protocol/reasons.py"),
        "A command that fails prints one line on stderr and exits with the code of its error.",
        "0 is success.",
        "",
        "| exit code | error | what it says when there is nothing more exact |",
        "|--:|---|---|",
        *(f"| {code} | `{name}` | {text} |" for code, name, text in rows),
        "",
        "## Reasons",
        "",
        "A refusal, a suspension, the end of a run and each answer of `mesh explain` to the",
        "question why a run waits carry one of these codes. On the wire it is the number.",
        "",
        "| code | name | sentence |",
        "|--:|---|---|",
        *(f"| {reason.value} | `{reason.name}` | {reason.text} |" for reason in Reason),
        "",
    ]
    return "\n".join(lines)


def fields_of(path: Path) -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """(class, first paragraph of its docstring, [(field, default, comment)]) of a module."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        if not any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            continue
        rows = []
        for field, after in zip_longest(node.body, node.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                default = ast.unparse(field.value) if field.value else "(must be given)"
                rows.append((field.target.id, default, meaning_of(lines, field, after)))
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        yield node.name, " ".join(paragraph.split()), rows


def config_page() -> str:
    """Every field that an owner or an operator may set, with its default and its meaning."""
    sources = [("meshnode/config.py", None), ("meshnode/protocol/types.py", "Limits")]
    lines = [
        "# Configuration",
        "",
        HEAD.format(sources=" and ".join(name for name, _ in sources)),
        "Units stand last in a name: `_s` seconds, `_ms` milliseconds, `_bytes`, `_mwh`. What has",
        "no field here is a bound of the protocol: see [the CDDL](../spec/meshnode.cddl).",
    ]
    for name, only in sources:
        path = ROOT / name
        if not path.exists():
            continue
        for cls, text, rows in fields_of(path):
            if not rows or (only and cls != only):
                continue
            lines += [
                "",
                f"## {cls}",
                "",
                text,
                "",
                "| field | default | meaning |",
                "|---|---|---|",
            ]
            for field, default, comment in rows:
                shown = f"`{default}`".replace("|", "\\|")
                lines.append(f"| `{field}` | {shown} | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def group_of(face: str) -> click.Group | None:
    """The click group behind a console script; None where it is not part of this tree."""
    if not find_spec(FACES[face]):
        return None
    module = importlib.import_module(FACES[face])
    for one in vars(module).values():
        if isinstance(one, click.Group) and one.name == face:
            return one
    raise LookupError(f"{FACES[face]} has no click group called {face!r}")


def plugins() -> dict[str, click.Command]:
    """Commands that `mesh` gets by entry point, from pyproject.toml: installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for name, where in project["entry-points"]["meshnode.commands"].items():
        module, _, attribute = where.partition(":")
        if find_spec(module):
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def inner(command: click.Command, context: click.Context) -> dict[str, click.Command]:
    """The commands of a group, by name, in the order of its help."""
    if not isinstance(command, click.Group):
        return {}
    late = plugins() if context.parent is None and command.name == "mesh" else {}
    names = [name for name in command.list_commands(context) if name not in late]
    known = {name: command.get_command(context, name) for name in names}
    return {name: one for name, one in known.items() if one is not None} | late


def help_of(command: click.Command, context: click.Context, depth: int) -> Iterator[str]:
    """A command's help as Markdown, then its inner commands'."""
    yield from ("#" * min(depth, 6) + f" {context.command_path}", "", "```")
    # Not the formatter's own list of commands: it would depend on what is installed.
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    click.Command.format_options(command, context, formatter)
    command.format_epilog(context, formatter)
    yield from (formatter.getvalue().rstrip(), "```", "")
    for name, one in inner(command, context).items():
        below = click.Context(
            one, parent=context, info_name=name, terminal_width=90, max_content_width=90
        )
        yield from help_of(one, below, depth + 1)


def cli_page() -> str:
    """Every command and option of the two programs."""
    lines = [
        "# Commands",
        "",
        HEAD.format(sources="meshnode/cli and testnet/command.py"),
        "`mesh` is for who wants work done, `meshnode` for who has a car. Results are on stdout,",
        "talk is on stderr, `--json` gives one object for programs. Exit codes are in",
        "[errors](errors.md).",
        "",
    ]
    for face in FACES:
        group = group_of(face)
        if group is not None:
            context = click.Context(group, info_name=face, terminal_width=90, max_content_width=90)
            lines += help_of(group, context, 2)
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "reference/errors.md": errors_page,
    "reference/config.md": config_page,
    "reference/cli.md": cli_page,
    **{f"spec/{name}": make for name, make in drawn.PAGES.items()},
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="say what is stale, write nothing")
    options = parser.parse_args(argv)
    stale = []
    for name, make in PAGES.items():
        path = DOCS / name
        text = make()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale and options.check:
        print(f"docs: stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    print(f"docs: {len(PAGES)} pages {'checked' if options.check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
