"""`bench validator`: milliseconds to judge each built-in kernel, and the largest honest program.

A fresh process a figure would measure the import of jax; a worker is forked from a zygote that has
done that, so this process imports first and then validates each artifact several times. Least and
median: the least is the work, the median is what a busy machine makes of it.
"""

from __future__ import annotations

import time

from jaxkernels import registry
from meshnode.worker.header import read_header
from meshnode.worker.validate import validated

from .figures import Figures, percentile, report

ROUNDS = 40
QUICK_ROUNDS = 8
TARGETS = {"largest_ms": "<= 20"}


def judge_ms(content: bytes, rounds: int) -> list[float]:
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        validated(content, builtin=True, platform="cpu")
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def run(quick: bool) -> int:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    figures: Figures = {}
    largest = ""
    for spec in sorted(registry.KERNELS):
        content = registry.artifact_bytes(spec)
        read_header(content)
        spent = judge_ms(content, rounds)
        name = spec.partition("@")[0].replace(".", "_")
        figures[f"{name}_ms"] = round(percentile(spent, 0.5), 2)
        figures[f"{name}_least_ms"] = round(min(spent), 2)
        if figures[f"{name}_ms"] > figures.get(f"{largest}_ms", 0.0):
            largest = name
    figures["largest"] = largest
    figures["largest_ms"] = figures[f"{largest}_ms"]
    return report("validator", figures, TARGETS, True)
