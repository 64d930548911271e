"""`mesh explain`, and what `--dry-run` prints: why a job's runs wait, or went where they went."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from . import frame
from .jobs import JOB
from .reach import connected

RUNS_SHOWN_MAX: Final = 20
NO_CAR_EXIT: Final = 3  # as of NoSuitableNode, which a submission would end with
_HOW: Final = {
    "offer": "chosen",
    "bid": "it bid for it",
    "token": "idle, as a rendezvous knew",
    "": "before this node's last start",
}

_BY: Final = {
    "offer": "asked",
    "announce": "asked by an announcement",
    "place": "asked through a rendezvous",
}


@click.command(epilog="Example: mesh explain 3f2a")
@JOB
@frame.home_options
@frame.json_option
def explain(job_id: str, home: Path) -> None:
    """Say why a job's runs wait or went where they went, and what would help.

    Counts the cars that this node knows or has asked by their reasons, with up to three examples
    in the cars' own words; nobody is asked for it. Each run is shown with what its car was chosen
    by: an idle car before a busy one, one that holds the code and constants already (warm) unless
    it is much farther away, then the nearer, then the faster one; one that was far slower than
    others comes last. A run that takes longer than 95 of 100 such runs is started once more on an
    idle car, and says so; the first whole result counts.

    JOB is the job's id or its first characters, of a job that runs or has ended.
    """
    with connected(home) as mesh:
        found = mesh.explain(mesh.find(job_id))
    if frame.face().json:
        frame.put_json({"explanation": found})
        return
    state = found["state"]
    why = "" if state in ("done", "running") else f", {found['text']}"
    click.echo(f"job       {found['job_id'].hex()} {found['kernel']}")
    click.echo(f"state     {state}{why}")
    done = "?" if found["done"] is None else found["done"]
    left = f", {found['in_work']} in work, {found['waiting']} waiting" * (state == "running")
    click.echo(f"units     {done} of {found['units']} done{left}")
    if state == "running":
        has = f"{found['cars_working']} with a run of it"
        free = f"{found['cars_open']} would take one now"
        click.echo(f"cars      {found['cars_known']} known, {has}, {free}")
    for wait in found["waits"]:
        until = "" if wait["until_ms"] is None else f", {_ms(wait['until_ms'])} at the most"
        click.echo(f"waits     {_many(wait['units'], 'unit')}: {wait['reason']['text']}{until}")
    _put_stands(found["stands"])
    if found["advice"]:
        click.echo(f"help      {found['advice']}")
    if found["runs_left_out"] is None:
        click.echo("runs      not known any more: the job is of before this node's last start")
    _put_runs(found)


def _put_stands(stands: list[dict[str, Any]]) -> None:
    for stand in stands:
        again = "" if stand["again_ms"] is None else f"; asked again in {_ms(stand['again_ms'])}"
        text = f"{_name(stand['reason']['code'])}, {stand['reason']['text']}{again}"
        click.echo(f"why not   {_many(stand['cars'], 'car')}: {text}")
        for example in stand["examples"]:
            said = f": {example['text']}" if example["text"] else ""
            click.echo(f"          {_car(example['peer'])}{said}")


def _put_runs(found: dict[str, Any]) -> None:
    runs = found["runs"][-RUNS_SHOWN_MAX:]
    if not runs:
        return
    click.echo("")
    left_out = len(found["runs"]) - len(runs) + (found["runs_left_out"] or 0)
    if left_out:
        click.echo(f"{_many(left_out, 'earlier run')} left out; --json has the newest 256")
    headers = ("UNITS", "ATTEMPT", "CAR", "STATE", "DONE", "WHY THAT CAR", "REASON")
    frame.put_table(headers, [_run(run) for run in runs])


def _run(run: dict[str, Any]) -> tuple[object, ...]:
    last = run["first"] + run["count"] - 1
    reason = run["reason"]["text"] if run["reason"]["code"] else ""
    units = f"{run['first']}-{last}"
    car, why = _car(run["peer"]), _chosen(run)
    return units, run["attempt"], car, run["state"], run["done"], why, reason


def _chosen(run: dict[str, Any]) -> str:
    car, how = run["chosen"], _HOW.get(run["how"], str(run["how"]))
    late = run["late"]
    if late is not None:  # a hedge
        spent, usual = _ms(late["spent_ms"]), _ms(late["usual_ms"])
        how = f"attempt {late['attempt']} was late ({spent}, 95 in 100 take {usual}); {how}"
    if car is None:
        return how
    return f"{how} of {run['among']} with room: {_traits(car)}"


def _traits(car: dict[str, Any]) -> str:
    """What placement compares, in its order."""
    idle = "idle" if car["idle"] else "busy"
    warm = "warm" if car["warm"] else "cold"
    near = f"{car['rtt_us'] / 1000:.1f} ms away" if car["rtt_us"] else "distance not measured"
    return f"{idle}, {warm}, {near}, {car['rate_mflops'] / 1000:.0f} GFLOP/s"


# ---- --dry-run


def put_would(found: dict[str, Any]) -> None:
    """What a submission would do; ends with exit code 3 if it would ask no car."""
    if frame.face().json:
        frame.put_json({"would": found})
    else:
        _put_would(found)
    if not found["cars_asked"]:
        frame.talk(f"no car would be asked; {found['advice']}".rstrip("; "))
        raise click.exceptions.Exit(NO_CAR_EXIT)
    frame.talk("nothing was submitted; leave out --dry-run to do it")


def _put_would(found: dict[str, Any]) -> None:
    click.echo(f"job       {found['kernel']}, {_many(found['units'], 'unit')}")
    kflop = f"{found['kflop_per_unit']:,} kFLOP, " if found["kflop_per_unit"] else ""
    size = f"{found['bytes_in_per_unit']:,} bytes in, {found['bytes_out_per_unit']:,} out"
    click.echo(f"a unit    {kflop}{size}")
    if found["bytes_once"]:
        click.echo(f"once      {found['bytes_once']:,} bytes to each car that does not hold them")
    if found["unit_ms"] is not None:
        energy = f"at most {found['unit_energy_mwh']:.3g} mWh"
        click.echo(f"expected  {found['unit_ms']:.3g} ms and {energy} a unit on the first car")
    asked = f"{found['cars_asked']} of {found['cars_known']} known"
    click.echo(f"cars      {asked} would be {_BY[found['how']]}")
    _put_stands(found["stands"])
    if found["asked"]:
        click.echo("")
        rows = [(_car(one["peer"]), _traits(one["car"]), _before(one)) for one in found["asked"]]
        frame.put_table(("CAR", "BY WHAT IT IS CHOSEN", "BEFORE THAT"), rows)
        left_out = found["cars_asked"] - len(found["asked"])
        if left_out:
            click.echo(f"and {_many(left_out, 'more car')}")


def _before(one: dict[str, Any]) -> str:
    return one["reason"]["text"] if one["reason"]["code"] else ""


# ---- words


def _car(peer: bytes) -> str:
    return frame.ident(peer)[-8:]


def _name(code: int) -> str:
    from meshnode.node.failures import reason_of

    reason = reason_of(code)
    return reason.name if reason is not None else str(code)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _ms(ms: int) -> str:
    return f"{ms} ms" if ms < 1_000 else f"{ms / 1000:.1f} s"
