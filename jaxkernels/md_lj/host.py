"""Submitter's side of md.lj@1: how many trajectories, of what density and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import BadInput
from ..host import Array, Context, Options, Prepared, make_arg
from ..models import Model
from .api import ATOMS, CELLS, INFO

TRAJECTORIES_MAX = 1 << 14  # 500 MB of state


def prepare(inputs: Any, options: Options, model: Model | None = None) -> Prepared:
    """`inputs`: the number of trajectories; each begins on a lattice with velocities of its own."""
    if isinstance(inputs, bool) or not isinstance(inputs, int):
        raise BadInput(f"{INFO.spec} takes a number of trajectories.")
    if not 1 <= inputs <= TRAJECTORIES_MAX:
        raise BadInput(f"The number of trajectories must be 1 to {TRAJECTORIES_MAX}, not {inputs}.")
    box, cutoff, dt, temperature = _check(options)
    place = lattice(box)
    state = {name: np.empty((inputs, ATOMS), np.float32) for name in ("vx", "vy", "vz")}
    for number in range(inputs):
        rng = np.random.default_rng((options["seed"], number))
        speed = thermal_velocities(rng, temperature)
        for axis, name in enumerate(("vx", "vy", "vz")):
            state[name][number] = speed[:, axis]
    for axis, name in enumerate("xyz"):
        state[name] = np.broadcast_to(place[:, axis].astype(np.float32), (inputs, ATOMS))
        # Each atom of the lattice is a centre of symmetry, so the forces on it cancel.
        state["f" + name] = np.zeros((inputs, ATOMS), np.float32)
    energies = [lattice_energy(place, box, cutoff), 1.5 * temperature * (ATOMS - 1) / ATOMS]
    state["energies"] = np.tile(np.array(energies, np.float32), (inputs, 1))
    state["steps"] = np.zeros((inputs, 1), np.int32)
    system = np.array([box, cutoff, dt], np.float32)
    args = tuple(make_arg(arg, state.get(arg.name, system), inputs) for arg in INFO.args)
    return Prepared(INFO.spec, inputs, args, {})


def finish(outputs: Sequence[Array], context: Context) -> dict[str, Array]:
    """Of each trajectory: positions and velocities [atoms, 3], energies per atom, steps done."""
    x, y, z, vx, vy, vz, energies, steps = outputs
    return {
        "positions": np.stack([x, y, z], axis=-1),
        "velocities": np.stack([vx, vy, vz], axis=-1),
        "energies": energies,  # potential, kinetic
        "steps": steps[:, 0],
    }


def lattice(box: float) -> Array:
    """[atoms, 3]: a face-centred cubic lattice that fills the box."""
    corners = np.stack(np.meshgrid(*[np.arange(CELLS)] * 3, indexing="ij"), axis=-1)
    base = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return np.asarray((corners.reshape(-1, 1, 3) + base).reshape(-1, 3) * (box / CELLS))


def lattice_energy(place: Array, box: float, cutoff: float) -> float:
    """Potential energy per atom where all atoms see the same neighbours, as in a lattice."""
    d = place[1:] - place[0]
    r2 = ((d - box * np.round(d / box)) ** 2).sum(axis=1)
    i6 = r2[r2 < cutoff**2] ** -3.0
    shift = cutoff**-12 - cutoff**-6
    return float(2 * (i6 * i6 - i6 - shift).sum())


def thermal_velocities(rng: np.random.Generator, temperature: float) -> Array:
    """[atoms, 3] of Maxwell's law, without drift, scaled to the temperature exactly."""
    speed = rng.standard_normal((ATOMS, 3))
    speed -= speed.mean(axis=0)
    kinetic = (speed * speed).sum() / 2
    return np.asarray(speed * np.sqrt(1.5 * (ATOMS - 1) * temperature / kinetic))


def _check(options: Options) -> tuple[float, float, float, float]:
    bounds = {"density": (0.01, 2.0), "temperature": (0.0, 20.0), "cutoff": (1.0, 20.0)}
    bounds["dt"] = (1e-5, 0.02)
    for name, (least, most) in bounds.items():
        if not least <= options[name] <= most:
            raise BadInput(f"Option {name} must be {least:g} to {most:g}, not {options[name]}.")
    if not 0 <= options["seed"] < 2**63:
        raise BadInput(f"Option seed must be 0 to 2^63 - 1, not {options['seed']}.")
    box = (ATOMS / options["density"]) ** (1 / 3)
    if options["cutoff"] > box / 2:
        raise BadInput(
            f"Option cutoff must be at most half the box, {box / 2:.3f} at this density, "
            f"not {options['cutoff']}."
        )
    return box, options["cutoff"], options["dt"], options["temperature"]
