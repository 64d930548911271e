"""What a board draws at full load, from a table: for machines on which nothing measures.

Last in the chain. The table is `boards.toml` beside this file; a board that is not in it is
`generic`, which draws what its owner's policy allows. What comes out of either is an estimate, and
is called one.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Final

from meshnode.errors import LocalResource

TABLE: Final = "boards.toml"
GENERIC: Final = "generic"
ESTIMATE_PERMILLE: Final = 300
"""What a receipt says of an estimate: a data sheet's watts are not those of a program."""


@dataclass(frozen=True, slots=True)
class Board:
    """Watts at the board's own supply."""

    name: str
    peak_w: int
    idle_w: int = 0  # awake without work; where nobody says, it counts as work
    uncertainty_permille: int = ESTIMATE_PERMILLE

    def work_uj(self, device_ms: int) -> int:
        """Microjoules above idle of `device_ms` at full load: (peak - idle) x time."""
        return max(0, self.peak_w - self.idle_w) * device_ms * 1_000  # W x ms is mJ


def board_named(name: str, *, watt_max: int, efficiency_permille: int) -> Board:
    """The board of the table, or the generic one.

    The generic board draws `watt_max` of the policy, which is meant at the terminals, at full load.
    LocalResource for a name that is not in the table.
    """
    if name == GENERIC:
        return Board(GENERIC, watt_max * efficiency_permille // 1_000)
    table = tomllib.loads((resources.files(__package__) / TABLE).read_text(encoding="utf-8"))
    if name not in table:
        known = ", ".join([GENERIC, *table])
        raise LocalResource(f"there is no board {name!r}; there are: {known}")
    row = table[name]
    return Board(
        name,
        row["peak_w"],
        row.get("idle_w", 0),
        row.get("uncertainty_permille", ESTIMATE_PERMILLE),
    )
