"""Submitter's side of bench.noop@1: arrays in, the same arrays plus one out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..host import Array, Context, Options, Prepared, stack_plain
from ..models import Model
from .api import INFO


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: float32[16], or float32[units, 16]."""
    return stack_plain(INFO, inputs)


def finish(outputs: Sequence[Array], context: Context) -> Array:
    return outputs[0]
