"""`bench kernels`, onnxruntime's side: MiniLM, with all its graph optimisations."""

from __future__ import annotations

import onnxruntime

from .kernels_graph import minilm_onnx
from .kernels_side import Task, sample

VERSION = onnxruntime.__version__


def _minilm() -> Task:
    args = sample("embed.minilm@1")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        minilm_onnx(args), options, providers=["CPUExecutionProvider"]
    )
    feed = {"ids": args[7], "mask": args[8]}
    return Task(lambda: session.run(None, feed), lambda outs: list(outs))


TASKS = {"minilm": _minilm}
