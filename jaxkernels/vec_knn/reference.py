"""vec.knn@1 in NumPy, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..host import Array
from .api import QUERIES, ROWS, TOP, WIDTH


def _scores(queries: Array, corpus: Array, valid: Array) -> Array:
    """Exact enough: float64, without the padding."""
    return queries.astype(np.float64) @ corpus[: int(valid[0])].astype(np.float64).T


def reference(queries: Array, corpus: Array, valid: Array) -> tuple[Array, ...]:
    scores = _scores(queries, corpus, valid)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    best = np.full((QUERIES, TOP), -np.inf)
    indices = np.full((QUERIES, TOP), -1, dtype=np.int32)
    best[:, : order.shape[1]] = np.take_along_axis(scores, order, axis=1)
    indices[:, : order.shape[1]] = order
    return best, indices


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    """Unit vectors, a few duplicate rows, padding that would win if it were looked at."""

    def unit(count: int) -> Array:
        vectors = rng.standard_normal((count, WIDTH), dtype=np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    queries, corpus = unit(QUERIES), unit(ROWS)
    valid = int(rng.integers(TOP // 2, ROWS))
    corpus[valid // 2] = corpus[0]
    corpus[valid:] = queries[0] * 10
    return queries, corpus, np.array([valid], dtype=np.int32)


def error(outs: Sequence[Array], queries: Array, corpus: Array, valid: Array) -> float:
    """How far the answer is from a right one, in score.

    Rows may change places where their scores are closer than float32 tells apart, so indices are
    judged by the exact scores of the rows they name; a repeated or missing row is wrong outright.
    """
    scores, indices = outs[0].astype(np.float64), outs[1]
    exact = _scores(queries, corpus, valid)
    best, _ = reference(queries, corpus, valid)
    places = min(TOP, int(valid[0]))
    worst = 0.0
    for q in range(QUERIES):
        named = indices[q, :places]
        empty = bool((indices[q, places:] == -1).all() and np.isneginf(scores[q, places:]).all())
        inside = bool(((named >= 0) & (named < valid[0])).all())
        if not empty or not inside or len(set(named.tolist())) != places:
            return float("inf")
        truth = exact[q, named]
        worst = max(worst, float(np.abs(scores[q, :places] - truth).max(initial=0)))
        worst = max(worst, float(np.abs(best[q, :places] - truth).max(initial=0)))
    return worst
