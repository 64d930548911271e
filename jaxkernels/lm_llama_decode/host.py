"""Submitter's side of lm.llama_decode@1: prompts in, the model's answers out, as they come.

Flow: text -> the chat's frame and BPE tokens -> one unit a prompt, whose state holds them -> the
mesh, slice by slice -> `stream` prints what each slice added -> `finish` gives the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import CURSOR_FIELDS, END_TOKENS, INFO, SMOLLM2
from .text import chat_tokens, open_tokenizer, text_of

CONTEXT = SMOLLM2.context
# Each takes a cache of 11.8 MB along; a car runs them one after the other anyway.
PROMPTS_MAX = 32
# Below, logits divided by it leave float32.
TEMPERATURE_MIN, TEMPERATURE_MAX = 0.01, 100.0
START, LENGTH, LIMIT, ENDED = (
    CURSOR_FIELDS.index(field) for field in ("start", "length", "limit", "ended")
)


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: a prompt, or a list of up to 32 prompts, one unit each."""
    assert model is not None  # host.prepare has looked
    prompts = _check(inputs)
    tokens_max, temperature, seed = (options[n] for n in ("max_tokens", "temperature", "seed"))
    _check_sampling(tokens_max, temperature, seed, options["raw"])
    tokenizer, path = open_tokenizer(str(model.tokenizer_path)), str(model.tokenizer_path)
    *constants, cache, tokens, cursor, key, heat = INFO.args
    known = np.zeros((len(prompts), CONTEXT), np.int32)
    cursors = np.zeros((len(prompts), len(CURSOR_FIELDS)), np.int32)
    keys = np.zeros((len(prompts), 2), np.int32)
    for unit, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt).ids if options["raw"] else chat_tokens(tokenizer, prompt)
        start = len(ids)
        if not 1 <= start < CONTEXT:
            raise BadInput(
                f"Prompt {unit} has {start} tokens; 1 to {CONTEXT - 1} fit, the answer comes after."
            )
        known[unit, :start] = ids
        cursors[unit] = 0, start, start, min(start + tokens_max, CONTEXT), 0
        # The same prompt twice in one job gets two answers.
        keys[unit] = np.random.SeedSequence([seed, unit]).generate_state(2).view(np.int32)
    state = (
        np.zeros((len(prompts), *cache.shape), np.float32),  # pages of zeros: no memory until read
        known,
        cursors,
        keys,
        np.full((len(prompts), 1), temperature, np.float32),
    )
    args = [
        make_arg(arg, array.open(), len(prompts), array.path)
        for arg, array in zip(constants, model.args, strict=True)
    ]
    args += [
        make_arg(arg, array, len(prompts))
        for arg, array in zip((cache, tokens, cursor, key, heat), state, strict=True)
    ]
    context = {"tokenizer": path, "one": isinstance(inputs, str)}
    return Prepared(INFO.spec, len(prompts), tuple(args), context)


def steps(prepared: Prepared) -> int:
    """A step for each token of the longest unit, but its last, which nobody reads."""
    cursors = next(arg.array for arg in prepared.args if arg.name == "cursor")
    return int(cursors[:, LIMIT].max()) - 1


def ended(watch: Sequence[Array], context: Context) -> bool:
    """Whether a unit has said all: steps after that change nothing."""
    return bool(watch[1][ENDED])


def stream(previous: Sequence[Array] | None, watch: Sequence[Array], context: Context) -> str:
    """What a unit has said since `previous`; half a character waits for its other half."""
    before = "" if previous is None else _text(previous, context)
    return _text(watch, context)[len(before) :]


def finish(outputs: Sequence[Array], context: Context) -> str | list[str]:
    """The answer to a prompt, or to each of a list; without end tokens."""
    texts = [_text(unit, context, whole=True) for unit in zip(*outputs, strict=True)]
    return texts[0] if context["one"] else texts


def _text(watch: Sequence[Array], context: Context, *, whole: bool = False) -> str:
    tokens, cursor = watch
    start, length = (min(max(int(cursor[i]), 0), CONTEXT) for i in (START, LENGTH))
    answer = tokens[start:length].tolist()
    if answer and answer[-1] in END_TOKENS:
        answer.pop()
    tokenizer = open_tokenizer(str(context["tokenizer"]))
    return text_of(tokenizer, answer, whole=whole or bool(cursor[ENDED]))


def _check(inputs: Any) -> list[str]:
    prompts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(prompts, Iterable):
        raise BadInput(f"{INFO.spec} takes a prompt or a list of prompts.")
    prompts = list(prompts)
    if not 1 <= len(prompts) <= PROMPTS_MAX:
        raise BadInput(f"{INFO.spec} takes 1 to {PROMPTS_MAX} prompts, not {len(prompts)}.")
    for unit, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise BadInput(f"Prompt {unit} is {type(prompt).__name__}, not text.")
    return prompts


def _check_sampling(tokens_max: int, temperature: float, seed: int, raw: int) -> None:
    if not 1 <= tokens_max <= CONTEXT:
        raise BadInput(f"Option max_tokens must be 1 to {CONTEXT}, not {tokens_max}.")
    if temperature != 0 and not TEMPERATURE_MIN <= temperature <= TEMPERATURE_MAX:
        raise BadInput(
            f"Option temperature must be 0 or {TEMPERATURE_MIN} to {TEMPERATURE_MAX:.0f}, "
            f"not {temperature}."
        )
    if not 0 <= seed < 1 << 63:
        raise BadInput(f"Option seed must be 0 to 2^63 - 1, not {seed}.")
    if raw not in (0, 1):
        raise BadInput(f"Option raw must be 0 or 1, not {raw}.")
