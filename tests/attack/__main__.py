"""`python -m tests.attack [--json]`: every attack on a live node, with its guards and without.

`--target HOST:PORT --peer ID` attacks a node that is running already (in the middle of a job, say)
with all attacks that need nothing but its address; it must survive them. `--during-job` alone
starts a testnet and attacks one of its cars while jobs run on it: they must finish and be right.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import trio

from meshnode.protocol.types import Peer

from .attacks import ATTACKS, Attack
from .scene import Target, own_node
from .trial import holds, judge, try_without


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the last line, one JSON object")
    parser.add_argument("--quick", action="store_true", help="leave out the slow attacks")
    parser.add_argument("--only", metavar="NAME", action="append", help="this attack; repeatable")
    parser.add_argument("--target", metavar="HOST:PORT", help="a running node to attack")
    parser.add_argument("--peer", metavar="ID", help="its peer id")
    parser.add_argument(
        "--during-job",
        action="store_true",
        help="attack a car in the middle of a job; without --target in a testnet of its own",
    )
    args = parser.parse_args(argv)
    if (args.target is None) != (args.peer is None):
        parser.error("--target and --peer go together")
    return args


def chosen(args: argparse.Namespace) -> list[Attack]:
    picked = [attack for attack in ATTACKS if not (args.quick and attack.slow)]
    if args.target is not None:
        picked = [attack for attack in picked if not attack.measured]
    if args.only:
        unknown = set(args.only) - {attack.name for attack in picked}
        if unknown:
            raise SystemExit(f"no such attack: {', '.join(sorted(unknown))}")
        picked = [attack for attack in picked if attack.name in args.only]
    return picked


def target_of(args: argparse.Namespace) -> Target:
    from libp2p.peer.id import ID

    host, _, port = args.target.rpartition(":")
    peer = Peer(ID.from_base58(args.peer).to_bytes())
    return Target(f"/ip4/{host}/tcp/{port}", peer)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {"ok": True}

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if not args.json:
            unguarded = row.get("unguarded") or "-"
            print(f"{row['name']:28} guarded {row['guarded']:10} unguarded {unguarded}", flush=True)

    if args.target is not None:
        target = target_of(args)
        for attack in chosen(args):
            note({"name": attack.name, "guarded": await judge(attack, target, None)})
    elif args.during_job:
        from .during_job import during_job

        more = await during_job(chosen(args), note)
    else:
        # One guarded node takes all of them, one after the other.
        async with own_node() as (node, target):
            for attack in chosen(args):
                guarded = await judge(attack, target, node)
                note(
                    {
                        "name": attack.name,
                        "guards": sorted(attack.guards),
                        "guarded": guarded,
                        "unguarded": await try_without(attack),
                    }
                )
    return {"attacks": rows, **more, "ok": more["ok"] and all(map(holds, rows))}


def main() -> int:
    args = parse()
    outcome = trio.run(run, args)
    print(json.dumps(outcome))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
