"""Whole nodes in one process for tests: real homes, keys, overlay, journal and workers."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path

import numpy as np

from jaxkernels import host
from meshnode import config
from meshnode.client.orders import Note, Terms, inline_args, make_order
from meshnode.ledger.blobs import blob_id_of
from meshnode.node import firstrun
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import CHUNK_BYTES, BlobRef

SEED = 7
KERNEL = "bench.noop@1"


def make_home(folder: Path, name: str, *, car: bool) -> Path:
    """The home of node `name` in the test network of `SEED`."""
    home = folder / name
    firstrun.init_seeded(home, SEED, name, car=car, now_ms=time.time_ns() // 1_000_000)
    return home


def node_config(
    *, car: bool, join: tuple[str, ...] = (), nobody_ms: int = 60_000
) -> config.NodeConfig:
    """`nobody_ms`: on a slow machine a car and a submitter take long to meet."""
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


def stacked(units: int) -> host.Array:
    """Inputs of bench.noop."""
    return np.arange(units * 16, dtype=np.float32).reshape(units, 16)


def noop_order(units: int, *, durable: bool = True, label: str = "") -> JobOrder:
    """Inline if it is small, else by the reference of a blob that the test must put."""
    prepared = host.prepare(KERNEL, stacked(units))
    blobs = {}
    if not inline_args(prepared):
        content = prepared.args[0].array.tobytes()
        pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
        digests = [hashlib.sha256(piece).digest() for piece in pieces]
        blobs[0] = BlobRef(blob_id_of(len(content), digests), len(content))
    note = Note(KERNEL, dict(prepared.context), label)
    return make_order(prepared, blobs, Terms(durable=durable), note)
