"""Submitter's side of render.sdf@1: a number of frames -> tiles, and tiles -> frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import UNITS_MAX, Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import INFO, TILE

EDGE_MAX = 16384
PIXELS_MAX = 1 << 30  # of all frames: 3 GB
FOCAL = 1.5
LOOK_AT = (-0.1, 0.7, 0.0)


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: how many frames, from `start` on, `fps` a second."""
    if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 1:
        raise BadInput(f"{INFO.spec} takes a number of frames.")
    width, height = options["width"], options["height"]
    if not (1 <= width <= EDGE_MAX and 1 <= height <= EDGE_MAX):
        raise BadInput(f"Options width and height must be 1 to {EDGE_MAX}, not {width} x {height}.")
    if not 0 < options["fps"] <= 1e6 or abs(options["start"]) > 1e6:
        raise BadInput("Option fps must be over 0 and at most 1e6, and start within 1e6 seconds.")
    across, down = -(-width // TILE), -(-height // TILE)
    units = inputs * across * down
    if inputs * width * height > PIXELS_MAX or units > UNITS_MAX:
        raise BadInput(f"{inputs} frames of {width} x {height} are more than {PIXELS_MAX} pixels.")
    views = [view(options["start"] + frame / options["fps"]) for frame in range(inputs)]
    size = 2 / width  # the plane is 2 wide
    column, row = np.meshgrid(np.arange(across), np.arange(down))
    left = -1 + column.ravel() * (TILE * size)
    top = height * size / 2 - row.ravel() * (TILE * size)
    tiles = np.stack([left, top, np.full(across * down, size)], axis=1)
    arrays = (
        np.repeat(np.array([camera for camera, _ in views]), across * down, axis=0),
        np.repeat(np.array([scene for _, scene in views]), across * down, axis=0),
        np.tile(tiles, (inputs, 1)),
    )
    args = tuple(
        make_arg(arg, array.astype(np.float32), units)
        for arg, array in zip(INFO.args, arrays, strict=True)
    )
    return Prepared(INFO.spec, units, args, {"width": width, "height": height})


def finish(outputs: Sequence[Array], context: Context) -> dict[str, Array]:
    """`frames`: uint8[frames, height, width, 3]; one frame alone is [height, width, 3]."""
    width, height = int(context["width"]), int(context["height"])
    across, down = -(-width // TILE), -(-height // TILE)
    tiles = outputs[0].reshape(-1, down, across, TILE, TILE, 3)
    whole = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, down * TILE, across * TILE, 3)
    frames = np.ascontiguousarray(whole[:, :height, :width])
    return {"frames": frames[0] if len(frames) == 1 else frames}


def view(seconds: float) -> tuple[Array, Array]:
    """(camera [4, 3], scene [7]) at a time: the camera goes round, the ball bobs, things turn."""
    round_ = 0.3 * seconds
    eye = np.array([3.8 * math.sin(round_ + 0.35), 1.7, -3.8 * math.cos(round_ + 0.35)])
    forward = np.array(LOOK_AT) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross([0, 1, 0], forward)
    right /= np.linalg.norm(right)
    camera = np.stack([eye, right, np.cross(forward, right), FOCAL * forward])
    tilt, turn = 0.64 + 0.4 * math.sin(0.9 * seconds), 0.45 + 0.7 * seconds
    scene = [0.5, 1.1 + 0.35 * math.sin(1.3 * seconds), 0.1]
    scene += [math.cos(tilt), math.sin(tilt), math.cos(turn), math.sin(turn)]
    return camera, np.array(scene)
