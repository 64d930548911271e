"""lm.llama_decode: the network at a small shape, its host side, and SmolLM2 in long tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkernels import host, registry, timing
from jaxkernels.errors import BadInput, ModelRefused
from jaxkernels.gguf import Gguf
from jaxkernels.host import Array, Prepared
from jaxkernels.lm_llama_decode import kernel, reference, weights
from jaxkernels.lm_llama_decode.api import (
    CURSOR_FIELDS,
    END_TOKENS,
    INFO,
    SMOLLM2,
    Shape,
    constant_args,
    state_args,
)
from jaxkernels.lm_llama_decode.host import CONTEXT, PROMPTS_MAX
from jaxkernels.lm_llama_decode.text import INCOMPLETE, make_tokenizer, open_tokenizer, text_of
from jaxkernels.models import Model, ModelArray

from .gguf_file import gguf_bytes, llama_metadata, llama_tensors, vocabulary, write_llama

SPEC = "lm.llama_decode@1"
SMALL = Shape(3, 64, 4, 2, 64, 96, 320, 24)
CONSTANTS = reference.CONSTANTS
TOKENS, CURSOR, TEMPERATURE = CONSTANTS + 1, CONSTANTS + 2, CONSTANTS + 4


@cache
def small() -> Any:
    return jax.jit(partial(kernel.decode, SMALL))


def run(args: Sequence[Any], steps: int | None = None) -> list[Array]:
    """The state after `steps` (else the args' own `n`), through host memory."""
    n = args[-1] if steps is None else np.int32(steps)
    return [np.asarray(array) for array in small()(*args[:-1], n)]


def sample(seed: int, temperature: float = 0.0, prompt: int = 3, steps: int = 9) -> list[Array]:
    args = list(reference.sample_args(np.random.default_rng(seed), SMALL, prompt, steps))
    args[TEMPERATURE] = np.array([temperature], np.float32)
    return args


def cursor_of(state: Sequence[Array]) -> dict[str, int]:
    return dict(zip(CURSOR_FIELDS, state[2].tolist(), strict=True))


def digest(state: Sequence[Array]) -> list[bytes]:
    return [array.tobytes() for array in state]


# ---- the network


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_agrees_with_the_reference(seed: int, temperature: float) -> None:
    args = sample(seed, temperature)
    # Measured 5e-7 to 1e-6 at three layers.
    assert reference.error(run(args), *args, shape=SMALL) <= 5e-6


def test_the_reference_sees_another_key_in_the_cache() -> None:
    args = sample(0)
    outs = run(args)
    outs[0] = outs[0].copy()
    outs[0][2, 1, 0, 1, 7] += 1e-3
    assert reference.error(outs, *args, shape=SMALL) > 5e-6


@given(cuts=st.lists(st.integers(0, 7), max_size=6), temperature=st.sampled_from([0.0, 1.0]))
@settings(max_examples=20, deadline=None)
def test_any_slicing_gives_the_same_bits(cuts: list[int], temperature: float) -> None:
    args = sample(1, temperature, prompt=5, steps=sum(cuts))
    whole, state = run(args), args[CONSTANTS:-1]
    for steps in cuts:
        state = run([*args[:CONSTANTS], *state, args[-1]], steps)
    assert digest(state) == digest(whole)


def test_it_ends_at_its_limit_and_then_changes_nothing() -> None:
    args = sample(2)
    args[CURSOR] = np.array([0, 3, 3, 8, 0], np.int32)
    done = run(args, 7)
    assert cursor_of(done) == {"position": 7, "start": 3, "length": 8, "limit": 8, "ended": 1}
    assert digest(run(args, 500)) == digest(done)
    assert digest(run([*args[:CONSTANTS], *done, args[-1]], 3)) == digest(done)
    assert cursor_of(run(args, 6))["ended"] == 0


@pytest.mark.parametrize("end", END_TOKENS)
def test_an_end_token_ends_it(end: int) -> None:
    args = sample(3)
    # An end token whose weights are a token's own, ten times larger, is the likeliest after it.
    first = int(run(args, 3)[1][3])
    word_scale = args[1].copy()
    word = args[0].copy()
    tile, lane = divmod(first, word.shape[-1])
    word[0, :, :, end] = word[tile, :, :, lane]
    word_scale[0, :, end] = 10 * word_scale[tile, :, lane]
    args[:2] = word, word_scale
    done = run(args, 9)
    assert cursor_of(done) == {"position": 3, "start": 3, "length": 4, "limit": 24, "ended": 1}
    assert done[1][3] == end and not done[1][4:].any()


def test_it_ends_with_the_context() -> None:
    args = sample(4)
    state = run(args, 1000)
    assert cursor_of(state)["length"] == SMALL.context and cursor_of(state)["ended"] == 1
    assert cursor_of(state)["position"] == SMALL.context - 1
    assert not state[0][-1].any()  # the last token is nobody's context


def test_a_seed_draws_by_probability() -> None:
    args = sample(5, 1.0, prompt=1)
    network = reference.unpack(args[:CONSTANTS])
    hidden = reference.forward(
        network, SMALL, args[CONSTANTS].astype(np.float64), int(args[TOKENS][0]), 0
    )
    logits = hidden @ network.word
    share = np.exp(logits - logits.max())
    share /= share.sum()
    counts = np.zeros(SMALL.vocabulary)
    for seed in range(400):
        args[CONSTANTS + 3] = np.array([seed, 1], np.int32)
        counts[run(args, 1)[1][1]] += 1
    # The sixteen likeliest together: their count has a standard deviation of at most 10.
    top = np.argsort(share)[-16:]
    assert abs(counts[top].sum() - 400 * share[top].sum()) < 50
    assert (counts > 0).sum() > 20


def test_a_state_of_nonsense_ends_after_n_steps() -> None:
    """A state may come from anyone; what it holds must not reach outside an array or loop on."""
    args = sample(6)
    args[TOKENS] = np.full(SMALL.context, 2**31 - 1, np.int32)
    args[CURSOR] = np.array([-5, 2**31 - 1, -(2**31), 2**31 - 1, 0], np.int32)
    args[TEMPERATURE] = np.array([np.nan], np.float32)
    assert cursor_of(run(args, 4))["position"] == -1


# ---- weights


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "small.gguf", SMALL)


def test_weights_become_the_kernels_constants(small_gguf: Path) -> None:
    with Gguf(small_gguf) as file:
        arrays = list(weights.convert(file, SMALL))
        assert [(name, a.dtype.name, a.shape) for name, a in arrays] == [
            (arg.name, arg.dtype, arg.shape) for arg in constant_args(SMALL)
        ]
        network = reference.unpack([array for _, array in arrays])
        assert np.array_equal(network.word, file.dequantised("token_embd.weight").T)
        for i, (qkv, mix, up, down) in enumerate(network.layers):
            part = {
                name: file.dequantised(f"blk.{i}.{name}.weight").T
                for attn in ("q", "k", "v", "output")
                for ffn in ("gate", "up", "down")
                for name in (f"attn_{attn}", f"ffn_{ffn}")
            }
            assert np.array_equal(mix, part["attn_output"])
            assert np.array_equal(up, np.hstack([part["ffn_gate"], part["ffn_up"]]))
            assert np.array_equal(down, part["ffn_down"])
            assert np.array_equal(qkv[:, 6 * 64 :], part["attn_v"])
            # Of each head first the even components, then the odd ones.
            order = np.r_[0:64:2, 1:64:2]
            heads = np.hstack([part["attn_q"], part["attn_k"]]).reshape(64, 6, 64)
            assert np.array_equal(qkv[:, : 6 * 64], heads[:, :, order].reshape(64, -1))


def test_turning_halves_is_turning_pairs(small_gguf: Path) -> None:
    """GGUF's llama turns components 2i and 2i + 1 together; products of two heads must agree."""
    rng, rope = np.random.default_rng(0), weights.rope_table(SMALL)
    query, key = rng.standard_normal((2, 64))
    order = np.r_[0:64:2, 1:64:2]

    def pairs(x: Array, position: int) -> Array:
        cos, sin = rope[position]
        return np.stack([x[::2] * cos - x[1::2] * sin, x[1::2] * cos + x[::2] * sin], 1).ravel()

    def halves(x: Array, position: int) -> Array:
        turned = kernel._turn(*(jnp.asarray(a, jnp.float32) for a in (x[order], rope[position])))
        return np.asarray(turned)

    for a, b in ((0, 0), (3, 1), (23, 9)):
        assert np.isclose(pairs(query, a) @ pairs(key, b), halves(query, a) @ halves(key, b))
    # cos and sin of the position itself, for the fastest pair
    assert np.allclose(rope[5, :, 0], [np.cos(5), np.sin(5)])


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.block_count", 4), ("llama.rope.freq_base", 10_000.0), ("general.architecture", "x")],
)
def test_another_network_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    tensors = llama_tensors(np.random.default_rng(0), SMALL)
    path = tmp_path / "other.gguf"
    path.write_bytes(gguf_bytes(llama_metadata(SMALL) | {key: value}, tensors))
    with Gguf(path) as file, pytest.raises(ModelRefused, match=key):
        list(weights.convert(file, SMALL))


# ---- text


@pytest.fixture(scope="module")
def tokenizer_path(small_gguf: Path) -> Path:
    path = small_gguf.parent / "tokenizer.json"
    with Gguf(small_gguf) as file:
        path.write_text(weights.tokenizer_json(file), "utf-8")
    return path


def test_the_vocabulary_of_the_metadata_is_the_tokenizers(tokenizer_path: Path) -> None:
    tokenizer = open_tokenizer(str(tokenizer_path))
    names = [tokenizer.id_to_token(i) for i in tokenizer.encode("hello world 42").ids]
    assert names == ["hell", "o", "Ġw", "o", "r", "l", "d", "Ġ", "4", "2"]
    assert tokenizer.get_vocab_size() == SMALL.vocabulary


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.pre": "llama-bpe"},
        {"tokenizer.ggml.model": None},
        {"tokenizer.ggml.merges": ["no such"]},
        {"tokenizer.ggml.merges": ["a b c"]},
        {"tokenizer.ggml.token_type": [3]},
        {"tokenizer.ggml.tokens": ["a", "a"]},
        {"tokenizer.ggml.tokens": 7},
    ],
)
def test_a_tokenizer_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelRefused) as caught:
        make_tokenizer(vocabulary(300) | change)
    assert "\n" not in str(caught.value)


@given(text=st.text(max_size=30), data=st.data())
@settings(deadline=None)
def test_pieces_join_to_the_whole_text(tokenizer_path: Path, text: str, data: Any) -> None:
    tokenizer = open_tokenizer(str(tokenizer_path))
    tokens = tokenizer.encode(text).ids
    assert text_of(tokenizer, tokens, whole=True) == text
    shown = ""
    for cut in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))):
        now = text_of(tokenizer, tokens[:cut], whole=False)
        assert now.startswith(shown) and text.startswith(now)
        shown = now


def test_half_a_character_waits(tokenizer_path: Path) -> None:
    tokenizer = open_tokenizer(str(tokenizer_path))
    tokens = tokenizer.encode("aé").ids
    assert len(tokens) == 3
    assert [text_of(tokenizer, tokens[:n], whole=False) for n in range(4)] == ["", "a", "a", "aé"]
    assert text_of(tokenizer, tokens[:2], whole=True) == "a" + INCOMPLETE


# ---- host


@pytest.fixture(scope="module")
def hollow(tokenizer_path: Path) -> Model:
    """A model whose arrays are of the right size and all zeros: files without content."""
    folder = tokenizer_path.parent
    arrays = []
    for arg in INFO.args:
        if not arg.mapped:
            with (folder / arg.name).open("wb") as file:
                file.truncate(arg.unit_bytes)
            arrays.append(ModelArray(arg.name, folder / arg.name, arg.dtype, arg.shape))
    return Model("smollm2", folder, tuple(arrays), tokenizer_path, "someone", "Apache-2.0")


def prepare(model: Model, inputs: Any, **options: Any) -> Prepared:
    return host.prepare(SPEC, inputs, options, model)


def mapped(prepared: Prepared, name: str) -> Array:
    return next(arg.array for arg in prepared.args if arg.name == name)


def said(prepared: Prepared, text: str, model: Model, **fields: int) -> list[Array]:
    """What is watched of unit 0 once it has said `text`."""
    tokens, cursor = mapped(prepared, "tokens")[0].copy(), mapped(prepared, "cursor")[0].copy()
    ids = open_tokenizer(str(model.tokenizer_path)).encode(text).ids
    start = cursor[CURSOR_FIELDS.index("start")]
    tokens[start : start + len(ids)] = ids
    cursor[CURSOR_FIELDS.index("length")] += len(ids)
    for name, value in fields.items():
        cursor[CURSOR_FIELDS.index(name)] = value
    return [tokens, cursor]


def test_a_prompt_becomes_the_state_of_a_unit(hollow: Model) -> None:
    prepared = prepare(hollow, "hello", raw=1, max_tokens=10, seed=7, temperature=0.5)
    assert (prepared.units, host.steps(prepared)) == (1, 11)
    assert mapped(prepared, "cursor").tolist() == [[0, 2, 2, 12, 0]]
    assert np.count_nonzero(mapped(prepared, "tokens")) == 2
    assert mapped(prepared, "temperature").tolist() == [[0.5]]
    assert not mapped(prepared, "cache").any()
    assert [(a.dtype, a.shape) for a in prepared.args] == [(a.dtype, a.shape) for a in INFO.args]
    assert json.loads(json.dumps(prepared.context)) == prepared.context
    assert all(arg.path is not None for arg in prepared.args if not arg.mapped)


def test_the_chat_frame_and_control_words_in_a_prompt(hollow: Model) -> None:
    plain = prepare(hollow, "<|im_end|>hello")
    tokens = mapped(plain, "tokens")[0]
    # Two turns end and three begin; the prompt's own words for it are letters.
    assert np.count_nonzero(tokens == 2) == 2 and np.count_nonzero(tokens == 1) == 3
    text = open_tokenizer(str(hollow.tokenizer_path)).decode(
        tokens[: mapped(plain, "cursor")[0, 1]].tolist(), skip_special_tokens=False
    )
    assert text.endswith(
        "<|im_end|>\n<|im_start|>user\n<|im_end|>hello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_prompts_of_one_job_draw_apart(hollow: Model) -> None:
    prepared = prepare(hollow, ["hello", "hello"], raw=1, seed=7)
    keys = mapped(prepared, "key")
    assert prepared.units == 2 and keys[0].tolist() != keys[1].tolist()
    assert np.array_equal(keys[:1], mapped(prepare(hollow, "hello", raw=1, seed=7), "key"))
    assert not np.array_equal(keys[:1], mapped(prepare(hollow, "hello", raw=1, seed=8), "key"))


def test_an_answer_never_outgrows_the_context(hollow: Model) -> None:
    prepared = prepare(hollow, "a" * (CONTEXT - 1), raw=1, max_tokens=50)
    assert mapped(prepared, "cursor")[0, 3] == CONTEXT
    assert host.steps(prepared) == CONTEXT - 1


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("a" * CONTEXT, {"raw": 1}),
        ("", {"raw": 1}),
        ([], {}),
        (["a"] * (PROMPTS_MAX + 1), {}),
        (7, {}),
        (["a", 7], {}),
        ("a", {"max_tokens": 0}),
        ("a", {"max_tokens": CONTEXT + 1}),
        ("a", {"temperature": -1.0}),
        ("a", {"temperature": 1e-9}),
        ("a", {"temperature": 1e9}),
        ("a", {"seed": -1}),
        ("a", {"seed": 1 << 63}),
        ("a", {"raw": 2}),
    ],
)
def test_what_does_not_fit_is_refused(hollow: Model, inputs: Any, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(hollow, inputs, **options)
    assert "\n" not in str(caught.value)


def test_text_comes_as_it_is_said(hollow: Model) -> None:
    prepared = prepare(hollow, "hello", max_tokens=60)
    context = json.loads(json.dumps(prepared.context))
    # U+1F600 is four bytes, four tokens here; the second look falls within it.
    whole = said(prepared, "well \U0001f600.", hollow)
    looks = []
    for length in (2, 6, 8, 9):
        tokens, cursor = (array.copy() for array in whole)
        cursor[2] = cursor[1] + length
        looks.append([tokens, cursor])
    befores: list[list[Array] | None] = [None, *looks]
    pieces = [host.stream(SPEC, a, b, context) for a, b in zip(befores, looks, strict=False)]
    assert pieces == ["we", "ll ", "\U0001f600", "."]
    assert host.stream(SPEC, looks[-1], looks[-1], context) == ""
    assert host.finish(SPEC, [array[None] for array in whole], context) == "well \U0001f600."


def test_end_tokens_are_not_text(hollow: Model) -> None:
    prepared = prepare(hollow, ["hello", "hello"])
    tokens, cursor = said(prepared, "hell", hollow)
    for end in END_TOKENS:
        tokens[cursor[2]] = end
        ended = cursor + np.array([0, 0, 1, 0, 1], np.int32)
        assert host.ended(SPEC, [tokens, ended], prepared.context)
        assert not host.ended(SPEC, [tokens, cursor], prepared.context)
        both = [np.stack([tokens, tokens]), np.stack([ended, cursor])]
        assert host.finish(SPEC, both, prepared.context) == ["hell", "hell"]


@given(
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=CONTEXT, max_size=CONTEXT),
    cursor=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5),
)
@settings(max_examples=30, deadline=None)
def test_whatever_a_car_sends_is_some_text(
    hollow: Model, tokens: list[int], cursor: list[int]
) -> None:
    prepared = prepare(hollow, "hello")
    watch = [np.array(tokens, np.int32), np.array(cursor, np.int32)]
    assert isinstance(host.stream(SPEC, None, watch, prepared.context), str)
    assert isinstance(host.finish(SPEC, [a[None] for a in watch], prepared.context), str)


def test_kernels_without_a_count_of_their_own_have_the_default() -> None:
    assert INFO.stepped is not None
    assert [arg.name for arg in state_args(SMALL)] == [arg.name for arg in INFO.state]
    assert [INFO.state[i].name for i in INFO.stepped.watch] == ["tokens", "cursor"]
    noop = "bench.noop@1"
    assert host.stream(noop, None, [], {}) == "" and not host.ended(noop, [], {})


# ---- SmolLM2 itself


@pytest.fixture(scope="module")
def compiled() -> timing.Run:
    return timing.compile_kernel(registry.get(SPEC))[0]


def unit_of(prepared: Prepared) -> tuple[list[jax.Array], list[Array]]:
    constants = [jax.device_put(arg.array) for arg in prepared.args if not arg.mapped]
    return constants, [arg.array[0] for arg in prepared.args if arg.mapped]


@pytest.mark.long
def test_the_installed_model_fits_the_kernel(smollm2: Model) -> None:
    constants = [(arg.name, arg.dtype, arg.shape) for arg in constant_args(SMOLLM2)]
    assert [(arg.name, arg.dtype, arg.shape) for arg in smollm2.args] == constants
    tokenizer = open_tokenizer(str(smollm2.tokenizer_path))
    assert tokenizer.get_vocab_size() == SMOLLM2.vocabulary
    # Digits stand alone, and what is written as a control token is text.
    assert tokenizer.encode("in 1881").tokens == ["in", "Ġ", "1", "8", "8", "1"]
    assert not set(tokenizer.encode("<|im_end|>").ids) & set(END_TOKENS)


@pytest.mark.long
def test_smollm2_answers_in_slices_what_it_answers_in_one(
    compiled: timing.Run, smollm2: Model
) -> None:
    prepared = prepare(smollm2, "What is the capital of France?")
    constants, state = unit_of(prepared)
    whole = [np.asarray(a) for a in compiled(*constants, *state, np.int32(host.steps(prepared)))]
    text, before = "", None
    while not host.ended(SPEC, state[1:3], prepared.context):
        state = [np.asarray(a) for a in compiled(*constants, *state, np.int32(5))]
        text += host.stream(SPEC, before, state[1:3], prepared.context)
        before = state[1:3]
    assert digest(state) == digest(whole)
    assert text == host.finish(SPEC, [a[None] for a in whole[1:3]], prepared.context)
    assert text == "The capital of France is Paris."


@pytest.mark.long
def test_smollm2_agrees_with_the_reference(compiled: timing.Run, smollm2: Model) -> None:
    prepared = prepare(smollm2, "Once upon a time", raw=1)
    constants, state = unit_of(prepared)
    args = [*(np.asarray(a) for a in constants), *state, np.int32(8)]
    outs = [np.asarray(array) for array in compiled(*constants, *state, np.int32(8))]
    assert reference.error(outs, *args) <= INFO.tolerance


@pytest.mark.long
def test_smollm2_says_what_torch_says(compiled: timing.Run, smollm2: Model) -> None:
    """64 of 64 greedy tokens, by another framework from the same weights in float32."""
    pytest.importorskip("torch")
    from tests.bench.kernels_lm import TorchLlama

    prepared = prepare(smollm2, "Tell me about the history of electric cars.", max_tokens=64)
    constants, state = unit_of(prepared)
    start, steps = int(state[2][1]), host.steps(prepared)
    tokens = state[1][:start].tolist()
    peer = TorchLlama(reference.unpack([np.asarray(a) for a in constants]), SMOLLM2)
    peer.generate(tokens, 0, steps)
    outs = [np.asarray(array) for array in compiled(*constants, *state, np.int32(steps))]
    assert len(tokens) == start + 64
    assert outs[1][: len(tokens)].tolist() == tokens
    # Keys and values of all 30 layers, and so the hidden states, agree too.
    theirs = peer.cache.numpy()[:, :, :, :steps].transpose(3, 0, 1, 2, 4)
    assert np.abs(outs[0][:steps] - theirs).max() <= 1e-4 * np.abs(theirs).max()
