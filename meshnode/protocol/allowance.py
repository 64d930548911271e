"""What each account has had of this car: leases, bytes and device time of the last 24 hours.

The owner's policy may cap each (`caps`), so that one submitter cannot take the whole car, nor its
owner's data plan. `admission` asks before a lease, `receipts` tells what was used; after a restart
it is counted again from the receipts. The day is the last 24 hours, in whole hours: no time zone
and no set clock gives an account its day twice.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from .types import Account

HOUR_MS: Final = 3_600_000  # what an account has had is counted by the hour
HOURS: Final = 24  # an account may have the cap again when its use is so old
ACCOUNTS_MAX: Final = 4_096  # remembered; each needs a mandate of the network


class Used(NamedTuple):
    """By one account."""

    leases: int = 0
    bytes: int = 0
    device_ms: int = 0

    def plus(self, other: Used) -> Used:
        return Used(*(mine + its for mine, its in zip(self, other, strict=True)))


class Allowance:
    def __init__(self) -> None:
        self._hours: OrderedDict[Account, dict[int, Used]] = OrderedDict()  # the latest user last

    def add(self, account: Account, unix_ms: int, used: Used) -> None:
        """It has had that much more, at that time."""
        hour = unix_ms // HOUR_MS
        hours = self._hours.setdefault(account, {})
        hours[hour] = hours.get(hour, Used()).plus(used)
        for old in [each for each in hours if each <= max(hours) - HOURS]:
            del hours[old]
        self._hours.move_to_end(account)
        if len(self._hours) > ACCOUNTS_MAX:
            self._hours.popitem(last=False)

    def used(self, account: Account, unix_ms: int) -> Used:
        """In the 24 hours before; an hour that a clock set back puts into the future counts."""
        first = unix_ms // HOUR_MS - HOURS + 1
        hours = self._hours.get(account, {})
        total = Used()
        for hour, used in hours.items():
            if hour >= first:
                total = total.plus(used)
        return total
