"""What accelerators are here and how fast: measured in a process that is thrown away.

Forked by `zygote` on the executor's `probe`; says one PROBED frame and ends, so that the node
never pays for a backend that it only wanted to ask.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from typing import Any, Final

import jax
import jax.export
import jax.numpy as jnp
import jaxlib.version

from meshnode.executor import wire
from meshnode.protocol.types import CLASSES_MAX

from . import confine
from .compiling import cpu_features

MATMUL_N: Final = 512
MEASURE_S: Final = 0.2
CLASS_DIGEST_BYTES: Final = 8


def serve(sock: socket.socket, terms: confine.Terms) -> None:
    taken = confine.before_backend(terms)
    jax.devices()  # starts the backend and its threads
    layers = confine.after_backend(terms, taken)  # a layer that is missing ends it: no worker
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for device in jax.devices():
        key = (device.platform, device.device_kind)
        if key not in seen and len(seen) < CLASSES_MAX:  # equal devices are one class
            seen[key] = _measure(device)
    answer = {
        "classes": list(seen.values()),
        "jaxlib": jaxlib.version.__version__,
        "jax_window": [
            jax.export.minimum_supported_calling_convention_version,
            jax.export.maximum_supported_calling_convention_version,
        ],
        "sandbox_layers": int(layers),
    }
    sock.sendall(wire.frame(wire.PROBED, json.dumps(answer).encode()))


def _measure(device: jax.Device) -> dict[str, Any]:
    name = "cuda" if device.platform == "gpu" else device.platform
    return {
        "platform": name,
        "kind": device.device_kind[:64],
        "memory_mb": _memory_mb(device),
        "rate_mflops": _rate_mflops(device),
        "class_digest": _class_digest(device, name).hex(),
    }


def _rate_mflops(device: jax.Device) -> int:
    """Sustained f32 matrix products at full precision: what the built-in kernels ask for."""
    x = jax.device_put(jnp.ones((MATMUL_N, MATMUL_N), jnp.float32), device)
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision="highest") * (1.0 / MATMUL_N))
    y = multiply(x).block_until_ready()
    rounds, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < MEASURE_S:
        for _ in range(4):
            y = multiply(y)
        y.block_until_ready()
        rounds += 4
    return max(1, round(2 * MATMUL_N**3 * rounds / elapsed / 1e6))


def _memory_mb(device: jax.Device) -> int:
    stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"]) >> 20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _class_digest(device: jax.Device, name: str) -> bytes:
    """Equal digest: equal bits are to be expected of the same unit."""
    features = cpu_features() if name == "cpu" else str(device.client.platform_version)
    parts = (
        name,
        device.device_kind,
        features,
        jaxlib.version.__version__,
        os.environ.get("XLA_FLAGS", ""),
    )
    text = "\x00".join(parts).encode()
    return hashlib.sha256(text).digest()[:CLASS_DIGEST_BYTES]
