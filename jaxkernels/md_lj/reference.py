"""md.lj@1 in NumPy, float64: all pairs at once, written for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..host import Array
from .api import ATOMS
from .host import lattice

SAMPLE_STEPS = 10


def distances(place: Array, box: float) -> Array:
    """[atoms, atoms, 3]: from each atom to the nearest image of each other."""
    d = place[:, None] - place[None]
    return np.asarray(d - box * np.round(d / box))


def forces(place: Array, box: float, cutoff: float) -> tuple[Array, float]:
    """Force on each atom [atoms, 3] and the potential energy of all."""
    d = distances(place, box)
    r2 = (d * d).sum(-1)
    near = (r2 < cutoff**2) & (r2 > 0)
    i6 = np.where(near, 1 / np.where(near, r2, 1), 0) ** 3
    shift = 4 * (cutoff**-12 - cutoff**-6)
    over_r2 = np.where(near, (48 * i6 * i6 - 24 * i6) / np.where(near, r2, 1), 0)
    energy = np.where(near, 4 * (i6 * i6 - i6) - shift, 0).sum() / 2
    return (over_r2[..., None] * d).sum(1), float(energy)


def reference(system: Array, *state_and_steps: Any) -> tuple[Array, ...]:
    *state, n = state_and_steps
    box, cutoff, dt = (float(value) for value in system)
    place, speed, force = (np.stack(state[i : i + 3], axis=1).astype(float) for i in (0, 3, 6))
    for _ in range(int(n)):
        speed += force * dt / 2
        place += speed * dt
        force, _ = forces(place, box, cutoff)
        speed += force * dt / 2
    potential = forces(place, box, cutoff)[1] / ATOMS
    kinetic = (speed * speed).sum() / 2 / ATOMS
    components = [array[:, axis] for array in (place, speed, force) for axis in range(3)]
    return (*components, np.array([potential, kinetic]), state[10] + n)


def sample_args(rng: np.random.Generator) -> tuple[Array, ...]:
    """A shaken lattice in the middle of its motion: no force is small, no two atoms touch."""
    box, cutoff, dt = (ATOMS / 0.8442) ** (1 / 3), 2.5, 0.004
    place = lattice(box) + rng.normal(0, 0.05, (ATOMS, 3))
    speed = rng.normal(0, 0.85, (ATOMS, 3))
    force, energy = forces(place, box, cutoff)
    arrays = [array[:, axis] for array in (place, speed, force) for axis in range(3)]
    energies = np.array([energy / ATOMS, (speed * speed).sum() / 2 / ATOMS])
    state = [np.ascontiguousarray(a, dtype=np.float32) for a in (*arrays, energies)]
    system = np.array([box, cutoff, dt], dtype=np.float32)
    return system, *state, np.array([3], np.int32), np.array(SAMPLE_STEPS, np.int32)


def error(outs: Sequence[Array], *args: Any) -> float:
    """Largest error of a position, a velocity or an energy; forces over the largest of them."""
    want = reference(*args)
    if int(outs[10][0]) != int(want[10][0]):
        return float("inf")
    scale = max(float(np.abs(force).max()) for force in want[6:9])
    apart = [float(np.abs(outs[i] - want[i]).max()) for i in range(10)]
    return max(*apart[:6], *(value / scale for value in apart[6:9]), apart[9])
