"""What each account has had of this car: leases, bytes and device time of the last 24 hours.

The owner's policy may cap each (`caps`), so that one submitter cannot take the whole car, nor its
owner's data plan. `admission` asks before a lease, `receipts` tells what was used; after a restart
it is counted again from the receipts. The day is the last 24 hours and the hour in which they
begin: no time zone gives an account its day twice, and a clock that was wrong for a while neither
frees nor locks it for longer than that.
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
        for other in [each for each in hours if not hour - HOURS <= each <= hour + 1]:
            del hours[other]  # a day ago, or of a clock that was ahead
        self._hours.move_to_end(account)
        if len(self._hours) > ACCOUNTS_MAX:
            self._hours.popitem(last=False)

    def used(self, account: Account, unix_ms: int) -> Used:
        """In the 24 hours before, and in the hour in which they begin."""
        now = unix_ms // HOUR_MS
        hours = self._hours.get(account, {})
        total = Used()
        for hour, used in hours.items():
            if now - HOURS <= hour <= now + 1:
                total = total.plus(used)
        return total
