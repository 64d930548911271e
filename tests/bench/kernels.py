"""`bench kernels`: every built-in kernel against the libraries that people would use instead.

`mesh` is the committed artifact as a worker runs it: deserialised, jitted, constants on the device,
a unit's arrays in and its results out as NumPy arrays. Each system is a process of its own (thread
pools that spin after a call would disturb the next one), and they take turns, one task at a time,
round by round; a figure is the median of its rounds. All sides compute the same from the same
arguments, which is checked before anything is timed. `*_ratio_*` is the peer's time over ours: over
1 the mesh is faster. `*_roofline_fraction` is the time that this machine's best measured product
and copy would allow, over ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from jaxkernels import registry

from .figures import Figures, report

SYSTEMS = ("mesh", "numpy", "torch", "onnxruntime")
# task -> kernel, and the name of its figures: milliseconds of one call unless it says otherwise
TASKS = {
    "minilm": "embed.minilm@1",
    "knn": "vec.knn@1",
    "mdlj": "md.lj@1",
    "matmul": "linalg.matmul@1",
    "mc": "mc.pricing@1",
    "mc_asian": "mc.pricing@1",
    "render": "render.sdf@1",
}
ASIAN_DATES = 16
PRODUCT_SIDE = 2048
COPY_BYTES = 256 << 20
ROUNDS, QUICK_ROUNDS = 9, 3
TURN_S, QUICK_TURN_S = 0.4, 0.15
REST_S = 0.05  # for threads of the last one that still spin
LM_KERNEL, LM_MODULE = "lm.llama_decode@1", "tests.bench.kernels_lm"
TARGETS = {
    "minilm_ratio_onnxruntime": ">= 1.0",
    "knn_ratio_best": ">= 1.0",
    "mdlj_ratio_best": ">= 1.0",
    "matmul_ratio_best": ">= 0.80",
    "mc_ratio_numpy": ">= 1.0",
    "mc_asian_ratio_numpy": ">= 1.0",
    "render_ratio_numpy": ">= 1.0",
    "lm_ratio_torch": ">= 1.5",
}


class Side:
    """One system in its own process; a line of JSON to it, a line back."""

    def __init__(self, system: str) -> None:
        self.system = system
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.kernels_side", system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        self.version: str = hello["version"]
        self.tasks: list[str] = hello["tasks"]

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.system} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def agree(task: str, ours: list[float], theirs: list[float]) -> bool:
    """Whether two systems computed the same; prices are of other random numbers."""
    scale = max(abs(value) for value in ours)
    bound = 0.02 if task.startswith("mc") else 2e-3
    return len(ours) == len(theirs) and all(
        abs(a - b) <= bound * scale for a, b in zip(ours, theirs, strict=True)
    )


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call of one system: the median of its rounds, and its fastest call."""

    ms: float
    best_ms: float


def measure(task: str, sides: list[Side], rounds: int, turn_s: float) -> dict[str, Times]:
    """Of each side that knows the task."""
    able = [side for side in sides if task in side.tasks]
    answers = {side.system: side.ask(prepare=task)["answer"] for side in able}
    for system, answer in answers.items():
        if "mesh" in answers and not agree(task, answers["mesh"], answer):
            raise RuntimeError(f"{task}: {system} computes {answer}, we {answers['mesh']}")
    spans: dict[str, list[Times]] = {side.system: [] for side in able}
    for turn in range(rounds):
        for side in able if turn % 2 else reversed(able):
            time.sleep(REST_S)  # noqa: TID251 - the rest is part of the method
            spans[side.system].append(Times(**side.ask(time=task, turn_s=turn_s)))
    for side in able:
        side.ask(forget=task)
    return {
        system: Times(statistics.median(t.ms for t in times), min(t.best_ms for t in times))
        for system, times in spans.items()
    }


@dataclass
class Roofline:
    """The best that any side ever reached on this machine in this run."""

    gflops: float = 0.0
    copy_gb_per_s: float = 0.0

    def measure(self, sides: list[Side], rounds: int, turn_s: float) -> None:
        products = measure("product", sides, rounds, turn_s)
        copies = measure("copy", sides, rounds, turn_s)
        self.product(2 * PRODUCT_SIDE**3, products)
        best_ms = min(times.best_ms for times in copies.values())
        self.copy_gb_per_s = max(self.copy_gb_per_s, 2 * COPY_BYTES / best_ms / 1e6)

    def product(self, flops: int, found: dict[str, Times]) -> None:
        best_ms = min(times.best_ms for times in found.values())
        self.gflops = max(self.gflops, flops / best_ms / 1e6)


def fraction(task: str, ms: float, roof: Roofline) -> float:
    """Of the roofline: operations at the product's rate or bytes at the copy's, whichever is more.

    Operations are the kernel's own count. What is no multiply-add (integers, roots, compares) can
    never reach the product's rate.
    """
    info = registry.get(TASKS[task])
    share = 1.0
    if info.stepped is not None:
        share = 1 / info.stepped.steps_default  # figures are of a step
    flops = info.flops_per_unit * share
    moved = (info.mapped_bytes_per_unit + info.constant_bytes + info.out_bytes_per_unit) * share
    if task == "mc_asian":
        flops *= ASIAN_DATES
    least_ms = max(flops / roof.gflops, moved / roof.copy_gb_per_s) / 1e6
    return least_ms / ms


def kernel_figures(task: str, found: dict[str, Times], roof: Roofline) -> Figures:
    figures: Figures = {}
    info = registry.get(TASKS[task])
    for system, times in found.items():
        if task == "minilm":
            figures[f"minilm_per_s_{system}"] = info.outs[0].shape[0] * 1e3 / times.ms
        elif task == "matmul":
            figures[f"matmul_gflops_{system}"] = info.flops_per_unit / times.ms / 1e6
        else:
            figures[f"{task}_ms_{system}"] = times.ms
    ours = found["mesh"]
    peers = {system: times for system, times in found.items() if system != "mesh"}
    for system, times in peers.items():
        figures[f"{task}_ratio_{system}"] = times.ms / ours.ms
        # What the machine's other users take shows in medians; the fastest calls have least of it.
        figures[f"{task}_ratio_fastest_{system}"] = times.best_ms / ours.best_ms
    figures[f"{task}_ratio_best"] = min(times.ms for times in peers.values()) / ours.ms
    figures[f"{task}_roofline_fraction"] = fraction(task, ours.ms, roof)
    return figures


def lm_figures(quick: bool) -> Figures:
    """Token generation, where the release has it; its bench has its own way of taking turns."""
    if LM_KERNEL not in registry.KERNELS or importlib.util.find_spec(LM_MODULE) is None:
        return {}
    found: Figures = importlib.import_module(LM_MODULE).figures(quick)
    if found.get("lm_tok_per_s_torch"):
        found["lm_ratio_torch"] = found["lm_tok_per_s_mesh"] / found["lm_tok_per_s_torch"]
    return found


def run(quick: bool) -> int:
    rounds, turn_s = (QUICK_ROUNDS, QUICK_TURN_S) if quick else (ROUNDS, TURN_S)
    sides = [Side(system) for system in SYSTEMS]
    figures: Figures = {f"version_{side.system}": side.version for side in sides}
    roof = Roofline()
    try:
        roof.measure(sides, rounds, turn_s)
        found = {}
        for task in TASKS:
            found[task] = measure(task, sides, rounds, turn_s)
            print(task, found[task], file=sys.stderr)
        roof.measure(sides, rounds, turn_s)  # again: the machine may have been busy
        roof.product(registry.get(TASKS["matmul"]).flops_per_unit, found["matmul"])
    finally:
        for side in sides:
            side.end()
    for task in TASKS:
        figures |= kernel_figures(task, found[task], roof)
    figures |= {
        "roofline_gflops": roof.gflops,
        "roofline_copy_gb_per_s": roof.copy_gb_per_s,
    }
    figures |= lm_figures(quick)
    rounded = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }
    targets = {name: bound for name, bound in TARGETS.items() if name in rounded}
    return report("kernels", rounded, targets, True)
