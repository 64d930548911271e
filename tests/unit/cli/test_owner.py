"""`meshnode pause`, `resume`, `mode`, without a node that runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from meshnode.cli.car import meshnode
from meshnode.node.mode import read_mode
from tests import json_shape

from .test_commands import run


def test_a_pause_is_kept_for_the_node_that_starts_later(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, "pause", "--home", str(home), group=meshnode)
    assert (code, out) == (0, "paused: nothing runs here\n")
    assert "does not run" in err
    assert read_mode(home).kind == "never" and read_mode(home).until_unix_ms is None

    before_ms = time.time_ns() // 1_000_000
    words = ("pause", "--for", "1h30m", "--json", "--home", str(home))
    code, out, _ = run(capfd, *words, group=meshnode)
    found = json_shape.check("mode", out)
    assert code == 0 and found["mode"] == "never" and found["running"] is False
    assert 0 <= found["until_ms"] - before_ms - 5_400_000 < 60_000

    code, out, _ = run(capfd, "mode", "always", "--for", "3d", "--home", str(home), group=meshnode)
    assert code == 0 and "within the limits that protect the car, until " in out
    code, out, _ = run(capfd, "resume", "--json", "--home", str(home), group=meshnode)
    assert code == 0 and json.loads(out)["mode"] == "auto"
    assert read_mode(home).kind == "auto"


@pytest.mark.parametrize("span", ["", "2", "h", "2 h", "-1h", "1w", "0m", "1h30", "367d", "1e3s"])
def test_a_length_of_time_that_is_none(
    home: Path, capfd: pytest.CaptureFixture[str], span: str
) -> None:
    code, _, err = run(capfd, "pause", "--for", span, "--home", str(home), group=meshnode)
    assert code == 2 and "no length of time such as 30m" in err
    assert read_mode(home).kind == "auto"


def test_what_makes_no_sense_is_said(
    tmp_path: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capfd, "mode", "auto", "--for", "1h", "--home", str(home), group=meshnode)
    assert code == 2 and "takes no --for" in err
    code, _, err = run(capfd, "mode", "often", "--home", str(home), group=meshnode)
    assert code == 2 and "often" in err
    code, _, err = run(capfd, "pause", "--home", str(tmp_path / "nowhere"), group=meshnode)
    assert code == 2 and "is no home of a node" in err
