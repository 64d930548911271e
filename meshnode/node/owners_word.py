"""What owner and fleet have signed, put in force while the node runs.

    control socket -> set_terms | set_fleet -> terms (checked, into the home) -> TermsChanged
                                                  -> vehicle, workers, meters

A withdrawal stops the car before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from meshnode.errors import Refused
from meshnode.protocol.events import TermsChanged
from meshnode.protocol.papers import Policy

from . import terms

if TYPE_CHECKING:
    from .running import RunningNode


class OwnersWord:
    def __init__(self, node: RunningNode) -> None:
        self._node = node
        self._lock = trio.Lock()
        self._withdrawals = 0
        self.on_policy: Callable[[Policy], None] = lambda _: None

    async def set_terms(self, papers: tuple[bytes, ...]) -> bool:
        """The owner's papers in force from now on; none of them is a withdrawal. Whether the node
        must be started again before it computes: it has had no policy, so it has no vehicle.

        A withdrawal stops the car before anything is written, and whatever came before it is not
        put in force after it. Refused if one has come meanwhile.
        """
        ends = terms.ends_consent(papers)
        if ends:
            self._withdrawals += 1
            self._node.driver.post(TermsChanged(None, None))
        now_ms = self._node.clock.now().unix_ms
        found = await self._change(partial(terms.accept, self._node.home, papers, now_ms), ends)
        return found and self._node.vehicle is None and self._node.config.node.provides

    async def set_fleet(self, fleet: bytes | None) -> None:
        """The operator's terms in force from now on, or none."""
        await self._change(partial(terms.accept_fleet, self._node.home, fleet), False)

    async def _change(self, accept: Callable[[], terms.InForce | None], ends: bool) -> bool:
        """Whether papers are in force now."""
        withdrawals, node = self._withdrawals, self._node
        async with self._lock:
            if withdrawals != self._withdrawals and not ends:
                raise Refused("the consent was withdrawn meanwhile; give a new one")
            found = await trio.to_thread.run_sync(accept)
            if withdrawals != self._withdrawals and not ends:
                terms.put_away(node.home)
                raise Refused("the consent was withdrawn meanwhile; give a new one")
            if found is None:
                return False
            fleet = None if found.fleet_sealed is None else found.fleet_sealed.wire
            consent, policy = found.consent_sealed.wire, found.policy_sealed.wire
            node.driver.post(TermsChanged(consent, policy, fleet))
            self.on_policy(found.in_effect)
            if node.vehicle is not None:
                node.vehicle.set_papers(found.in_effect, found.consent)
            if node.metering is not None:
                node.metering.set_policy(found.in_effect)
            return True
