"""Text and tokens of SmolLM2: its tokenizer from GGUF metadata, the chat's frame, and back again.

Flow: `weights` saves the tokenizer when the model is installed; `host` opens it to cut a prompt
into tokens and to print what comes back. `tokenizers` is imported on first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import ModelRefused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of the vocabulary's control tokens, those that frame a chat turn.
TURN_BEGINS, TURN_ENDS = 1, 2  # <|im_start|>, <|im_end|>
CONTROL = 3  # ggml's LLAMA_TOKEN_TYPE_CONTROL
# The system turn that the model was trained with, as its chat template gives it.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to


def make_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """A byte-level BPE tokenizer from GGUF's `tokenizer.ggml.*`.

    Only for the pre-tokenizer that llama.cpp calls `smollm`: every digit alone, then GPT-2's words.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, before = (metadata.get(f"tokenizer.ggml.{part}") for part in ("model", "pre"))
    if (model, before) != ("gpt2", "smollm"):
        raise ModelRefused(f"The weight file's tokenizer is {model!r}/{before!r}, not gpt2/smollm.")
    try:
        tokens = list(metadata["tokenizer.ggml.tokens"])
        kinds = list(metadata["tokenizer.ggml.token_type"])
        merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
        table = {token: number for number, token in enumerate(tokens)}
        sizes = {len(table), len(tokens), len(kinds)}
        if len(sizes) != 1 or any(len(pair) != 2 for pair in merges):
            raise ValueError("its lists do not fit together")
        tokenizer = Tokenizer(models.BPE(vocab=table, merges=merges))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelRefused(f"The weight file's tokenizer cannot be read: {error}.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


@lru_cache(maxsize=2)
def open_tokenizer(path: str) -> Tokenizer:
    """The installed tokenizer; control tokens written out in a text are text."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelRefused(f"The tokenizer {path} cannot be read: {error}.") from error
    # Else a prompt with <|im_end|> in it would end the user's turn.
    tokenizer.encode_special_tokens = True
    return tokenizer


def chat_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The model's chat template for one question: system's turn, the user's, and ours begun."""

    def words(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    turns = [("system", SYSTEM), ("user", prompt)]
    tokens = []
    for role, text in turns:
        tokens += [TURN_BEGINS, *words(f"{role}\n{text}"), TURN_ENDS, *words("\n")]
    return [*tokens, TURN_BEGINS, *words("assistant\n")]


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], *, whole: bool) -> str:
    """The text of generated tokens, without control tokens.

    A character may be cut over several tokens: unless the text is `whole`, what may still become
    one is held back, so that the text of more tokens begins with the text of fewer.
    """
    size = tokenizer.get_vocab_size()
    known = [token for token in tokens if 0 <= token < size]  # cars may send anything
    text: str = tokenizer.decode(known, skip_special_tokens=True)
    return text if whole else text.rstrip(INCOMPLETE)
