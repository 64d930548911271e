"""How much energy a run takes, by the best meter that the machine has.

Beside the adapters of `meshnode.vehicle`, under `meshnode.node`, which opens the chain, feeds it
the vehicle's states and hands it to the executor:

    meter    what a meter is
    pack     the traction battery's power, summed up
    nvml     NVIDIA's counters        rapl     the processor's counters
    ina      a Jetson's sensors       profile  the estimate from a board's profile
    chain    counters become the energy of one run
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .chain import Energy, Mark, MeterChain, Terms
from .ina import InaMeter
from .meter import MWH_UJ, EnergyMethod, Meter
from .nvml import NvmlMeter
from .pack import PackMeter
from .profile import GENERIC, board_named
from .rapl import RaplMeter

__all__ = ["MWH_UJ", "Energy", "EnergyMethod", "Mark", "MeterChain", "Terms", "open_chain"]


def open_chain(
    terms: Terms,
    *,
    board: str = GENERIC,
    root: Path = Path("/"),
    load: Callable[[str], Any] = ctypes.CDLL,
) -> MeterChain:
    """All meters that this machine has, best first. Whoever opens it closes it.

    `root` is the root of the file system, `load` opens a shared library. May take a second, for
    NVIDIA's driver. LocalResource for a board that is not in the table.
    """
    profile = board_named(
        board, watt_max=terms.watt_max, efficiency_permille=terms.efficiency_permille
    )
    found: list[Meter | None] = [
        PackMeter(),
        NvmlMeter.open(load),
        RaplMeter.open(root),
        InaMeter.open(root),
    ]
    return MeterChain([meter for meter in found if meter is not None], terms, profile)
