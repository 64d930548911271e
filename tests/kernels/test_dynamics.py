"""md.lj: what physics keeps, the integrator keeps; trajectories are independent and resumable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxkernels import host, registry, timing
from jaxkernels.errors import BadInput
from jaxkernels.host import Array
from jaxkernels.md_lj.api import ATOMS
from jaxkernels.md_lj.host import lattice
from jaxkernels.md_lj.reference import forces

INFO = registry.get("md.lj@1")


@pytest.fixture(scope="module")
def run() -> Any:
    return timing.compile_kernel(INFO)[0]


def begin(count: int, **options: Any) -> list[Array]:
    return [arg.array for arg in host.prepare("md.lj@1", count, options).args]


def test_the_lattice_is_at_rest_and_its_energy_is_known() -> None:
    system, *state = begin(1)
    box, cutoff, _ = (float(value) for value in system)
    force, energy = forces(lattice(box), box, cutoff)
    assert np.abs(force).max() < 1e-9
    assert float(state[9][0, 0]) == pytest.approx(energy / ATOMS, rel=1e-6)


def test_forces_are_the_slope_of_the_energy() -> None:
    rng = np.random.default_rng(3)
    box = 10.0
    place = lattice(box) + rng.normal(0, 0.05, (ATOMS, 3))
    force, _ = forces(place, box, 2.5)
    for atom, axis in ((0, 0), (100, 1), (863, 2)):
        up, down = place.copy(), place.copy()
        up[atom, axis] += 1e-5
        down[atom, axis] -= 1e-5
        slope = (forces(up, box, 2.5)[1] - forces(down, box, 2.5)[1]) / 2e-5
        assert force[atom, axis] == pytest.approx(-slope, rel=1e-3, abs=1e-3)


def test_energy_and_momentum_stay(run: Any) -> None:
    system, *state = begin(1)
    unit = [array[0] for array in state]
    outs = [np.asarray(out) for out in run(system, *unit, np.int32(400))]
    begun, ended = unit[9].sum(dtype=float), outs[9].sum(dtype=float)
    assert abs(ended - begun) < 1e-3 * abs(begun)
    # It has moved, and melted: half of the kinetic energy is gone into the potential.
    assert 0.35 < outs[9][1] / unit[9][1] < 0.65
    for axis in (3, 4, 5):
        assert abs(outs[axis].mean(dtype=float)) < 1e-5
    assert int(outs[10][0]) == 400


def test_a_shift_of_all_changes_nothing_but_the_place(run: Any) -> None:
    """Periodic: the box has no origin. The places are such that whole boxes add exactly."""
    *args, _ = timing.sample_args(INFO)
    box = np.float32(10.0)
    args[0] = np.array([box, 2.5, 0.004], np.float32)
    for axis in range(1, 4):
        args[axis] = np.round(args[axis] * 4096) / np.float32(4096)
    moved = list(args)
    for axis in range(1, 4):
        moved[axis] = args[axis] - box * np.float32(axis)
    one, two = (run(*unit, np.int32(1)) for unit in (args, moved))
    for at in (6, 7, 8):
        a, b = np.asarray(one[at]), np.asarray(two[at])
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()


def test_trajectories_are_their_own() -> None:
    three, two = begin(3, seed=5), begin(2, seed=5)
    for whole, part in zip(three[1:], two[1:], strict=True):
        assert whole[:2].tobytes() == part.tobytes()
    speeds = three[4]
    assert abs(np.corrcoef(speeds[0], speeds[1])[0, 1]) < 0.2
    assert np.abs(three[4].mean(axis=1, dtype=float)).max() < 1e-6
    kinetic = sum((three[axis].astype(float) ** 2).sum(axis=1) for axis in (4, 5, 6)) / 2 / ATOMS
    assert kinetic == pytest.approx(three[10][:, 1], rel=1e-5)


def test_result_has_places_and_speeds_of_atoms() -> None:
    _, *state = begin(2)
    assert INFO.stepped is not None
    found = host.finish("md.lj@1", [state[at] for at in INFO.stepped.result], {})
    assert found["positions"].shape == found["velocities"].shape == (2, ATOMS, 3)
    assert (found["positions"][1, :, 2] == state[2][1]).all()
    assert found["energies"].shape == (2, 2) and found["steps"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("inputs", "options", "word"),
    [
        (0, {}, "trajectories"),
        (1 << 20, {}, "trajectories"),
        (np.zeros(3), {}, "trajectories"),
        (1, {"density": 0.0}, "density"),
        (1, {"temperature": -1.0}, "temperature"),
        (1, {"cutoff": 6.0}, "half the box"),
        (1, {"dt": 1.0}, "dt"),
        (1, {"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_one_clear_line(inputs: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word) as caught:
        host.prepare("md.lj@1", inputs, options)
    assert "\n" not in str(caught.value)
