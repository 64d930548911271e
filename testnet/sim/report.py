"""Simulated runs as one page to look at: every policy beside the limit, and how to get it again.

    write_report(results, "out.html")

One file that loads nothing: no script, no font, no address of another machine, and a content
policy that forbids them. Runs of one scenario (network, cars, load, length of a task) are drawn
together; the last section lists every run with its seed and its command.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from .charts import cell_map, distribution, duration, messages, sample, shades
from .result import Result

RESULTS_MAX: Final = 200
SCENARIOS_MAX: Final = 12

Scenario = tuple[str, int, float, float]

WHERE: Final = {
    "metro": "one metro area",
    "region": "one continent",
    "continents": "five continents",
}
WHAT: Final = {
    "tokens": "idle cars leave a token with their rendezvous, which hands each task to a near one",
    "limit": "the physical limit: one message to the nearest idle car, known without asking",
    "central": "one scheduler that knows every car and is infinitely fast",
    "adverts": "offers to cars that said in their last advert that they were idle",
    "gossip": "each task is announced to the whole cell, and who is idle bids",
    "random": "any car, idle or not",
}


def write_report(results: Sequence[Result], path: str | Path) -> None:
    """Writes the page. ValueError without results or with more than it could show."""
    Path(path).write_text(page(results), encoding="utf-8")


def page(results: Sequence[Result]) -> str:
    """The page as text; see `write_report`."""
    if not results:
        raise ValueError("a report needs at least one result")
    if len(results) > RESULTS_MAX:
        raise ValueError(f"a report shows at most {RESULTS_MAX} results, not {len(results)}")
    scenarios: dict[Scenario, list[Result]] = {}
    for result in results:
        key = (result.model, result.cars, result.load, result.task_s)
        scenarios.setdefault(key, []).append(result)
    if len(scenarios) > SCENARIOS_MAX:
        raise ValueError(f"a report shows at most {SCENARIOS_MAX} scenarios, not {len(scenarios)}")
    body = "".join(_scenario(key, runs) for key, runs in scenarios.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>How fast a task finds a car</title>\n<style>{STYLE}</style>\n</head>\n"
        "<body>\n<header><h1>How fast a task finds a car</h1>"
        "<p>From the moment a task is submitted to the moment a parked car starts it, for each way "
        "of choosing the car. Simulated; every figure comes with the command that gives it "
        "again.</p></header>\n"
        f"<main>{body}{_table(results)}</main>\n</body>\n</html>\n"
    )


def _scenario(key: Scenario, runs: Sequence[Result]) -> str:
    model, cars, load, task_s = key
    runs = sorted(runs, key=lambda run: (run.quantile_us(0.5), run.seed))
    drawn = _one_a_policy(runs)
    mapped = next((run for run in drawn if run.policy == "tokens" and run.cells), None)
    mapped = mapped or next((run for run in drawn if run.cells), None)
    legend = "".join(
        f"<li>{sample(run.policy)}<span><b>{escape(run.policy)}</b> "
        f"{escape(WHAT.get(run.policy, ''))}</span></li>"
        for run in drawn
    )
    return (
        f"<section><h2>{cars:,} cars, {load * 100:g} % load</h2>"
        f'<p class="sub">{escape(WHERE.get(model, model))}, tasks of {task_s:g} s</p>'
        f"{_headline(drawn)}"
        '<div class="pair">'
        f"<figure>{distribution(drawn, tail=False)}<figcaption>Share of tasks started within a "
        "time. Marks: half, 95 and 99 of 100.</figcaption></figure>"
        f"<figure>{distribution(drawn, tail=True)}<figcaption>The same, with the slowest tasks "
        "spread out: each line of the grid is the next nine.</figcaption></figure></div>"
        f'<ul class="legend">{legend}</ul>'
        f'<div class="pair narrow"><figure>{messages(drawn)}<figcaption>Messages sent to place one '
        "task.</figcaption></figure>"
        f"{_kinds(drawn)}</div>"
        f"{_map(mapped) if mapped else ''}</section>"
    )


def _one_a_policy(runs: Sequence[Result]) -> list[Result]:
    """Of several seeds the one in the middle is drawn; the table lists them all."""
    policies = dict.fromkeys(run.policy for run in runs)
    found = []
    for policy in policies:
        mine = [run for run in runs if run.policy == policy]
        found.append(mine[(len(mine) - 1) // 2])
    return found


def _headline(drawn: Sequence[Result]) -> str:
    """The three figures of idle tokens, each beside the limit's if that was run."""
    ours = next((run for run in drawn if run.policy == "tokens"), drawn[0])
    limit = next((run for run in drawn if run.policy == "limit"), None)
    tiles = []
    for name, share in (("half start within", 0.5), ("99 of 100 within", 0.99)):
        us = ours.quantile_us(share)
        beside = f"limit {duration(limit.quantile_us(share))}" if limit else ""
        tiles.append((duration(us), name, beside))
    beside = f"limit {limit.messages_per_task:.1f}" if limit else ""
    tiles.append((f"{ours.messages_per_task:.1f}", "messages a task", beside))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}</dd><dd>{escape(beside)}</dd></div>"
        for figure, name, beside in tiles
    )
    return f'<p class="of"><b>{escape(ours.policy)}</b></p><dl class="tiles">{shown}</dl>'


def _kinds(drawn: Sequence[Result]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(run.policy)}</th><td>'
        + ", ".join(
            f'{escape(kind)} <span class="n">{count:,.2f}</span>'
            for kind, count in sorted(run.messages.items(), key=lambda item: -item[1])
        )
        + "</td></tr>"
        for run in drawn
    )
    return (
        '<div class="kinds"><table><caption>Which messages, a task</caption>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _map(run: Result) -> str:
    edges = [duration(edge) for edge in shades(run.cells)]
    keys = "".join(
        f'<li><svg viewBox="0 0 16 16" aria-hidden="true"><circle class="cell m{number}'
        f'{" slow" if number == len(edges) else ""}" cx="8" cy="8" r="6"/></svg>{escape(text)}</li>'
        for number, text in enumerate(
            [
                *(f"under {edge}" for edge in edges[:1]),
                *(f"to {edge}" for edge in edges[1:]),
                *(f"{edge} and more" for edge in edges[-1:]),
            ]
        )
    )
    cars = sum(cell.cars for cell in run.cells)
    shown = f"{len(run.cells):,} cells" + (" of a larger fleet" if cars < run.cars else "")
    return (
        f'<figure class="map">{cell_map(run.cells)}<ul class="keys">{keys}</ul>'
        f"<figcaption>{shown}, with {escape(run.policy)}: area by cars, shade by the time within "
        "which half of the tasks submitted there start; the slowest fifth has a ring.</figcaption>"
        "</figure>"
    )


def _table(results: Sequence[Result]) -> str:
    rows = []
    for run in results:
        figures = (
            f"{run.cars:,}",
            f"{run.load * 100:g} %",
            *(duration(run.quantile_us(share)) for share in (0.5, 0.95, 0.99)),
            f"{run.messages_per_task:,.2f}",
            f"{run.tasks:,}",
            f"{run.unstarted:,}",
            f"{run.seed}",
        )
        cells = "".join(f'<td class="n">{escape(figure)}</td>' for figure in figures)
        rows.append(
            f'<tr><th scope="row">{escape(run.policy)}<small>{escape(run.engine)}, '
            f"{escape(run.model)}</small></th>{cells}</tr>"
            f'<tr class="command"><td colspan="{len(figures) + 1}">'
            f"<code>{escape(run.command)}</code></td></tr>"
        )
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in (
            *("policy", "cars", "load", "p50", "p95", "p99"),
            *("messages", "tasks", "not started", "seed"),
        )
    )
    return (
        '<section><h2>Every run</h2><div class="scroll" role="region" tabindex="0" '
        'aria-label="Table of every run; scrolls sideways"><table class="runs"><thead><tr>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="sub">event: the protocol\'s own code under a seeded event heap; oracle: a '
        "policy that knows what no car can know; fleet: the vectorised model. Times are from "
        "submit to start. Tasks that had not started when the run ended have no time.</p></section>"
    )


STYLE: Final = """
:root{--ink:#1d2521;--soft:#5b6661;--line:#dfe4e0;--paper:#fbfbf8;--card:#fff;
--p0:#0a7a55;--p1:#5b6661;--p2:#2f5fb3;--p3:#a35c00;--p4:#9a3fa0;--p5:#b3362b;
--m0:#d3eadf;--m1:#9fd2bb;--m2:#5fb292;--m3:#23876a;--m4:#0b4f3f;--ring:#1d2521}
@media (prefers-color-scheme:dark){:root{--ink:#e7ece8;--soft:#9caaa2;--line:#2c3531;
--paper:#121614;--card:#181d1a;
--p0:#46d39b;--p1:#a9b5ae;--p2:#82aaff;--p3:#f0a848;--p4:#dc8fe0;--p5:#ff8a7d;
--m0:#1f4638;--m1:#2b6b54;--m2:#3c9676;--m3:#63c49f;--m4:#b6f0d6;--ring:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header,main{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem;letter-spacing:-.01em}
header p{max-width:44rem;margin:0;color:var(--soft)}
section{padding:2.25rem 0 .5rem;border-top:1px solid var(--line);margin-top:2.25rem}
h2{font-size:1.3rem;margin:0;line-height:1.3}
.sub{color:var(--soft);margin:.1rem 0 1.25rem;font-size:.92rem;max-width:48rem}
.of{margin:0 0 .4rem}
.tiles{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.75rem;margin:0 0 1.5rem;
max-width:38rem}
.tiles div{border-left:3px solid var(--p0);padding-left:.75rem;display:flex;flex-direction:column}
.tiles dt{order:2;color:var(--soft);font-size:.85rem;line-height:1.3}
.tiles dd{margin:0;font-size:1.5rem;font-weight:600;line-height:1.2}
.tiles dd+dd{order:3;font-size:.85rem;font-weight:400;color:var(--soft);line-height:1.4}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:1.25rem;align-items:start}
figure,.kinds{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.9rem}
.figure{display:block;width:100%;height:auto}
figcaption,caption{color:var(--soft);font-size:.88rem;line-height:1.4;text-align:left;
margin-top:.5rem}
caption{margin:0 0 .4rem}
svg text{fill:var(--ink);font-size:11.5px;font-variant-numeric:tabular-nums}
svg text.axis{fill:var(--soft)}
svg text.name,svg text.value{font-size:13px}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.line.p0{stroke-width:3}
.bar{fill:var(--c)}
.mark{fill:var(--card);stroke:var(--c);stroke-width:1.8}
.p0{--c:var(--p0)}.p1{--c:var(--p1)}.p2{--c:var(--p2)}
.p3{--c:var(--p3)}.p4{--c:var(--p4)}.p5{--c:var(--p5)}
.legend{list-style:none;margin:1rem 0 1.5rem;padding:0;display:grid;gap:.35rem 1.5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));font-size:.92rem}
.legend li{display:flex;gap:.6rem;align-items:flex-start}
.sample{width:44px;height:14px;flex:none;margin-top:.3rem}
.map{margin-top:1.25rem}
.cell{stroke:var(--card);stroke-width:.6}
.cell.slow{stroke:var(--ring);stroke-width:1.3}
.m0{fill:var(--m0)}.m1{fill:var(--m1)}.m2{fill:var(--m2)}.m3{fill:var(--m3)}.m4{fill:var(--m4)}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.6rem 0 0;padding:0;
font-size:.88rem}
.keys li{display:flex;align-items:center;gap:.35rem}
.keys svg{width:16px;height:16px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .6rem .35rem 0;vertical-align:top;font-weight:400}
th[scope=row]{font-weight:600;white-space:nowrap}
thead th{color:var(--soft);border-bottom:1px solid var(--line);white-space:nowrap}
.kinds tr+tr>*{border-top:1px solid var(--line)}
.n{font-variant-numeric:tabular-nums}
.runs .n,.runs thead th+th{text-align:right;white-space:nowrap}
.runs small{display:block;font-weight:400;color:var(--soft)}
.runs tbody tr:nth-child(odd)>*{border-top:1px solid var(--line);padding-top:.6rem}
.command td{padding-bottom:.6rem}
code{font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--soft);
overflow-wrap:anywhere;display:block;position:sticky;left:0;max-width:calc(100vw - 3rem)}
.scroll{overflow-x:auto;margin-top:1rem}
.scroll:focus-visible{outline:2px solid var(--p2);outline-offset:2px}
main{padding-bottom:3rem}
@media (max-width:30rem){h1{font-size:1.5rem}.tiles dd{font-size:1.15rem}
.tiles div{padding-left:.5rem}figure,.kinds{padding:.6rem}
svg text{font-size:13.5px}svg text.name,svg text.value{font-size:15px}}
@media print{body{background:#fff}figure,.kinds{break-inside:avoid}}
"""
