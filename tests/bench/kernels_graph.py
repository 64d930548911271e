"""`bench kernels`: MiniLM's weights by layer, and its graph in ONNX.

The package that the weights come from has no ONNX file, so the graph is written here, with the
operators into which onnxruntime's own optimiser for transformers turns an exported BERT (Attention,
SkipLayerNormalization, BiasGelu of the com.microsoft domain): on the CPU it is faster than the same
graph of standard operators (434 against 444 ms of CPU time a batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkernels.embed_minilm.api import (
    BATCH,
    HEADS,
    INNER,
    LAYER_NORM_EPSILON,
    LAYERS,
    POSITIONS,
    TOKENS,
    WIDTH,
)
from jaxkernels.host import Array

# How the kernel's `vectors` argument is packed.
PACKED = {
    "b_qkv": 3 * WIDTH,
    "b_mix": WIDTH,
    "scale1": WIDTH,
    "shift1": WIDTH,
    "b_up": INNER,
    "b_down": WIDTH,
    "scale2": WIDTH,
    "shift2": WIDTH,
}
MICROSOFT = "com.microsoft"


def layer_weights(args: Sequence[Array], layer: int) -> dict[str, Array]:
    """A layer's matrices [in, out] and vectors by name, from the kernel's arguments."""
    matrices = dict(zip(("qkv", "mix", "up", "down"), (a[layer] for a in args[2:6]), strict=True))
    ends = np.cumsum(list(PACKED.values()))[:-1]
    return matrices | dict(zip(PACKED, np.split(args[6][layer], ends), strict=True))


class Graph:
    """Collects nodes and weights; an operator gives the name of its only output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], domain=domain, **attributes))
        return out


def _layer(g: Graph, x: str, mask: str, w: dict[str, str]) -> str:
    y = g.op("Attention", x, w["qkv"], w["b_qkv"], mask, domain=MICROSOFT, num_heads=HEADS)
    y = g.op("MatMul", y, w["mix"])
    skip: dict[str, Any] = {"domain": MICROSOFT, "epsilon": LAYER_NORM_EPSILON}
    x = g.op("SkipLayerNormalization", y, x, w["scale1"], w["shift1"], w["b_mix"], **skip)
    y = g.op("BiasGelu", g.op("MatMul", x, w["up"]), w["b_up"], domain=MICROSOFT)
    y = g.op("MatMul", y, w["down"])
    return g.op("SkipLayerNormalization", y, x, w["scale2"], w["shift2"], w["b_down"], **skip)


def minilm_onnx(args: Sequence[Array]) -> bytes:
    """The model embed.minilm@1 computes, with these weights: ids, mask -> vectors."""
    from onnx import TensorProto, helper

    g = Graph()
    word, place = args[0], args[1]
    x = g.op("Add", g.op("Gather", g.weight(word), "ids"), g.weight(place[None, :TOKENS]))
    first = (g.weight(place[POSITIONS]), g.weight(place[POSITIONS + 1]))
    x = g.op("LayerNormalization", x, *first, axis=-1, epsilon=LAYER_NORM_EPSILON)
    for layer in range(LAYERS):
        weights = {name: g.weight(value) for name, value in layer_weights(args, layer).items()}
        x = _layer(g, x, "mask", weights)
    real = g.op("Cast", "mask", to=TensorProto.FLOAT)
    last, middle = g.weight(np.array([2])), g.weight(np.array([1]))
    total = g.op("ReduceSum", g.op("Mul", x, g.op("Unsqueeze", real, last)), middle, keepdims=0)
    count = g.op("Max", g.op("ReduceSum", real, middle, keepdims=1), g.weight(np.float32(1)))
    mean = g.op("Div", total, count)
    vectors = g.op("LpNormalization", mean, axis=1, p=2)
    shape = [BATCH, TOKENS]
    graph = helper.make_graph(
        g.nodes,
        "minilm",
        [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in ("ids", "mask")],
        [helper.make_tensor_value_info(vectors, TensorProto.FLOAT, [BATCH, WIDTH])],
        g.weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    content: bytes = model.SerializeToString()
    return content
