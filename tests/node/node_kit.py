"""Whole nodes in one process for tests: real homes, keys, overlay, journal and workers."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from jaxkernels import host, registry
from meshnode import config
from meshnode.client.orders import Note, Terms, make_order
from meshnode.node import firstrun
from meshnode.protocol.events import JobOrder

SEED = 7
KERNEL = "bench.noop@1"


def make_home(folder: Path, name: str, *, car: bool) -> Path:
    """The home of node `name` in the test network of `SEED`."""
    home = folder / name
    firstrun.init_seeded(home, SEED, name, car=car, now_ms=time.time_ns() // 1_000_000)
    return home


def node_config(
    *, car: bool, join: tuple[str, ...] = (), nobody_ms: int = 15_000
) -> config.NodeConfig:
    preset = config.testnet_car() if car else config.submitter()
    node = config.NodeSettings(
        provides=car,
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=join,
        cell="testnet",
        drain_s=2.0,
    )
    limits = dataclasses.replace(preset.limits, nobody_ms=nobody_ms)
    return dataclasses.replace(preset, node=node, limits=limits)


def noop_order(units: int, *, durable: bool = True, label: str = "") -> JobOrder:
    info = registry.get(KERNEL)
    arg = info.args[0]
    array = np.arange(units * int(np.prod(arg.shape)), dtype=arg.dtype).reshape(units, *arg.shape)
    prepared = host.prepare(KERNEL, array)
    note = Note(KERNEL, dict(prepared.context), label)
    return make_order(prepared, {}, Terms(durable=durable), note)
