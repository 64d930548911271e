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

from meshnode.errors import LocalResource, Refused
from meshnode.protocol.events import TermsChanged
from meshnode.protocol.papers import T_CONSENT, Policy
from meshnode.protocol.sealed import unseal

from . import terms

if TYPE_CHECKING:
    from .running import RunningNode


class OwnersWord:
    def __init__(self, node: RunningNode) -> None:
        self._node = node
        self._lock = trio.Lock()
        self._withdrawals = 0
        self._withdrawn = False  # until the owner gives a consent: no fleet's word brings one back
        self.on_policy: Callable[[Policy], None] = lambda _: None

    async def set_terms(self, papers: tuple[bytes, ...]) -> bool:
        """The owner's papers in force from now on; none of them is a withdrawal. Whether the node
        must be started again before it computes: it has had no policy, so it has no vehicle.

        A withdrawal stops the car before anything is written, and whatever came before it is not
        put in force after it. Refused if one has come meanwhile.
        """
        ends, node = terms.ends_consent(papers), self._node
        accept = partial(terms.accept, node.home, papers, node.clock.now().unix_ms)
        if not ends:
            gives = any(unseal(wire).typ == T_CONSENT for wire in papers)
            in_force = await self._change(accept, gives=gives)
            return in_force and node.vehicle is None and node.config.node.provides
        self._withdrawals += 1
        self._withdrawn = True
        node.driver.post(TermsChanged(None, None))
        with trio.CancelScope(shield=True):  # whoever asked for it may be gone: it is written
            try:
                await self._change(accept, ends=True)
            except LocalResource:
                terms.put_away(node.home)  # a full disk: renaming needs no room
                raise
        return False

    async def set_fleet(self, fleet: bytes | None) -> None:
        """The operator's terms in force from now on, or none."""
        if fleet is not None and self._withdrawn:
            raise terms.NoConsent("the consent was withdrawn: there is nothing to narrow")
        await self._change(partial(terms.accept_fleet, self._node.home, fleet))

    async def _change(
        self, accept: Callable[[], terms.InForce | None], *, ends: bool = False, gives: bool = False
    ) -> bool:
        """Whether papers are in force now; the owner `ends` or `gives` consent with them."""
        withdrawals, node = self._withdrawals, self._node
        async with self._lock:
            if withdrawals != self._withdrawals and not ends:
                raise Refused("the consent was withdrawn meanwhile; give a new one")
            found = await trio.to_thread.run_sync(accept)
            if withdrawals != self._withdrawals and not ends:
                terms.put_away(node.home)
                raise Refused("the consent was withdrawn meanwhile; give a new one")
            self._withdrawn = self._withdrawn and not gives
            if found is None or (self._withdrawn and not ends):
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
