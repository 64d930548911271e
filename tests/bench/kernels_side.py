"""`bench kernels`, one side: a process that prepares, times and forgets the tasks of one system.

Speaks JSON lines with `tests.bench.kernels`: {"prepare": task} -> {"answer": [numbers to compare]},
{"time": task, "turn_s": s} -> {"ms": median of the calls that fit,
"best_ms": the fastest}, {"forget": task} -> {}.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkernels import registry
from jaxkernels.host import Array
from jaxkernels.vec_knn.api import QUERIES, ROWS, WIDTH

SEED = 0
MD_STEPS = 20
CALLS_MAX = 1000


class Task(NamedTuple):
    """`call` is what is timed, and does `per_call` of what the figure counts."""

    call: Callable[[], Any]
    answer: Callable[[Any], Sequence[Array]]  # from what `call` gives to the kernel's outputs
    per_call: int = 1


def sample(spec: str) -> tuple[Array, ...]:
    """The arguments that all sides get: those of the kernel's reference."""
    info = registry.get(spec)
    reference = importlib.import_module(f"jaxkernels.{info.package}.reference")
    args: tuple[Array, ...] = reference.sample_args(np.random.default_rng(SEED))
    return args


def search() -> tuple[Array, Array, Array]:
    """A block without padding: unit vectors, all of them valid."""
    rng = np.random.default_rng(SEED)
    vectors = rng.standard_normal((QUERIES + ROWS, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:QUERIES].copy(), vectors[QUERIES:].copy(), np.array([ROWS], np.int32)


def pricing(dates: int) -> tuple[Array, Array]:
    """A call at the money over one year, its mean taken over `dates`."""
    terms = [100.0, 1.0, 0.01 / dates, 0.2 / dates**0.5, 0.97, 1.0]
    return np.array(terms, np.float32), np.array([dates, 7, 0], np.int32)


def fingerprint(outs: Sequence[Array]) -> list[float]:
    """A few numbers that tell a wrong answer from a right one."""
    found: list[float] = []
    for out in outs:
        flat = np.asarray(out, dtype=np.float64).ravel()
        found += [float(np.abs(flat).mean()), float(flat[0]), float(flat[len(flat) // 2])]
    return found


def _timed(task: Task, turn_s: float) -> dict[str, float]:
    task.call()
    spans: list[float] = []
    began = time.perf_counter()
    while len(spans) < CALLS_MAX and (not spans or time.perf_counter() - began < turn_s):
        start = time.perf_counter()
        task.call()
        spans.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(spans) / task.per_call, "best_ms": min(spans) / task.per_call}


def main() -> None:
    module = importlib.import_module(f".kernels_{sys.argv[1]}", __package__)
    # Libraries may print; only the answers go to the pipe.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()

    say({"version": module.VERSION, "tasks": list(module.TASKS)})
    ready: dict[str, Task] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "prepare" in question:
            name = question["prepare"]
            task = ready[name] = module.TASKS[name]()
            say({"answer": fingerprint(task.answer(task.call()))})
        elif "time" in question:
            say(_timed(ready[question["time"]], question["turn_s"]))
        else:
            del ready[question["forget"]]
            say({})


if __name__ == "__main__":
    main()
