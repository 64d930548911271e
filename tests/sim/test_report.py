"""The report page: whole, alone, and saying what its results say. The input is made up."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from testnet.sim.report import page, write_report
from testnet.sim.result import QUANTILES, CellFigure, Result

VOID = {"meta"}
# policy -> median and sigma of a log-normal time, messages a task by type
MADE_UP = {
    "limit": (15_000, 0.5, {"assign": 1.0}),
    "tokens": (22_000, 0.48, {"offer": 1.0, "assign": 1.0, "token": 1.0, "digest": 0.2}),
    "central": (69_000, 0.7, {"ask": 1.0, "assign": 1.0, "free": 1.0}),
    "gossip": (76_000, 1.3, {"announce": 4_600.0, "bid": 30.0, "award": 1.0}),
    "adverts": (77_000, 1.5, {"advert": 1_500.0, "offer": 3.0, "refuse": 2.0}),
    "random": (1_965_000, 1.1, {"offer": 1.0}),
}


def made_up(policy: str, seed: int, cars: int = 10_000) -> Result:
    median, sigma, messages = MADE_UP[policy]
    rng = np.random.default_rng(seed)
    cells = tuple(
        CellFigure(
            f"eu{number}-0",
            float(rng.uniform(0, 16_000)),
            float(rng.uniform(0, 6_500)),
            int(rng.lognormal(6, 0.5)),
            400 if number else 0,
            int(median * rng.lognormal(0, 0.15)) if number else 0,
        )
        for number in range(40)
    )
    return Result.of(
        latencies_us=median * np.exp(sigma * rng.standard_normal(20_000)),
        messages={kind: round(count * 20_100) for kind, count in messages.items()},
        policy=policy,
        engine="oracle" if policy in ("limit", "central", "random") else "event",
        model="continents",
        cars=cars,
        load=0.8,
        seed=seed,
        task_s=2.0,
        simulated_s=9.0,
        tasks=20_100,
        cells=cells,
        command=f"mesh testnet sim --cars {cars} --load 0.8 --seed {seed} --policy {policy}",
    )


class Strict(HTMLParser):
    """Fails on a tag that is not closed where it should be; collects what a reader reads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.text = ""
        self.figures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag == "svg" and ("aria-hidden", "true") not in attrs:
            self.figures.append(dict(attrs).get("aria-label") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [made_up(policy, seed) for policy in MADE_UP for seed in (1, 2)]


def test_the_page_is_whole_and_names_every_policy_and_run(
    results: list[Result], tmp_path: Path
) -> None:
    write_report(results, tmp_path / "out.html")
    seen = read((tmp_path / "out.html").read_text())
    for result in results:
        assert result.policy in seen.text and result.command in seen.text
    for policy in MADE_UP:
        assert sum(policy in figure for figure in seen.figures) == 3  # two curves, one bar
    assert len(seen.figures) == 4 and all(seen.figures)


def test_the_page_loads_nothing(results: list[Result]) -> None:
    text = page(results)
    assert re.search(r"https?://|//\w|url\(|@import|src=|href=", text) is None
    assert not {"script", "link", "img", "iframe", "object"} & set(read(text).names)
    assert "default-src 'none'" in text


def test_what_comes_from_results_cannot_become_markup(results: list[Result]) -> None:
    bad = '"><script>alert(1)</script>'
    evil = made_up("tokens", 3)
    cells = tuple(
        CellFigure(bad, cell.x_km, cell.y_km, cell.cars, cell.tasks, cell.p50_us)
        for cell in evil.cells
    )
    for name, value in (("policy", bad), ("command", bad), ("cells", cells), ("model", bad)):
        changed = Result.from_json({**evil.to_json(), name: value, "cells": []})
        object.__setattr__(changed, "cells", cells)
        assert "script" not in read(page([changed])).names


def test_scenarios_are_drawn_apart(results: list[Result]) -> None:
    text = page([*results, made_up("tokens", 1, cars=1_000_000)])
    assert "10,000 cars, 80 % load" in text and "1,000,000 cars, 80 % load" in text


@pytest.mark.parametrize("count", [0, 300])
def test_too_few_and_too_many_are_named(count: int) -> None:
    with pytest.raises(ValueError, match="report"):
        page([made_up("limit", 1)] * count)


def test_a_result_gives_back_the_quantiles_it_was_made_of() -> None:
    result = made_up("tokens", 1)
    assert len(result.latency_us) == len(QUANTILES) == 200
    assert result.quantile_us(0.5) == pytest.approx(22_000, rel=0.03)
    assert result.share_within(result.quantile_us(0.9)) == pytest.approx(0.9, abs=0.001)
    assert result.unstarted == 100
    assert result.messages_per_task == pytest.approx(3.2, rel=0.001)
    assert Result.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="no task"):
        Result.of(latencies_us=[], messages={})
    with pytest.raises(ValueError, match="QUANTILES"):
        Result.from_json({**result.to_json(), "latency_us": [1]})
