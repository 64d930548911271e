"""`meshnode report`: days, reasons and sums out of the diary; the page loads nothing."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from meshnode.cli.car import meshnode
from meshnode.node.diary import Diary, Entry
from meshnode.node.week import WAITS, WORKS, midnight, week_of_diary
from meshnode.protocol.reasons import Reason
from tests import json_shape

from .test_commands import run

HOUR_MS = 3_600_000
WH_UJ = 3_600_000_000
MONDAY_MS = 1_767_571_200_000


def utc(_unix_ms: int) -> int:
    return 0


def an_hour(from_ms: int, reason: Reason = Reason.OK, working: bool = False) -> list[Entry]:
    """Six lines of ten minutes."""
    lines = []
    for at in range(6):
        begins = from_ms + at * HOUR_MS // 6
        work = 100 * WH_UJ if working else 0
        lines.append(
            Entry(
                begins,
                begins + HOUR_MS // 6,
                700,
                True,
                int(reason),
                HOUR_MS // 6 if working else 0,
                work,
                0 if working or reason else 40 * WH_UJ,
                0,
                30_000_000,
                1_000_000,
            )
        )
    return lines


def test_days_and_stretches_are_those_of_the_owners_clock() -> None:
    now_ms = MONDAY_MS + 2 * 24 * HOUR_MS + 3 * HOUR_MS  # Wednesday, 3:00
    entries = [
        *an_hour(MONDAY_MS - HOUR_MS),  # Sunday's last hour: not asked for
        *an_hour(MONDAY_MS, working=True),
        *an_hour(MONDAY_MS + HOUR_MS, Reason.UNPLUGGED),
        *an_hour(MONDAY_MS + 24 * HOUR_MS),
    ]
    income = [(MONDAY_MS + 5, 7), (MONDAY_MS - 5, 100), (MONDAY_MS + 24 * HOUR_MS, 9)]
    week = week_of_diary(entries, income, now_ms=now_ms, days=3, floor_permille=300, offset_at=utc)
    assert [day.from_ms for day in week.days] == [MONDAY_MS + at * 24 * HOUR_MS for at in range(3)]
    assert [day.working_ms for day in week.days] == [HOUR_MS, 0, 0]
    assert [day.work_uj // WH_UJ for day in week.days] == [600, 0, 0]
    assert [day.waiting_uj // WH_UJ for day in week.days] == [0, 240, 0]
    assert [day.income_nano for day in week.days] == [7, 9, 0]
    assert [(one.what, one.until_ms - one.from_ms) for one in week.stretches] == [
        (WORKS, HOUR_MS),
        (Reason.UNPLUGGED.text, HOUR_MS),
        (WAITS, HOUR_MS),
    ]
    assert week.total().energy_nano == 18 * 30_000_000


def test_midnight_where_the_clocks_change() -> None:
    """Berlin, 29 March 2026: the day begins at 23:00 UTC and has 23 hours."""
    change_ms = 1_774_746_000_000

    def berlin(unix_ms: int) -> int:
        return 120 if unix_ms >= change_ms else 60

    begins_ms = change_ms - 2 * HOUR_MS  # 23:00 UTC of the day before
    assert midnight(begins_ms, berlin) == begins_ms
    assert midnight(change_ms + 5 * HOUR_MS, berlin) == begins_ms
    assert midnight(begins_ms - 1, berlin) == begins_ms - 24 * HOUR_MS
    assert midnight(change_ms + 22 * HOUR_MS, berlin) == change_ms + 21 * HOUR_MS


def test_the_report_in_the_terminal_as_json_and_as_a_page(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(home))
    code, out, _ = run(capfd, "report", *at, group=meshnode)
    assert code == 0 and out.startswith("nothing yet")
    began_ms = int(time.time() * 1000) - 3 * HOUR_MS
    Diary(home).add([*an_hour(began_ms, working=True), *an_hour(began_ms + HOUR_MS, Reason.BUDGET)])
    page = tmp_path / "week.html"
    code, out, err = run(capfd, "report", "--week", "--html", str(page), *at, group=meshnode)
    assert code == 0 and str(page) in err
    assert Reason.BUDGET.text in out and "works" in out and "▆" in out
    text = page.read_text()
    assert "default-src 'none'" in text and Reason.BUDGET.text in text
    assert not re.findall(r"(?:src|href)=|https?:|@import|url\(", text)
    code, out, _ = run(capfd, "report", "--days", "2", "--json", *at, group=meshnode)
    found = json_shape.check("report", out)
    assert code == 0 and len(found["days"]) == 2
    assert sum(day["work_mwh"] for day in found["days"]) == 600_000
    code, _, err = run(capfd, "report", "--days", "2", "--week", *at, group=meshnode)
    assert code == 2 and "exclude each other" in err


def test_a_tried_week_is_drawn_too(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "trial.html"
    words = ("policy", "test", "--html", str(page), "--home", str(home))
    assert run(capfd, *words, group=meshnode)[0] == 0
    text = page.read_text()
    assert text.count('class="charge"') == 7 and "commuter" in text
    words = ("policy", "test", "--html", str(tmp_path / "no" / "x.html"), "--home", str(home))
    code, _, err = run(capfd, *words, group=meshnode)
    assert code == 8 and "cannot be written" in err
