"""`python -m tests.soak kill`: SIGKILL at random moments, over real node processes.

One line a seed, then one JSON object; exit 1 if any seed broke a promise, with the seed and the
folder that keeps its logs and ledgers.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import trio

from .kill import ROLES, Outcome, soak


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kill = commands.add_parser("kill", help="kill nodes in the middle of jobs")
    kill.add_argument(
        "--role",
        default=",".join(ROLES),
        metavar="ROLES",
        help=f"who is killed, in turn: {' and '.join(ROLES)}, comma-separated",
    )
    kill.add_argument("--seeds", type=int, default=20, metavar="N")
    kill.add_argument("--first-seed", type=int, default=0, metavar="N")
    kill.add_argument("--json", action="store_true", help="only the last line, one JSON object")
    args = parser.parse_args(argv)
    args.roles = args.role.split(",")
    if set(args.roles) - set(ROLES):
        kill.error(f"--role knows {', '.join(ROLES)}")
    if args.seeds < 1 or args.first_seed < 0:
        kill.error("--seeds is at least 1, --first-seed at least 0")
    return args


def main() -> int:
    args = parse()

    def tell(outcome: Outcome) -> None:
        if not args.json:
            print(outcome.line, flush=True)

    outcomes = trio.run(
        soak, args.roles, range(args.first_seed, args.first_seed + args.seeds), tell
    )
    broken = [outcome for outcome in outcomes if outcome.violations]
    report: dict[str, Any] = {
        "roles": args.roles,
        "seeds": [outcome.plain() for outcome in outcomes],
        "units": sum(outcome.units for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "accepted": sum(outcome.accepted for outcome in outcomes),
        "accepted_twice": sum(outcome.twice for outcome in outcomes),
        "killed_running": sum(outcome.running for outcome in outcomes),
        "violations": len(broken),
        "ok": not broken,
    }
    print(json.dumps(report))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
