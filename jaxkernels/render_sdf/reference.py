"""render.sdf@1 in NumPy, float64, on vectors [rays, 3], written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..host import Array
from . import api
from .api import TILE
from .host import view

NUDGE = 0.05  # pixels
CORNERS = np.array([(1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)])


def length(v: Array) -> Array:
    return np.asarray(np.sqrt((v * v).sum(-1)))


def objects(p: Array, scene: Array) -> Array:
    ball = length(p - scene[:3]) - api.BALL_RADIUS
    tilt, turn = (np.array([[c, -s], [s, c]]) for c, s in (scene[3:5], scene[5:7]))
    axial, radial = tilt @ (p[:, 1:] - [api.RING_HEIGHT, 0]).T
    ring = np.hypot(np.hypot(p[:, 0], radial) - api.RING_RADIUS, axial) - api.RING_THICKNESS
    h = np.maximum(api.MELT - np.abs(ball - ring), 0) / api.MELT
    melted = np.minimum(ball, ring) - h * h * api.MELT / 4
    q = p - api.BLOCK_CENTRE
    q[:, [0, 2]] = q[:, [0, 2]] @ turn.T
    q = np.abs(q) - api.BLOCK_HALF
    block = length(np.maximum(q, 0)) + np.minimum(q.max(-1), 0) - api.BLOCK_ROUNDING
    return np.asarray(np.minimum(melted, block))


def field(p: Array, scene: Array) -> Array:
    return np.asarray(np.minimum(objects(p, scene), p[:, 1]))


def colours(camera: Array, scene: Array, right: Array, up: Array) -> Array:
    """[rays, 3], 0 to 255, of rays through the points (right, up) of the plane before the eye."""
    ray = right[:, None] * camera[1] + up[:, None] * camera[2] + camera[3]
    ray /= length(ray)[:, None]
    way = np.full(len(ray), api.NEAR)
    for _ in range(api.MARCH_STEPS):
        gap = field(camera[0] + ray * way[:, None], scene)
        way = np.where((gap < api.CLOSE * way) | (way > api.FAR), way, way + gap)
    there = way < api.FAR
    way += np.where(there, field(camera[0] + ray * way[:, None], scene), 0)
    p = camera[0] + ray * way[:, None]
    n = sum(corner * field(p + corner * api.PROBE, scene)[:, None] for corner in CORNERS)
    n = np.asarray(n) / np.sqrt((n * n).sum(-1) + 1e-20)[:, None]
    light, on = np.ones(len(ray)), np.full(len(ray), 0.02)
    for _ in range(api.SHADOW_STEPS):
        gap = objects(p + n * api.LIFT + on[:, None] * api.SUN, scene)
        light = np.minimum(light, 8 * gap / on)
        on = on + np.clip(gap, 0.02, 0.3)
    sun = np.maximum(n @ api.SUN, 0) * np.maximum(light, 0)
    sky = 0.5 + 0.5 * n[:, 1]
    bright = 0.6 + 0.4 * ((np.floor(p[:, 0]) + np.floor(p[:, 2])) % 2)
    floor = (p[:, 1] < objects(p, scene))[:, None]
    own = np.where(floor, bright[:, None] * api.FLOOR, api.OBJECT)
    lit = own * (np.outer(sun, api.SUN_COLOUR) + np.outer(sky, api.SKY_COLOUR))
    above = api.ZENITH + np.outer(0.5 * np.maximum(1 - 2 * ray[:, 1], 0), 1 - np.array(api.ZENITH))
    clear = np.exp(-api.FOG * way * way)[:, None]
    colour = np.where((way < api.FAR)[:, None], above + (lit - above) * clear, above)
    return np.asarray(np.sqrt(np.clip(colour, 0, 1)) * 255)


def points(tile: Array) -> tuple[Array, Array]:
    """(right, up) of the tile's pixels, row by row."""
    left, top, size = (float(value) for value in tile)
    pixel = np.arange(TILE) + 0.5
    return np.tile(left + pixel * size, TILE), np.repeat(top - pixel * size, TILE)


def reference(camera: Array, scene: Array, tile: Array) -> tuple[Array, ...]:
    found = colours(camera.astype(float), scene.astype(float), *points(tile))
    return (np.floor(found + 0.5).reshape(TILE, TILE, 3).astype(np.uint8),)


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    """A tile with everything in it: edges, shadow, floor, sky."""
    camera, scene = view(float(rng.uniform(0, 10)))
    tile = np.array([-0.6, 0.5, 1.2 / TILE])
    return camera.astype(np.float32), scene.astype(np.float32), tile.astype(np.float32)


def error(outs: Sequence[Array], camera: Array, scene: Array, tile: Array) -> float:
    """Largest error of a channel, in 255ths.

    At an edge float32 may decide for the other side. So a pixel that is off is held against what
    the reference sees from there to 0.05 pixels beside it, in eight directions.
    """
    camera, scene = camera.astype(float), scene.astype(float)
    right, up = points(tile)
    got = outs[0].reshape(-1, 3).astype(float)
    low = high = colours(camera, scene, right, up)
    off = np.flatnonzero((np.abs(got - low) > 0.6).any(axis=1))
    right, up, got, low, high = right[off], up[off], got[off], low[off], high[off]
    for across in (-NUDGE, 0, NUDGE):
        for down in (-NUDGE, 0, NUDGE):
            beside = colours(camera, scene, right + across * tile[2], up + down * tile[2])
            low, high = np.minimum(low, beside), np.maximum(high, beside)
    return float(np.maximum(low - got, got - high).max(initial=0))
