"""render.sdf: tiles make frames, whatever the frame's size."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jaxkernels import host, registry, timing
from jaxkernels.errors import BadInput
from jaxkernels.host import Array
from jaxkernels.render_sdf.host import view
from jaxkernels.render_sdf.reference import colours


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


def test_every_pixel_is_in_its_place(render: Any) -> None:
    """Against the reference's rays through points of the whole frame, which knows no tiles."""
    width, height = 300, 200
    frame = render(1, width=width, height=height, start=2.0)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, width, 2000), rng.integers(0, height, 2000)
    size = 2 / width
    right, up = -1 + (x + 0.5) * size, height * size / 2 - (y + 0.5) * size
    exact = colours(*view(2.0), right, up)
    off = np.abs(frame[y, x] - exact).max(axis=1)
    # An edge may fall on the other side in float32; a tile in a wrong place is wrong everywhere.
    assert (off > 1).mean() < 0.01


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
