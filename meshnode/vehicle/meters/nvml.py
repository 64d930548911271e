"""NVIDIA's own energy counters, by NVML: all boards of this machine together.

Second in the chain, for work on CUDA only. `libnvidia-ml.so.1` comes with the driver; it is loaded
here by ctypes, so nothing needs to be installed, and a machine without it has no such meter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from .meter import EnergyMethod, Traits

LIBRARY: Final = "libnvidia-ml.so.1"

# nvml.h, enum nvmlReturn_t: 0 is success. With every other code there is no reading: 1 not
# initialised, 3 not supported (boards before Volta), 4 no permission, 9 driver not loaded, 15 GPU
# lost, 18 driver and library differ, 999 unknown.
_SUCCESS: Final = 0

TRAITS: Final = Traits(
    name="nvml",
    method=EnergyMethod.DEVICE,
    # 50 for the sensor: nvml.h says +-5 % for power. 50 for what the board does not see, the host
    # that feeds it. On A100 and H100 the sensor looks at 25 % of the time (Yang et al., Part-time
    # Power Measurements, arXiv:2312.02741); over a run that is steady for seconds it evens out.
    uncertainty_permille=100,
    resolution_ms=100,  # it moves every 20 to 100 ms, depending on the board
    again_ms=100,
    period_ms=60_000,
    idle_permille=150,  # as 70 of 450 W, remembered and on the high side
    platforms=frozenset({"cuda", "gpu"}),
)


class NvmlMeter:
    """All boards that NVML names. Work of other processes on them is counted too."""

    traits = TRAITS

    def __init__(self, library: Any, boards: list[ctypes.c_void_p]) -> None:
        self._library = library
        self._boards = boards

    @classmethod
    def open(cls, load: Callable[[str], Any] = ctypes.CDLL) -> NvmlMeter | None:
        """None without a driver, or if one of the boards does not count.

        One that does not may be the one that works, and the others would then state its work as
        nothing. Takes up to a second: the driver may have to wake the boards.
        """
        try:
            library = load(LIBRARY)
            if library.nvmlInit_v2() != _SUCCESS:
                return None
        except (OSError, AttributeError):  # AttributeError: older than the call
            return None
        meter = cls(library, _boards(library))
        if not meter._boards or meter.energy_uj(0) is None:
            meter.close()
            return None
        return meter

    def energy_uj(self, now_ms: int) -> int | None:
        """Microjoules since the driver was loaded; None if a board does not answer."""
        total_mj = 0
        counted_mj = ctypes.c_ulonglong()
        for board in self._boards:
            try:
                code = self._library.nvmlDeviceGetTotalEnergyConsumption(
                    board, ctypes.byref(counted_mj)
                )
            except AttributeError:  # the driver is older than the call
                return None
            if code != _SUCCESS:
                return None
            total_mj += counted_mj.value
        return total_mj * 1_000

    def close(self) -> None:
        self._boards = []
        self._library.nvmlShutdown()


def _boards(library: Any) -> list[ctypes.c_void_p]:
    """Handles of all boards; empty if one cannot be had."""
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
        return []
    boards = []
    for index in range(count.value):
        board = ctypes.c_void_p()
        code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(board))
        if code != _SUCCESS:
            return []
        boards.append(board)
    return boards
