"""Submitter's side of embed.minilm@1: passages of text in, one unit vector per passage out.

Flow: text -> WordPiece ids (the model's own tokenizer.json) -> units of 8 x 128, padded -> the
mesh -> vectors in the passages' order. No jax; `tokenizers` is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInput, ModelRefused
from ..host import UNITS_MAX, Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import BATCH, INFO, TOKENS, WIDTH

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PASSAGES_MAX = UNITS_MAX * BATCH
SPECIAL_TOKENS = 2  # [CLS] and [SEP], which open and close each passage
# Passages for which Python objects of the tokenizer live at once.
TOKENIZE_BATCH = 1024


def open_tokenizer(path: Path) -> Tokenizer:
    """The model's tokenizer, without the fixed length and padding that its file asks for."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelRefused(f"The tokenizer {path} cannot be read: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: a list of strings, each at most 128 tokens or cut there (`context["cut"]`)."""
    assert model is not None  # host.prepare has looked
    long = options["long"]
    if long not in ("cut", "refuse"):
        raise BadInput(f"Option long must be cut or refuse, not {long!r}.")
    passages = _check(inputs)
    units = -(-len(passages) // BATCH)
    ids = np.zeros((units * BATCH, TOKENS), dtype=np.int32)
    mask = np.zeros((units * BATCH, TOKENS), dtype=np.int32)
    tokenizer, cut = open_tokenizer(model.tokenizer_path), 0
    for first in range(0, len(passages), TOKENIZE_BATCH):
        group = tokenizer.encode_batch_fast(passages[first : first + TOKENIZE_BATCH])
        for row, encoding in enumerate(group, start=first):
            tokens = encoding.ids
            if len(tokens) > TOKENS:
                if long == "refuse":
                    raise BadInput(f"Passage {row} has {len(tokens)} tokens; {TOKENS} fit.")
                tokens, cut = [*tokens[: TOKENS - 1], tokens[-1]], cut + 1  # keeps [SEP]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
    arrays: list[tuple[Array, Path | None]] = [(arg.open(), arg.path) for arg in model.args]
    arrays += [(a.reshape(units, BATCH, TOKENS), None) for a in (ids, mask)]
    args = tuple(
        make_arg(arg, array, units, path)
        for arg, (array, path) in zip(INFO.args, arrays, strict=True)
    )
    return Prepared(INFO.spec, units, args, {"passages": len(passages), "cut": cut})


def finish(outputs: Sequence[Array], context: Context) -> Array:
    """float32[passages, 384], each of length 1, in the order of the passages."""
    return outputs[0].reshape(-1, WIDTH)[: int(context["passages"])]


def split_passages(text: str, tokenizer: Tokenizer, tokens_max: int = TOKENS) -> list[str]:
    """Cut a text into passages of at most `tokens_max` tokens, at the best place near the end.

    Greedy: each passage takes as many tokens as fit, then gives back up to a quarter of them to end
    at a paragraph, else at a line or sentence, else between words. Only white space is lost.
    """
    room = tokens_max - SPECIAL_TOKENS
    if room < 1:
        raise BadInput(f"A passage needs more than {SPECIAL_TOKENS} tokens, not {tokens_max}.")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans, words = encoding.offsets, encoding.word_ids
    passages, first = [], 0
    while first < len(spans):
        last = first + room
        if last < len(spans):
            at = range(max(first + 1, last - room // 4), last + 1)
            last = max(at, key=lambda i: (_break_rank(text, spans, words, i), i))
        begin = 0 if first == 0 else spans[first][0]
        end = len(text) if last >= len(spans) else spans[last][0]
        passages.append(text[begin:end].strip())
        first = last
    return [passage for passage in passages if passage]


def _break_rank(text: str, spans: list[tuple[int, int]], words: list[int | None], i: int) -> int:
    """How good a cut before token `i` is: 4 paragraph, 3 sentence or line, 2, 1 word."""
    gap = text[spans[i - 1][1] : spans[i][0]]
    if "\n\n" in gap:
        return 4
    if "\n" in gap or (gap and text[spans[i - 1][1] - 1] in ".!?:"):
        return 3
    return 2 if gap else int(words[i - 1] != words[i])


def _check(inputs: Any) -> list[str]:
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise BadInput(f"{INFO.spec} takes a list of passages of text.")
    passages = list(inputs)
    if not 1 <= len(passages) <= PASSAGES_MAX:
        raise BadInput(f"{INFO.spec} takes 1 to {PASSAGES_MAX} passages, not {len(passages)}.")
    for row, passage in enumerate(passages):
        if not isinstance(passage, str):
            raise BadInput(f"Passage {row} is {type(passage).__name__}, not text.")
    return passages
