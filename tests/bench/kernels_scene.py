"""`bench kernels`: render.sdf's scene for libraries that compute array by array (NumPy, PyTorch).

One array per coordinate, as the kernel has it; the march looks every fourth step whether any ray
still moves, which is what a person would write. See `jaxkernels.render_sdf.api` for the scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxkernels.render_sdf import api


@dataclass(frozen=True)
class Ops:
    """What the two libraries call differently."""

    xp: Any
    where: Callable[..., Any]
    maximum: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]
    clip: Callable[[Any, float, float], Any]
    full: Callable[[float], Any]
    pixels: Any
    to_bytes: Callable[[list[Any]], Any]


def _objects(o: Ops, p: list[Any], scene: Any) -> Any:
    xp, (x, y, z) = o.xp, p
    bx, by, bz = x - scene[0], y - scene[1], z - scene[2]
    ball = xp.sqrt(bx * bx + by * by + bz * bz) - api.BALL_RADIUS
    ty = y - api.RING_HEIGHT
    axial, radial = scene[3] * ty - scene[4] * z, scene[4] * ty + scene[3] * z
    off = xp.sqrt(x * x + radial * radial) - api.RING_RADIUS
    ring = xp.sqrt(off * off + axial * axial) - api.RING_THICKNESS
    cx, cy, cz = x - api.BLOCK_CENTRE[0], y - api.BLOCK_CENTRE[1], z - api.BLOCK_CENTRE[2]
    u = xp.abs(scene[5] * cx - scene[6] * cz) - api.BLOCK_HALF
    v = xp.abs(cy) - api.BLOCK_HALF
    w = xp.abs(scene[6] * cx + scene[5] * cz) - api.BLOCK_HALF
    inside = o.clip(o.maximum(u, o.maximum(v, w)), -1e9, 0)
    u, v, w = o.clip(u, 0, 1e9), o.clip(v, 0, 1e9), o.clip(w, 0, 1e9)
    block = xp.sqrt(u * u + v * v + w * w) + inside - api.BLOCK_ROUNDING
    h = o.clip(api.MELT - xp.abs(ball - ring), 0, 1e9) * (1 / api.MELT)
    return o.minimum(o.minimum(ball, ring) - h * h * (api.MELT / 4), block)


def _field(o: Ops, p: list[Any], scene: Any) -> Any:
    return o.minimum(_objects(o, p, scene), p[1])


def render(o: Ops, camera: Any, scene: Any, tile: Any) -> Any:
    eye = camera[0]
    even = o.full(1.0)
    right = (tile[0] + (o.pixels + 0.5) * tile[2])[None, :] * even
    up = (tile[1] - (o.pixels + 0.5) * tile[2])[:, None] * even
    ray = [camera[1][k] * right + camera[2][k] * up + camera[3][k] for k in range(3)]
    scale = 1 / o.xp.sqrt(ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2])
    ray = [d * scale for d in ray]
    way = o.full(api.NEAR)
    for step in range(api.MARCH_STEPS):
        gap = _field(o, [e + d * way for e, d in zip(eye, ray, strict=True)], scene)
        moves = (gap >= api.CLOSE * way) & (way <= api.FAR)
        if step % 4 == 0 and not moves.any():
            break
        way = way + gap * moves
    gap = _field(o, [e + d * way for e, d in zip(eye, ray, strict=True)], scene)
    way = way + gap * (way < api.FAR)
    return o.to_bytes(_shade(o, eye, ray, way, scene))


def _shade(o: Ops, eye: Any, ray: list[Any], way: Any, scene: Any) -> list[Any]:
    p = [e + d * way for e, d in zip(eye, ray, strict=True)]
    n = [0 * way] * 3
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        gap = _field(o, [v + c * api.PROBE for v, c in zip(p, corner, strict=True)], scene)
        n = [v + c * gap for v, c in zip(n, corner, strict=True)]
    scale = 1 / o.xp.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2] + 1e-20)
    n = [v * scale for v in n]
    light, on = o.full(1.0), o.full(0.02)
    start = [v + m * api.LIFT for v, m in zip(p, n, strict=True)]
    for _ in range(api.SHADOW_STEPS):
        gap = _objects(o, [v + s * on for v, s in zip(start, api.SUN, strict=True)], scene)
        light = o.minimum(light, 8 * gap / on)
        on = on + o.clip(gap, 0.02, 0.3)
    facing = o.clip(n[0] * api.SUN[0] + n[1] * api.SUN[1] + n[2] * api.SUN[2], 0, 1e9)
    sun, sky = facing * o.clip(light, 0, 1e9), 0.5 + 0.5 * n[1]
    squares = o.xp.floor(p[0]) + o.xp.floor(p[2])
    bright = 0.6 + 0.4 * (squares - 2 * o.xp.floor(squares * 0.5))
    floor = p[1] < _objects(o, p, scene)
    clear, haze = o.xp.exp(-api.FOG * way * way), 0.5 * o.clip(1 - 2 * ray[1], 0, 1e9)
    channels = []
    for k in range(3):
        own = o.where(floor, api.FLOOR[k] * bright, api.OBJECT[k])
        lit = own * (sun * api.SUN_COLOUR[k] + sky * api.SKY_COLOUR[k])
        above = api.ZENITH[k] + (1 - api.ZENITH[k]) * haze
        colour = o.where(way < api.FAR, above + (lit - above) * clear, above)
        channels.append(o.xp.sqrt(o.clip(colour, 0, 1)))
    return channels
