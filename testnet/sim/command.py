"""`mesh testnet sim`: a simulated fleet places tasks, and what came of it.

A command of the group in `testnet.command`. Talk goes to stderr; the table or the JSON object on
stdout. The same options give the same digest, on any machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from meshnode.cli import frame
from meshnode.errors import LocalResource, UsageError

if TYPE_CHECKING:
    from .measured import Measured, Setup

CARS_MAX = 1_000_000
SEED_MAX = (1 << 63) - 1
# As in `world`, `network` and `faults`, which load arrays and the protocol: help needs neither.
POLICIES = ("tokens", "gossip", "adverts", "random", "central", "limit")
MODELS = ("metro", "region", "continents")
FAULTS = ("none", "loss", "drives", "churn", "kill", "liars", "ground", "storm")


@click.command(epilog="Example: mesh testnet sim --cars 500 --load 0.8 --seed 1")
@click.option("--cars", type=click.IntRange(1, CARS_MAX), default=500, show_default=True)
@click.option(
    "--load",
    type=click.FloatRange(0.01, 2.0),
    default=0.8,
    show_default=True,
    help="Work that arrives, over what the cars can do.",
)
@click.option("--seed", type=click.IntRange(0, SEED_MAX), default=1, show_default=True)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="tokens",
    show_default=True,
    help="How tasks find cars; random, central and limit are oracles.",
)
@click.option(
    "--model",
    type=click.Choice(MODELS),
    default="continents",
    show_default=True,
    help="Where the cars are.",
)
@click.option(
    "--task-s",
    type=click.FloatRange(0.01, 3_600.0),
    default=2.0,
    show_default=True,
    help="Mean length of a task; lengths are exponential.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.5, 3_600.0),
    default=20.0,
    show_default=True,
    help="Measured time, after the fleet has filled up.",
)
@click.option(
    "--faults",
    type=click.Choice(FAULTS),
    default="none",
    show_default=True,
    help="What goes wrong within the measured time.",
)
@click.option(
    "--sleep-s",
    type=click.FloatRange(0.0, 3_600.0),
    help="So long at most a car sleeps that its cell does not need; 0: none does. "
    "[default: 0; 3600 with --vehicles]",
)
@click.option("--parking", is_flag=True, help="Cars come and go as published stays say.")
@click.option(
    "--vehicles",
    is_flag=True,
    help="Cars with batteries, chargers, tariffs and drivers; runs of 5 to 15 minutes.",
)
@click.option(
    "--days",
    type=click.FloatRange(0.01, 7.0),
    default=7.0,
    show_default=True,
    help="With --vehicles: so long, from a Monday on.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE.html",
    help="Also write a page that shows the run beside the oracles.",
)
@frame.json_option
def sim(
    cars: int,
    load: float,
    seed: int,
    policy: str,
    model: str,
    task_s: float,
    seconds: float,
    faults: str,
    sleep_s: float | None,
    parking: bool,
    vehicles: bool,
    days: float,
    report: str | None,
) -> None:
    """Simulate a fleet: the real protocol machines on a drawn network, one event after the other.

    Prints how long tasks took from submission to start and how many messages each cost, and a
    digest of all events: the same options give the same digest.
    """
    if vehicles:
        _week(cars, load, seed, days, sleep_s)
        return
    from .measured import Setup
    from .world import simulate

    setup = Setup(
        cars=cars,
        load=load,
        seed=seed,
        policy=policy,
        model=model,
        task_s=task_s,
        seconds=seconds,
        faults=faults,
        sleep_s=sleep_s or 0.0,
        parking=parking,
    )
    try:
        measured = simulate(setup, frame.talk)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if report is not None:
        _write_report(measured, report)
    if frame.face().json:
        frame.put_json(measured.fields())
        return
    _print(measured)


_ONLY_TASKS = ("policy", "model", "task_s", "seconds", "faults", "parking", "report")


def _week(cars: int, load: float, seed: int, days: float, sleep_s: float | None) -> None:
    from meshnode.protocol.types import SLEEP_MS_MAX

    from .week import simulate_week

    context = click.get_current_context()
    for name in _ONLY_TASKS:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} and --vehicles exclude each other")
    if sleep_s is None:  # who is awake and idle costs its owner more than a run
        sleep_s = SLEEP_MS_MAX / 1_000
    found = simulate_week(cars, load, seed, days, frame.talk, sleep_s)
    fields = found.fields()
    if frame.face().json:
        frame.put_json(fields)
        return
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.shares.items())
    lines = [
        ("runs", f"{found.done} of {found.tasks} done, {found.recalls} ended by a recall"),
        ("time", shares),
        ("floor", f"{found.below_floor_min} minutes of work below it"),
        ("reserve", f"drawn into by work before {found.reserve_missed} departures"),
        ("drives", f"{found.short_wh} Wh short because of work"),
        ("work", f"{found.work_mwh / 1e6:.3f} kWh out of packs and plugs"),
        (
            "receipts",
            f"{found.receipts_mwh / 1e6:.3f} kWh, and {found.unpaid_mwh / 1e6:.3f} of "
            "runs that a driver ended",
        ),
        (
            "standby",
            f"{found.standby_mwh / 1e6:.3f} kWh, {fields['standby_per_useful']} for each of work",
        ),
        (
            "cost",
            f"{found.cost_nano / 1e9:.2f}, {found.unpaid_nano / 1e9:.2f} of it for ended runs",
        ),
        (
            "income",
            f"{found.income_nano / 1e9:.2f} at the floor price, {found.due_nano / 1e9:.2f} "
            f"still due; each car has {found.income_permille_least / 10:.1f} % of its cost or more",
        ),
        ("run", f"{found.events} events in {found.cpu_s:.0f} s of CPU, digest {found.digest[:16]}"),
    ]
    for word, said in lines:
        click.echo(f"{word:<9} {said}")


def _write_report(measured: Measured, path: str) -> None:
    """The run, and on the same cars and tasks those oracles that it is not itself."""
    from .oracles import ORACLES
    from .report import write_report
    from .workload import lay_out
    from .world import simulate

    setup = measured.setup
    runs = [measured]
    for policy in ORACLES:
        if policy != setup.policy:
            frame.talk(f"the oracle {policy}, for comparison")
            runs.append(simulate(replace(setup, policy=policy)))
    network = lay_out(setup.model, setup.cars, setup.seed).network
    try:
        results = [run.result(network, _command(run.setup)) for run in runs]
        write_report(results, path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise LocalResource(f"{path} cannot be written: {error}") from None
    frame.talk(f"wrote {path}")


def _command(setup: Setup) -> str:
    """What a person types to get these figures again."""
    more = f" --faults {setup.faults}" if setup.faults != "none" else ""
    more += f" --sleep-s {setup.sleep_s:g}" if setup.sleep_s else ""
    more += " --parking" if setup.parking else ""
    return (
        f"mesh testnet sim --cars {setup.cars} --load {setup.load:g} --seed {setup.seed} "
        f"--policy {setup.policy} --model {setup.model} --task-s {setup.task_s:g} "
        f"--seconds {setup.seconds:g}{more}"
    )


def _print(measured: Measured) -> None:
    setup = measured.setup
    fields = measured.fields()
    failed = ", ".join(f"{count} {reason}" for reason, count in fields["failed"].items())
    frame.put_table(
        ("POLICY", "CARS", "LOAD", "TASKS", "STARTED", "P50_MS", "P95_MS", "P99_MS", "MSGS/TASK"),
        [
            (
                setup.policy,
                setup.cars,
                f"{setup.load:g}",
                fields["tasks"],
                fields["started"],
                *(f"{fields[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
                f"{fields['messages_per_task']:.1f}",
            )
        ],
    )
    click.echo()
    rows = [(kind, f"{count:.2f}") for kind, count in fields["messages"].items()]
    frame.put_table(("MESSAGE", "PER_TASK"), rows)
    click.echo()
    if fields["stances"]:
        shares = ", ".join(f"{share:.1%} {stance}" for stance, share in fields["stances"].items())
        click.echo(f"cars        {shares}")
    click.echo(f"failed      {failed or 'none'}")
    click.echo(f"signatures  {fields['signatures']}, membership by {fields['membership']}")
    rate = measured.events / max(measured.wall_s, 1e-9)
    click.echo(
        f"events      {measured.events} in {measured.wall_s:.1f} s, {rate:.0f} a second, "
        f"{measured.simulated_s:.0f} s simulated"
    )
    click.echo(f"digest      {measured.digest}")
