"""`python -m tests [--long] [FOLDER...] [-- PYTEST_ARG...]`: every folder of tests, cheapest first.

Flow: `make test` and `make test-long` run it. Each folder is one pytest process, so that what one
leaves behind (a loaded jax, a thread, a signal handler) cannot help or hurt the next, and so that
a folder that hangs is ended alone. Closes with a table of times and one line of totals.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# (folder, most seconds in `make test`, most seconds in `make test-long`); 0: not run there. In
# `make test` three times what a folder takes and more: a limit is for what hangs.
FOLDERS: tuple[tuple[str, int, int], ...] = (
    ("unit", 150, 900),
    ("property", 90, 600),
    ("sim", 240, 1200),
    ("kernels", 360, 600),
    ("artifacts", 300, 900),
    ("node", 240, 300),
    ("processes", 800, 1500),
    ("attack", 240, 900),
    ("interop", 60, 600),
    ("bench", 0, 900),
    ("soak", 0, 1200),
)
TEST_S_MAX = 600  # what `make test` promises
NO_TESTS_COLLECTED = 5  # pytest's exit code
KILLED = 124


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one folder's pytest process said."""

    folder: str
    seconds: float
    exit_code: int
    passed: int = 0
    failed: int = 0
    skips: tuple[str, ...] = ()


def read_report(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Passed, failed and the reasons of the skipped, from pytest's JUnit file."""
    if not path.exists():
        return 0, 0, ()
    passed = failed = 0
    skips: list[str] = []
    for case in ET.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            name = f"{case.get('classname', '')}.{case.get('name', '')}"
            skips.append(f"{name}: {skipped.get('message', '')}")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        else:
            passed += 1
    return passed, failed, tuple(skips)


def run_folder(folder: str, *, long: bool, limit_s: int, pytest_args: list[str]) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="meshnode-tests-") as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS / folder), f"--junitxml={report}"]
        command += ["-m", "long or not long"] if long else []
        started = time.monotonic()
        child = subprocess.Popen(
            [*command, *pytest_args],
            cwd=TESTS.parent,
            env={**os.environ, "MESHNODE_TESTS": "long" if long else "quick"},
            start_new_session=True,  # so that a hung test goes with the nodes it started
        )
        try:
            exit_code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            print(f"{folder}: not done after {limit_s} s, ended", file=sys.stderr)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            exit_code = KILLED
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        passed, failed, skips = read_report(report)
        return Outcome(folder, time.monotonic() - started, exit_code, passed, failed, skips)


def close(outcomes: list[Outcome], *, long: bool) -> int:
    """Print the table and the totals; the exit status."""
    print("\nfolder      passed failed skipped seconds")
    for one in outcomes:
        print(
            f"{one.folder:11} {one.passed:6} {one.failed:6} {len(one.skips):7} {one.seconds:7.1f}"
            + ("" if one.exit_code in (0, NO_TESTS_COLLECTED) else f"  exit {one.exit_code}")
        )
    skips = [line for one in outcomes for line in one.skips]
    for line in skips:
        print(f"skipped: {line}")
    broken = [one for one in outcomes if one.exit_code not in (0, NO_TESTS_COLLECTED)]
    if long and skips:
        print("the long run skips nothing: what the tests above miss has to be installed first")
    seconds = sum(one.seconds for one in outcomes)
    if not long and seconds > TEST_S_MAX:
        print(f"took {seconds:.0f} s, which is over the {TEST_S_MAX} s that `make test` promises")
    passed = sum(one.passed for one in outcomes)
    # A folder that died without a report failed, although no single test did.
    failed = sum(max(one.failed, 1) if one in broken else one.failed for one in outcomes)
    print(f"{seconds:.0f} s in all")
    print(f"{passed} passed, {failed} failed, {len(skips)} skipped")
    return 1 if broken or not passed or (long and skips) else 0


def main(argv: list[str]) -> int:
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__)
    parser.add_argument("--long", action="store_true", help="all tests, with peers; skips nothing")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="only these folders")
    options = parser.parse_args(argv[:at])
    known = {folder for folder, _, _ in FOLDERS}
    for name in options.folders:
        if name not in known:
            parser.error(f"no folder {name!r}; there are {', '.join(sorted(known))}")
    outcomes = []
    for folder, quick_s, long_s in FOLDERS:
        limit_s = long_s if options.long or folder in options.folders else quick_s
        if options.folders and folder not in options.folders:
            continue
        if not limit_s or not any((TESTS / folder).rglob("test_*.py")):
            continue
        print(f"\n== tests/{folder}", flush=True)
        outcome = run_folder(folder, long=options.long, limit_s=limit_s, pytest_args=argv[at + 1 :])
        outcomes.append(outcome)
    return close(outcomes, long=options.long)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
