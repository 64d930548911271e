"""lm.llama_decode@1: text generation by SmolLM2-135M-Instruct, one token a step.

    h = word[token];  30 times: h = h + attention(norm(h), cache), h = h + down(silu(gate) * up)
    next token = the largest of word . norm(h), or drawn from softmax(. / temperature)

Stepped: a step reads the token at `position`, adds its keys and values to the cache, and, once the
prompt is read, appends the next token. The prompt goes the same way token by token, so that a unit
cut anywhere gives the same bits. An end token or `limit` tokens end it: more steps change nothing.

The weights stay 4 bits wide, as they are published (GGUF Q4_1: blocks of 32 along the inputs, each
with a scale and a least value; the word table Q8_0): 112 MB to bring to a car instead of 538, and
one token reads 112 MB of memory instead of 538, which is what limits decoding on a CPU.

256 tokens of context, prompt and answer together, because the cache is the checkpoint that moves
from car to car: 46 kB a token, 11.8 MB in all. The model itself could go on to 8,192.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec, Stepped

BLOCK = 32  # inputs that share a scale, in Q4_1 and Q8_0 alike
LANES = 64  # outputs that lie side by side: a cache line of bytes
NORM_EPSILON = 1e-5
ROPE_BASE = 100_000.0
# <|endoftext|> and <|im_end|>: after either the model has said all.
END_TOKENS = (0, 2)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama network; the tests build the same kernel at a small one."""

    layers: int
    width: int
    heads: int
    kv_heads: int  # each serves heads / kv_heads query heads
    head_width: int
    inner: int
    vocabulary: int
    context: int

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width


SMOLLM2 = Shape(30, 576, 9, 3, 64, 1536, 49152, 256)


def constant_args(shape: Shape) -> tuple[ArgSpec, ...]:
    """The weights, matrices in tiles of `LANES` outputs: [layer, tile, block, row, lane].

    So a product reads a matrix once, front to back, a cache line at a time, with outputs in the
    lanes of the vector unit. (With all 49,152 outputs of the word table innermost, its rows fell
    on the same few lines of the L1 cache: 9 ms instead of 4.)
    """

    def quantised(name: str, inputs: int, outputs: int) -> tuple[ArgSpec, ArgSpec]:
        tiles, blocks = outputs // LANES, inputs // BLOCK
        assert (tiles * LANES, blocks * BLOCK) == (outputs, inputs)
        # Row i of a block: weight i in the low half of its byte, weight i + 16 in the high half.
        packed = (shape.layers, tiles, blocks, BLOCK // 2, LANES)
        scales = (shape.layers, 2, tiles, blocks, LANES)  # scale, least
        return (
            ArgSpec(name, "uint8", packed, mapped=False),
            ArgSpec(f"{name}_scale", "float32", scales, mapped=False),
        )

    tiles, blocks = shape.vocabulary // LANES, shape.width // BLOCK
    assert tiles * LANES == shape.vocabulary
    return (
        # Two's complement bytes: weight = scale * byte.
        ArgSpec("word", "uint8", (tiles, blocks, BLOCK, LANES), mapped=False),
        ArgSpec("word_scale", "float32", (tiles, blocks, LANES), mapped=False),
        *quantised("qkv", shape.width, shape.qkv_width),
        *quantised("mix", shape.heads * shape.head_width, shape.width),
        *quantised("up", shape.width, 2 * shape.inner),  # the gate's outputs, then up's
        *quantised("down", shape.inner, shape.width),
        # Before attention and before the inner part of each layer, and after the last layer.
        ArgSpec("norms", "float32", (2 * shape.layers + 1, shape.width), mapped=False),
        # cos and sin of position / base ** (2 i / head_width): a table, so that every car turns
        # by the same angles, rounded once from float64.
        ArgSpec("rope", "float32", (shape.context, 2, shape.head_width // 2), mapped=False),
    )


def state_args(shape: Shape) -> tuple[ArgSpec, ...]:
    return (
        ArgSpec(
            "cache",  # keys, values
            "float32",
            (shape.context, shape.layers, 2, shape.kv_heads, shape.head_width),
        ),
        ArgSpec("tokens", "int32", (shape.context,)),  # the prompt, then what was generated
        ArgSpec("cursor", "int32", (len(CURSOR_FIELDS),)),
        ArgSpec("key", "int32", (2,)),  # of threefry; a token's draw depends on key and position
        ArgSpec("temperature", "float32", (1,)),  # 0: always the likeliest token
    )


# What the cursor holds: tokens read; tokens of the prompt; tokens known; the most that may be
# known; whether that or an end token is reached (0 or 1).
CURSOR_FIELDS = ("position", "start", "length", "limit", "ended")
TOKENS, CURSOR = 1, 2  # which state arrays a unit's result is, and what its submitter watches
TOKENS_DEFAULT = 64


def flops_per_token(shape: Shape) -> int:
    matrices = shape.width * (shape.qkv_width + 3 * shape.inner)
    matrices += shape.heads * shape.head_width * shape.width
    attention = 2 * shape.context * shape.heads * shape.head_width
    return 2 * (shape.layers * (matrices + attention) + shape.vocabulary * shape.width)


_STATE = state_args(SMOLLM2)

INFO = KernelInfo(
    name="lm.llama_decode",
    version=1,
    package="lm_llama_decode",
    description="Text generation (SmolLM2-135M-Instruct): a prompt in, tokens out as they come.",
    args=(*constant_args(SMOLLM2), *_STATE),
    outs=tuple(
        ArraySpec(_STATE[i].name, _STATE[i].dtype, _STATE[i].shape) for i in (TOKENS, CURSOR)
    ),
    numerics=NumericsClass.F32_HIGHEST,
    tolerance=3e-5,
    flops_per_unit=flops_per_token(SMOLLM2) * 2 * TOKENS_DEFAULT,
    unit_ms_hint=2000.0,
    model="smollm2",
    options=(
        OptionSpec("max_tokens", TOKENS_DEFAULT, "most tokens to generate"),
        OptionSpec("temperature", 0.0, "0: the likeliest token each time; 1: as the model says"),
        OptionSpec("seed", 0, "for temperatures above 0: the same seed gives the same text"),
        OptionSpec("raw", 0, "1: go on from the text as it is, without the chat's frame"),
    ),
    stepped=Stepped(
        result=(TOKENS, CURSOR),
        watch=(TOKENS, CURSOR),
        steps_default=2 * TOKENS_DEFAULT,
        slice_steps_hint=32,
    ),
)
