"""`python -m tests.soak kill|nodes`: SIGKILL at random moments, over real node processes.

One line a seed, then one JSON object; exit 1 if any seed broke a promise, with the seed and the
folder that keeps its logs and ledgers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from . import kill, nodes
from .judge import Outcome


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    short = commands.add_parser("kill", help="kill one node in the middle of short jobs")
    short.add_argument(
        "--role",
        default=",".join(kill.ROLES),
        metavar="ROLES",
        help=f"who is killed, in turn: {' and '.join(kill.ROLES)}, comma-separated",
    )
    long = commands.add_parser("nodes", help="kill three cars in ten during a long job")
    long.add_argument("--policy", default=nodes.POLICIES[0], choices=nodes.POLICIES)
    long.add_argument("--cars", type=int, default=nodes.CARS, metavar="N")
    long.add_argument("--job-s", type=float, default=nodes.JOB_S, metavar="S", help="job's length")
    for command, seeds in ((short, 20), (long, 5)):
        command.add_argument("--seeds", type=int, default=seeds, metavar="N")
        command.add_argument("--first-seed", type=int, default=0, metavar="N")
        command.add_argument("--json", action="store_true", help="only one JSON object")
    args = parser.parse_args(argv)
    if args.command == "kill":
        args.roles = args.role.split(",")
        if set(args.roles) - set(kill.ROLES):
            short.error(f"--role knows {', '.join(kill.ROLES)}")
    elif args.cars < 2 or args.job_s <= 0:
        long.error("--cars is at least 2, --job-s more than 0")
    if args.seeds < 1 or args.first_seed < 0:
        parser.error("--seeds is at least 1, --first-seed at least 0")
    return args


def report_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    broken = [outcome for outcome in outcomes if outcome.violations]
    return {
        "seeds": [outcome.plain() for outcome in outcomes],
        "units": sum(outcome.units for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "accepted": sum(outcome.accepted for outcome in outcomes),
        "accepted_twice": sum(outcome.twice for outcome in outcomes),
        "violations": len(broken),
        "ok": not broken,
    }


def main() -> int:
    args = parse()

    def tell(outcome: Outcome) -> None:
        if not args.json:
            print(outcome.line, flush=True)

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    report: dict[str, Any]
    if args.command == "kill":
        killed = trio.run(kill.soak, args.roles, seeds, tell)
        running = sum(outcome.running for outcome in killed)
        report = {"roles": args.roles, "killed_running": running, **report_of(killed)}
    else:
        run = partial(nodes.soak, cars=args.cars, job_s=args.job_s)
        shaken = trio.run(run, args.policy, seeds, tell)
        dead = sum(len(outcome.killed) for outcome in shaken)
        report = {"policy": args.policy, "cars_killed": dead, **report_of(shaken)}
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
