"""The style of the repository as a test: what a linter does not know.

Reads the files that git tracks (or, in a source archive, all files). Each rule names the line that
breaks it. An exception stands in a table here with its reason, or nowhere.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
README_LINES_MAX = 120

# path, or path:function -> why it is longer than a reader likes
LONG: dict[str, str] = {}

# Names that say nothing about what is inside.
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "manager", "misc", "common", "data", "info"}

# Who may print: commands, and what a person runs and reads.
PRINTERS = (
    "meshnode/cli/",
    "testnet/",
    "tests/bench/",
    "tests/attack/",
    "tests/soak/",
    "tests/fuzz/",
    "jaxkernels/timing.py",
)

# Whose programs rest on purpose.
PACED = ("tests/bench/", "tests/attack/", "tests/soak/")

# Written in two halves, so that this file keeps its own rules.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b|#\s*XX" + "X")
MACHINE_PATH = re.compile(r"(?<![\w.>}/-])/(work|root|farm|home/\w+|tmp/(lab|bash_jobs))\b(?!-)")
REGISTRY_HOST = re.compile(r"\b(pypi|pythonhosted|npmjs|deb\.debian|security\.debian)\.(org|com)\b")


@cache
def files() -> tuple[Path, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0:
        paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
        return tuple(path for path in paths if path.is_file())
    return tuple(
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not path.relative_to(ROOT).parts[0].startswith(".venv")
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every tracked text file."""
    for path in files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            yield name_of(path), content.decode("utf-8", "replace")


@cache
def trees() -> dict[str, ast.Module]:
    return {name_of(p): ast.parse(p.read_text()) for p in files() if p.suffix == ".py"}


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, text in texts()
        if name != "tests/unit/test_tidy.py"
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def calls(tree: ast.Module, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def is_command(tree: ast.Module) -> bool:
    """Whether a module is run by `python -m`: it ends in an `if __name__ == "__main__"`."""
    return any(isinstance(n, ast.If) and "__main__" in ast.unparse(n.test) for n in tree.body)


@pytest.mark.parametrize(
    ("pattern", "bad", "good"),
    [
        (MACHINE_PATH, "see /wo" + "rk/main/x", "see and/or/work"),
        (MACHINE_PATH, "open('/ro" + "ot/.ssh')", "https://example.org/work"),
        (REGISTRY_HOST, "https://py" + "pi.org/simple", "the Python package index"),
        (UNFINISHED, "# TO" + "DO later", "# to do later"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], bad: str, good: str) -> None:
    assert pattern.search(bad)
    assert not pattern.search(good)


def test_no_path_of_a_machine() -> None:
    assert lines_with(MACHINE_PATH) == []


def test_no_host_of_a_package_registry() -> None:
    assert lines_with(REGISTRY_HOST) == []


def test_nothing_is_left_to_do_in_a_comment() -> None:
    assert lines_with(UNFINISHED) == []


def test_only_commands_print() -> None:
    """Stdout is the result. A process may say its last words on stderr."""
    assert [
        f"{name}:{call.lineno}"
        for name, tree in trees().items()
        if not name.startswith(PRINTERS) and not is_command(tree)
        for call in calls(tree, "print")
        if "file=sys.stderr" not in map(ast.unparse, call.keywords)
    ] == []


def test_tests_wait_on_conditions() -> None:
    """A sleep in a test is a race that somebody lost on a fast machine.

    A loop that looks at a condition until a deadline passes may pause between two looks. What a
    bench measures may contain a rest, an attacker takes its time, a soak kills at a random moment.
    """
    found = []
    for name, tree in trees().items():
        if not name.startswith("tests/") or name.startswith(PACED):
            continue
        polls = {
            node.lineno
            for loop in ast.walk(tree)
            if isinstance(loop, ast.While)
            for node in ast.walk(loop)
            if isinstance(node, ast.Call)
        }
        found += [
            f"{name}:{call.lineno}"
            for call in calls(tree, "time.sleep", "trio.sleep", "asyncio.sleep")
            if call.lineno not in polls
        ]
    assert found == []


def test_no_file_is_longer_than_a_reader_likes() -> None:
    long = {name: text.count("\n") for name, text in texts() if name.endswith(".py")}
    assert {n: c for n, c in long.items() if c > FILE_LINES_MAX and n not in LONG} == {}


def test_no_function_is_longer_than_a_reader_likes() -> None:
    found = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno
                if lines > FUNCTION_LINES_MAX and f"{name}:{node.name}" not in LONG:
                    found.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert found == []


def test_every_listed_exception_is_still_needed() -> None:
    # Not at the limit itself, or a line more or less would move the table each time.
    longs = set()
    for name, text in texts():
        if name.endswith(".py") and text.count("\n") > FILE_LINES_MAX * 0.9:
            longs.add(name)
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if (node.end_lineno or 0) - node.lineno > FUNCTION_LINES_MAX * 0.9:
                    longs.add(f"{name}:{node.name}")
    assert set(LONG) - longs == set()


def test_every_module_opens_with_what_it_is() -> None:
    assert [
        name for name, tree in trees().items() if tree.body and ast.get_docstring(tree) is None
    ] == []


def test_names_say_what_is_inside() -> None:
    assert [
        name for name in map(name_of, files()) if EMPTY_NAMES & set(Path(name).stem.split("_"))
    ] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX


def test_generated_artifacts_are_few_and_small() -> None:
    """Weights and binaries do not belong in the history; kernels are kilobytes."""
    assert [name_of(path) for path in files() if path.stat().st_size > 1 << 20] == []
