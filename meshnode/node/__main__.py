"""`python -m meshnode.node --home H`: a node as a process of its own.

What `meshnode run` starts, what a testnet starts many times, and what `mesh` starts in the
background where no node runs. Its standard error is its log.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path

from meshnode import config as configs
from meshnode.errors import MeshError


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m meshnode.node", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--role", choices=sorted(configs.PRESETS), default="car")
    parser.add_argument("--listen", action="append", metavar="MULTIADDR")
    parser.add_argument("--join", action="append", default=[], metavar="MULTIADDR")
    parser.add_argument("--cell")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--zygote-parent", metavar="SOCKET")
    parser.add_argument("--idle-exit-s", type=float)
    parser.add_argument("--ready-fd", type=int, help="a JSON line is written there when ready")
    parser.add_argument("--detach", action="store_true", help="go on in a child, return at once")
    parser.add_argument("--log-level", default="WARNING")
    return parser.parse_args(arguments)


def configured(given: argparse.Namespace) -> configs.NodeConfig:
    """The preset of the role, what the home's file says, what the command line says."""
    config = configs.load(given.home, configs.PRESETS[given.role]())
    node, compute = config.node, config.compute
    if given.listen:
        node = dataclasses.replace(node, listen=tuple(given.listen))
    if given.join:
        node = dataclasses.replace(node, bootstrap=(*node.bootstrap, *given.join))
    if given.cell:
        node = dataclasses.replace(node, cell=given.cell)
    if given.idle_exit_s is not None:
        node = dataclasses.replace(node, idle_exit_s=given.idle_exit_s)
    if given.slots is not None:
        compute = dataclasses.replace(compute, slots=given.slots)
    if given.zygote_parent:
        compute = dataclasses.replace(compute, zygote_parent=given.zygote_parent)
    return dataclasses.replace(config, node=node, compute=compute)


def run(arguments: list[str]) -> int:
    given = read_arguments(arguments)
    if given.detach and os.fork():
        return 0
    try:
        config = configured(given)
    except MeshError as error:
        print(f"meshnode: {error}", file=sys.stderr)
        return error.exit_code
    logging.basicConfig(
        level=given.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from .app import main  # loads libp2p: after the arguments have been understood

    return main(given.home, config, given.ready_fd)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
