"""md.lj@1: molecular dynamics of 864 Lennard-Jones atoms in a periodic box, a step at a time.

    U(r) = 4 (r^-12 - r^-6) - 4 (rc^-12 - rc^-6)   below the cutoff rc, 0 above
    v += f dt / 2;  x += v dt;  f = -grad U(x);  v += f dt / 2        (velocity Verlet)

Reduced units: sigma, epsilon and the mass of an atom are 1. 864 atoms in cutoff and box are the
liquid argon of Rahman (Phys. Rev. 136, A405, 1964) and of Verlet (Phys. Rev. 159, 98, 1967), whose
integrator this is. A unit is one trajectory; its state is one array per component (structure of
arrays), so that every inner loop runs over contiguous atoms. Forces are of all pairs: a step costs
the same whatever the atoms do, there is no list to overflow, and the sum over neighbours has one
order. Positions are not folded back into the box, so that displacements can be read from them.
"""

from __future__ import annotations

from ..spec import ArgSpec, ArraySpec, KernelInfo, NumericsClass, OptionSpec, Stepped

CELLS = 6  # of the face-centred cubic lattice along each edge of the box, to begin with
ATOMS = 4 * CELLS**3
STEPS = 1000

# Of one pair: 5 for each component of the distance, 5 for its square, 9 for the force, 6 to add.
_PAIR = 35

_COMPONENTS = ("x", "y", "z", "vx", "vy", "vz", "fx", "fy", "fz")
_STATE = (
    *(ArgSpec(name, "float32", (ATOMS,)) for name in _COMPONENTS),
    ArgSpec("energies", "float32", (2,)),  # potential and kinetic, per atom
    ArgSpec("steps", "int32", (1,)),  # done since the beginning
)
_RESULT = (0, 1, 2, 3, 4, 5, 9, 10)

INFO = KernelInfo(
    name="md.lj",
    version=1,
    package="md_lj",
    description=f"Molecular dynamics, in steps: {ATOMS} Lennard-Jones atoms, a liquid by default.",
    args=(
        ArgSpec("system", "float32", (3,), mapped=False),  # edge of the box, cutoff, dt
        *_STATE,
    ),
    outs=tuple(ArraySpec(_STATE[i].name, _STATE[i].dtype, _STATE[i].shape) for i in _RESULT),
    numerics=NumericsClass.F32_HIGHEST,
    # After the 10 steps of the sample (a position of 10 has an ulp of 1e-6). Trajectories part
    # exponentially, so no bound holds for many steps.
    tolerance=1e-4,
    flops_per_unit=STEPS * ATOMS * ATOMS * _PAIR,
    unit_ms_hint=1200.0,
    options=(
        OptionSpec("density", 0.8442, "atoms per sigma^3"),
        # about half of it goes into the lattice: 0.72 is left, the triple point's
        OptionSpec("temperature", 1.45, "of the velocities to begin with, epsilon / k"),
        OptionSpec("cutoff", 2.5, "where the potential ends, sigma"),
        OptionSpec("dt", 0.004, "length of a step, sigma sqrt(mass / epsilon)"),
        OptionSpec("seed", 0, "of the velocities; each trajectory draws its own"),
    ),
    stepped=Stepped(result=_RESULT, watch=(9, 10), steps_default=STEPS, slice_steps_hint=400),
)
