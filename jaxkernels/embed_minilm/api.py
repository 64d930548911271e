"""embed.minilm@1: sentence embeddings by all-MiniLM-L6-v2, 8 passages of up to 128 tokens a unit.

    h = LN(word[ids] + place);  six times: h = LN(h + attention(h)), h = LN(h + down(gelu(up(h))))
    vector = mean of h over the real tokens, divided by its length

One static shape, because equal bits need equal shapes. 128 tokens because the model was trained on
that many, and because the corpus of the demo (the Python reference's topics: 79 texts, median 395
tokens) fills 90 % of such passages when cut at paragraphs and sentences, as much as of passages
of 64, with half the units. Eight passages make products of 1,024 rows, which run at over 80 % of
the measured peak, and a unit of about 0.15 s, short enough to be lost when a car leaves.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec

BATCH = 8
TOKENS = 128
VOCABULARY = 30522
POSITIONS = 512
LAYERS = 6
WIDTH = 384
HEADS = 12
INNER = 1536
# Per layer: three attention biases, the output's, two layer norms (scale, shift), up's, down's.
VECTOR_WIDTH = 3 * WIDTH + WIDTH + 2 * WIDTH + INNER + WIDTH + 2 * WIDTH
LAYER_NORM_EPSILON = 1e-12

_TOKENS = BATCH * TOKENS
_MATMULS = 2 * _TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) * LAYERS
_ATTENTION = 2 * 2 * _TOKENS * TOKENS * WIDTH * LAYERS

INFO = KernelInfo(
    name="embed.minilm",
    version=1,
    package="embed_minilm",
    description="Sentence embeddings (all-MiniLM-L6-v2): text in, unit vectors of 384 out.",
    args=(
        ArgSpec("word", "float32", (VOCABULARY, WIDTH), mapped=False),
        ArgSpec("place", "float32", (POSITIONS + 2, WIDTH), mapped=False),
        ArgSpec("qkv", "float32", (LAYERS, WIDTH, 3 * WIDTH), mapped=False),
        ArgSpec("mix", "float32", (LAYERS, WIDTH, WIDTH), mapped=False),
        ArgSpec("up", "float32", (LAYERS, WIDTH, INNER), mapped=False),
        ArgSpec("down", "float32", (LAYERS, INNER, WIDTH), mapped=False),
        ArgSpec("vectors", "float32", (LAYERS, VECTOR_WIDTH), mapped=False),
        ArgSpec("ids", "int32", (BATCH, TOKENS)),
        ArgSpec("mask", "int32", (BATCH, TOKENS)),
    ),
    outs=(ArraySpec("vectors", "float32", (BATCH, WIDTH)),),
    numerics=NumericsClass.F32_HIGHEST,
    tolerance=1e-5,
    flops_per_unit=_MATMULS + _ATTENTION,
    unit_ms_hint=150.0,
    model="minilm",
    options=(OptionSpec("long", "cut", "passages over 128 tokens: cut or refuse"),),
)
