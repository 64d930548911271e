"""render.sdf@1: a scene of distance fields, ray-marched; one tile of 128 x 128 pixels a unit.

    a ball that melts into a tilted ring (smooth minimum), a rounded block, a chequered floor, fog

A ray advances by the distance to the nearest surface until that is under 0.0005 of the way it has
come (sphere tracing; Hart, "Sphere tracing", The Visual Computer 12, 1996), at most 96 times. Then
one more step onto the surface, a normal from four distances at the corners of a tetrahedron, the
sun with a soft shadow of 24 steps, light of the sky, fog, square root for gamma.

The host turns time and camera into vectors, so a unit is geometry alone. Colours are 8-bit: they
cross a network where float32 would be four times as much.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec

TILE = 128
MARCH_STEPS = 96
SHADOW_STEPS = 24
NEAR = 0.05
FAR = 20.0
CLOSE = 5e-4  # of the way
PROBE = 2e-3  # distance at which the normal is taken
LIFT = 0.02  # of a shadow's ray off the surface

BALL_RADIUS = 0.45
RING_HEIGHT, RING_RADIUS, RING_THICKNESS = 0.8, 0.9, 0.25
BLOCK_CENTRE, BLOCK_HALF, BLOCK_ROUNDING = (-1.9, 0.45, 0.4), 0.35, 0.1
MELT = 0.35  # width of the smooth minimum
SUN = (0.5701, 0.6902, -0.4456)  # a unit vector towards it
SUN_COLOUR, SKY_COLOUR = (1.2, 1.1, 0.9), (0.15, 0.18, 0.25)
OBJECT, FLOOR, ZENITH = (0.9, 0.45, 0.2), (0.35, 0.4, 0.45), (0.55, 0.7, 0.95)
FOG = 0.004

_FIELD = 60  # operations of one look at the scene; a square root counts as one
_LOOKS = 40 + SHADOW_STEPS + 6  # of a ray: 40 steps are usual

INFO = KernelInfo(
    name="render.sdf",
    version=1,
    package="render_sdf",
    description="Renders frames of a ray-marched scene, in tiles that any cars share.",
    args=(
        ArgSpec("camera", "float32", (4, 3)),  # eye, right, up, forward times focal length
        # ball x, y, z; cosine and sine of the ring's tilt, and of the block's turn
        ArgSpec("scene", "float32", (7,)),
        # left edge, upper edge and size of a pixel, on the plane in front of the eye
        ArgSpec("tile", "float32", (3,)),
    ),
    outs=(ArraySpec("pixels", "uint8", (TILE, TILE, 3)),),
    numerics=NumericsClass.F32_HIGHEST,
    tolerance=1.0,  # of 255; a pixel across an edge may be what 0.05 pixels beside it is
    flops_per_unit=TILE * TILE * _LOOKS * _FIELD,
    unit_ms_hint=8.0,
    options=(
        OptionSpec("width", 640, "of a frame, pixels"),
        OptionSpec("height", 360, "of a frame, pixels"),
        OptionSpec("start", 0.0, "time of the first frame, seconds"),
        OptionSpec("fps", 24.0, "frames a second"),
    ),
)
