"""render.sdf@1 in JAX.

Each coordinate is one [128, 128] array: XLA CPU makes one vectorised loop of the whole scene. The
march does four steps a turn, so that the state goes through memory once in four, and ends when no
ray has moved; a ray that has arrived stays where it is, so the end changes no pixel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import api
from .api import TILE

STEPS_A_TURN = 4

Point = tuple[jax.Array, jax.Array, jax.Array]


def _smooth_min(a: jax.Array, b: jax.Array) -> jax.Array:
    h = jnp.maximum(api.MELT - jnp.abs(a - b), 0) * (1 / api.MELT)
    return jnp.minimum(a, b) - h * h * (api.MELT / 4)


# Jitted, so that the artifact holds the scene once and not ten times, which a car's validator reads
# one by one; XLA inlines it before it optimises.
@jax.jit
def objects(p: Point, scene: jax.Array) -> jax.Array:
    """Distance to the nearest thing that is not the floor."""
    x, y, z = p
    bx, by, bz = x - scene[0], y - scene[1], z - scene[2]
    ball = jnp.sqrt(bx * bx + by * by + bz * bz) - api.BALL_RADIUS
    ty = y - api.RING_HEIGHT
    axial, radial = scene[3] * ty - scene[4] * z, scene[4] * ty + scene[3] * z
    off = jnp.sqrt(x * x + radial * radial) - api.RING_RADIUS
    ring = jnp.sqrt(off * off + axial * axial) - api.RING_THICKNESS
    cx, cy, cz = (v - c for v, c in zip(p, api.BLOCK_CENTRE, strict=True))
    u = jnp.abs(scene[5] * cx - scene[6] * cz) - api.BLOCK_HALF
    v = jnp.abs(cy) - api.BLOCK_HALF
    w = jnp.abs(scene[6] * cx + scene[5] * cz) - api.BLOCK_HALF
    ou, ov, ow = jnp.maximum(u, 0), jnp.maximum(v, 0), jnp.maximum(w, 0)
    inside = jnp.minimum(jnp.maximum(u, jnp.maximum(v, w)), 0)
    block = jnp.sqrt(ou * ou + ov * ov + ow * ow) + inside - api.BLOCK_ROUNDING
    return jnp.minimum(_smooth_min(ball, ring), block)


def field(p: Point, scene: jax.Array) -> jax.Array:
    return jnp.minimum(objects(p, scene), p[1])


def _rays(camera: jax.Array, tile: jax.Array) -> Point:
    """Unit vectors through the middles of the pixels."""
    pixel = jnp.arange(TILE, dtype=jnp.float32) + 0.5
    right = jnp.broadcast_to((tile[0] + pixel * tile[2])[None, :], (TILE, TILE))
    up = jnp.broadcast_to((tile[1] - pixel * tile[2])[:, None], (TILE, TILE))
    x, y, z = (camera[1, k] * right + camera[2, k] * up + camera[3, k] for k in range(3))
    scale = jax.lax.rsqrt(x * x + y * y + z * z)
    return x * scale, y * scale, z * scale


def _along(origin: Point, ray: Point, way: jax.Array) -> Point:
    x, y, z = (o + d * way for o, d in zip(origin, ray, strict=True))
    return x, y, z


def _march(eye: Point, ray: Point, scene: jax.Array) -> jax.Array:
    """How far each ray gets; FAR or more where it meets nothing."""

    def step(way: jax.Array) -> jax.Array:
        gap = field(_along(eye, ray, way), scene)
        return jnp.where((gap < api.CLOSE * way) | (way > api.FAR), way, way + gap)

    def turn(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        count, _, before = state
        way = before
        for _ in range(STEPS_A_TURN):
            way = step(way)
        return count + STEPS_A_TURN, before, way

    def moving(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, before, way = state
        return (count < api.MARCH_STEPS) & jnp.any(before != way)

    begin = jnp.full((TILE, TILE), api.NEAR, jnp.float32)
    _, _, way = jax.lax.while_loop(moving, turn, (jnp.int32(0), jnp.zeros_like(begin), begin))
    return way + jnp.where(way < api.FAR, field(_along(eye, ray, way), scene), 0)


def _normal(p: Point, scene: jax.Array) -> Point:
    n = [jnp.zeros((TILE, TILE), jnp.float32)] * 3
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        x, y, z = (v + c * api.PROBE for v, c in zip(p, corner, strict=True))
        gap = field((x, y, z), scene)
        n = [v + c * gap for v, c in zip(n, corner, strict=True)]
    scale = jax.lax.rsqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2] + 1e-20)
    return n[0] * scale, n[1] * scale, n[2] * scale


def _shadow(p: Point, n: Point, scene: jax.Array) -> jax.Array:
    """1 in the light of the sun, 0 behind an object, between near an object's edge."""
    x, y, z = (v + m * api.LIFT for v, m in zip(p, n, strict=True))
    sun = (jnp.float32(api.SUN[0]), jnp.float32(api.SUN[1]), jnp.float32(api.SUN[2]))

    def step(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        way, light = state
        gap = objects(_along((x, y, z), sun, way), scene)
        return way + jnp.clip(gap, 0.02, 0.3), jnp.minimum(light, 8 * gap / way)

    even = jnp.ones((TILE, TILE), jnp.float32)
    _, light = jax.lax.fori_loop(0, api.SHADOW_STEPS, step, (0.02 * even, even))
    return jnp.maximum(light, 0)


def kernel(camera: jax.Array, scene: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
    eye = (camera[0, 0], camera[0, 1], camera[0, 2])
    ray = _rays(camera, tile)
    way = _march(eye, ray, scene)
    p = _along(eye, ray, way)
    n = _normal(p, scene)
    facing = jnp.maximum(sum(m * s for m, s in zip(n, api.SUN, strict=True)), 0)
    sun, sky = facing * _shadow(p, n, scene), 0.5 + 0.5 * n[1]
    squares = jnp.floor(p[0]) + jnp.floor(p[2])
    bright = 0.6 + 0.4 * (squares - 2 * jnp.floor(squares * 0.5))
    floor = p[1] < objects(p, scene)
    clear = jnp.exp(-api.FOG * way * way)
    haze = 0.5 * jnp.maximum(1 - 2 * ray[1], 0)
    channels = []
    for k in range(3):
        own = jnp.where(floor, api.FLOOR[k] * bright, api.OBJECT[k])
        lit = own * (sun * api.SUN_COLOUR[k] + sky * api.SKY_COLOUR[k])
        above = api.ZENITH[k] + (1 - api.ZENITH[k]) * haze
        colour = jnp.where(way < api.FAR, above + (lit - above) * clear, above)
        channels.append(jnp.sqrt(jnp.clip(colour, 0, 1)))
    return (jnp.floor(jnp.stack(channels, axis=-1) * 255 + 0.5).astype(jnp.uint8),)
