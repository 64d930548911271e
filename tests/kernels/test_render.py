"""render.sdf: tiles make frames without seams, whatever the frame's size."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jaxkernels import host, registry, timing
from jaxkernels.errors import BadInput
from jaxkernels.host import Array
from jaxkernels.render_sdf.api import TILE


@pytest.fixture(scope="module")
def render() -> Any:
    run, _ = timing.compile_kernel(registry.get("render.sdf@1"))

    def frames(count: int, **options: Any) -> Array:
        prepared = host.prepare("render.sdf@1", count, options)
        tiles = [run(*(arg.array[unit] for arg in prepared.args)) for unit in range(prepared.units)]
        outs = [np.stack([np.asarray(tile[0]) for tile in tiles])]
        context = json.loads(json.dumps(prepared.context))
        found: Array = host.finish("render.sdf@1", outs, context)["frames"]
        return found

    return frames


def test_a_frame_has_sky_above_and_floor_below(render: Any) -> None:
    frame = render(1, width=200, height=140)
    assert frame.shape == (140, 200, 3) and frame.dtype == np.uint8
    top, bottom = frame[0].mean(axis=0), frame[-1].mean(axis=0)
    assert top[2] > top[0] > 150  # blue, bright
    assert bottom.max() < 190 and abs(bottom[0] - bottom[1]) < 40  # grey
    assert (frame[..., 0].astype(int) - frame[..., 2] > 60).mean() > 0.03  # something orange


def test_tiles_meet_without_a_seam(render: Any) -> None:
    """The same picture at twice the size, averaged: tiles are cut elsewhere, pixels agree."""
    small = render(1, width=150, height=150).astype(float)
    large = render(1, width=300, height=300).astype(float)
    averaged = large.reshape(150, 2, 150, 2, 3).mean(axis=(1, 3))
    off = np.abs(averaged - small).max(axis=-1)
    assert np.median(off) < 2
    # Edges differ, seams would: compare the seam's column with its neighbours.
    seam = off[:, TILE - 1 : TILE + 1].mean()
    assert seam < 3 * off[:, TILE - 12 : TILE + 12].mean() + 1


def test_frames_follow_in_time(render: Any) -> None:
    both = render(2, width=64, height=64, start=1.0, fps=2.0)
    assert both.shape == (2, 64, 64, 3)
    assert (both[0] == render(1, width=64, height=64, start=1.0)).all()
    assert (both[1] == render(1, width=64, height=64, start=1.5)).all()
    assert (both[0] != both[1]).mean() > 0.1


@pytest.mark.parametrize(
    ("inputs", "options", "word"),
    [
        (0, {}, "frames"),
        ("one", {}, "frames"),
        (1, {"width": 0}, "width"),
        (1, {"height": 1 << 20}, "height"),
        (1, {"fps": 0.0}, "fps"),
        (100_000, {}, "pixels"),
    ],
)
def test_bad_options_are_one_clear_line(inputs: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word) as caught:
        host.prepare("render.sdf@1", inputs, options)
    assert "\n" not in str(caught.value)
