"""One connection to a KUKSA databroker: the three calls that read, and none that writes.

Under `adapter`, over grpc, which is loaded with this module (20 MB) and so only in a car that has
such a broker. grpc's calls end in threads of its own; what they bring is handed to trio, and a
cancelled call is cancelled in grpc too before the cancellation goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Final

import grpc
import trio

from meshnode.vehicle.state import VehicleLost

from . import wire
from .signals import Value

MESSAGE_BYTES_MAX: Final = 4 << 20  # a list of all signals of VSS 6.0 has 0.4 MB
# A broker that is told none keeps only the newest update: an ignition could go lost behind a
# temperature. At most 1000 are allowed (val.proto).
UPDATES_KEPT: Final = 100
WHY_CHARACTERS_MAX: Final = 160  # of the broker's own words

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # a car's readings go to its broker or nowhere
    ("grpc.service_config_disable_resolution", 1),  # no settings out of the DNS
    ("grpc.enable_retries", 0),  # whoever runs the adapter runs it again
    # Else a new connection inherits the growing pauses of the last one, which failed.
    ("grpc.use_local_subchannel_pool", 1),
)


class Client:
    """`target` is grpc's address, `address` the owner's, for messages. `roots` (PEM) makes it TLS,
    empty ones with grpc's own list of authorities. Every call may raise VehicleLost."""

    def __init__(
        self, target: str, address: str, *, token: str | None, roots: bytes | None
    ) -> None:
        self._address = address
        self._headers = (("authorization", f"Bearer {token}"),) if token else ()
        if roots is None:
            self._channel = grpc.insecure_channel(target, _OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(roots or None)
            self._channel = grpc.secure_channel(target, credentials, _OPTIONS)

    def close(self) -> None:
        """Ends every call that is still out."""
        self._channel.close()

    async def units(self, timeout_s: float) -> dict[str, str]:
        """Every signal that the broker has, and its unit ("" where it names none)."""
        request = wire.ListMetadataRequest(root="Vehicle")
        reply = await self._ask("ListMetadata", request, wire.ListMetadataResponse, timeout_s)
        return {each.path: each.unit for each in reply.metadata}

    async def look(self, paths: Sequence[str], timeout_s: float) -> list[Value]:
        """The values now; see `signals.matched` for which is whose."""
        request = wire.GetValuesRequest(signal_ids=[{"path": path} for path in paths])
        reply = await self._ask("GetValues", request, wire.GetValuesResponse, timeout_s)
        return [wire.value_of(each) for each in reply.data_points]

    async def follow(self, paths: Collection[str], got: Callable[[dict[str, Value]], None]) -> None:
        """Task: `got` has the values of all paths first, then every change at once. Only ends by
        an exception."""
        call = self._channel.unary_stream(
            f"/{wire.SERVICE}/Subscribe",
            request_serializer=wire.SubscribeRequest.SerializeToString,
            response_deserializer=wire.SubscribeResponse.FromString,
        )
        # Without its filter of a least interval: KUKSA forgets what is published within it.
        request = wire.SubscribeRequest(signal_paths=sorted(paths), buffer_size=UPDATES_KEPT)
        updates = call(request, metadata=self._headers)

        def pump() -> VehicleLost:
            try:
                for update in updates:
                    trio.from_thread.run_sync(got, wire.values_by_path(update))
            except grpc.RpcError as error:
                return self._lost(error)
            return VehicleLost(f"{self._address} ended its updates")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_along, updates)
            lost = await trio.to_thread.run_sync(pump, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()
        raise lost

    async def _ask(self, method: str, request: Any, answer: Any, timeout_s: float) -> Any:
        call = self._channel.unary_unary(
            f"/{wire.SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        ).future(request, timeout=timeout_s, metadata=self._headers)
        done, here = trio.Event(), trio.lowlevel.current_trio_token()

        def wake(_call: Any) -> None:
            with suppress(trio.RunFinishedError):  # nobody waits for a cancelled call
                here.run_sync_soon(done.set)

        call.add_done_callback(wake)
        try:
            await done.wait()
        finally:
            call.cancel()
        error = call.exception()
        if error is not None:
            raise self._lost(error)
        return call.result()

    def _lost(self, error: Any) -> VehicleLost:
        """One line; the broker's words are not ours, so they are cut and made printable."""
        code = error.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return VehicleLost(f"{self._address} does not answer")
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return VehicleLost(f"{self._address} wants a token that it accepts")
        words = "".join(c if c.isprintable() else " " for c in error.details() or "")
        return VehicleLost(f"{self._address}: {code.name}: {words[:WHY_CHARACTERS_MAX]}")


async def _cancel_along(call: Any) -> None:
    """Task: end the call when this task is ended, so that the thread that reads it ends."""
    try:
        await trio.sleep_forever()
    finally:
        call.cancel()
