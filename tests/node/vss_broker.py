"""A KUKSA databroker for tests: val.v2 over real gRPC, on a port of this machine.

It has what an adapter calls (ListMetadata, GetValues, Subscribe), PublishValue for stubs of others,
and the faults of a broker: it freezes, refuses, dies, and answers in the order of its providers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc

from meshnode.vehicle.vss import signals, wire

WORKERS: Final = 8  # every Subscribe holds one
WAIT_S: Final = 20.0

PARKED: Final[Mapping[str, tuple[str, Any]]] = {
    signals.CHARGE: ("percent", 80.0),
    signals.ENERGY: ("kWh", 48.0),
    signals.CAPACITY: ("kWh", 60),
    signals.POWER: ("W", 0.0),
    signals.COLDEST: ("celsius", 20.0),
    signals.HOTTEST: ("celsius", 22.5),
    signals.CABLE_5: ("", True),
    signals.CHARGING: ("", False),
    signals.CHARGE_LIMIT: ("percent", 80),
    signals.AMBIENT: ("celsius", 18.0),
    signals.LOW_VOLTAGE: ("V", 13.2),
    signals.MOVING: ("", False),
    signals.SPEED: ("km/h", 0.0),
    signals.IGNITION: ("", "OFF"),
}
"""Path: unit and value, of VSS 5.1 and 6.0. Parked and plugged in, charged to its limit."""

# What only a broker reads: nothing of meshnode can publish.
_PUBLISHED: Final = wire.classes(
    {
        **wire.MESSAGES,
        "PublishValueRequest": (("signal_id", 1, "SignalID"), ("data_point", 2, "Datapoint")),
        "PublishValueResponse": (),
    }
)


def datapoint(value: Any) -> dict[str, Any]:
    """A Datapoint of the type that the value has; an int is unsigned, as VSS's percentages are."""
    if value is None:
        return {}
    kinds: dict[type, str] = {bool: "bool", str: "string", float: "float", int: "uint32"}
    return {"value": {kinds[type(value)]: value}}


class Broker:
    """`start` it and `stop` it, also again on the same port. Called from any thread."""

    def __init__(
        self,
        has: Mapping[str, tuple[str, Any]] = PARKED,
        *,
        token: str | None = None,
        credentials: Any = None,
        socket: Path | None = None,
    ) -> None:
        self.units = {path: unit for path, (unit, _) in has.items()}
        self.points = {path: datapoint(value) for path, (_, value) in has.items()}
        self.claimed: list[str] | None = None  # by providers, in their order
        self.hidden: set[str] = set()  # that the token does not allow to read
        self.mute = False  # it takes a Subscribe and sends nothing
        self.port = 0
        self.answers = threading.Event()  # cleared: a GetValues waits
        self.answers.set()
        self.asked: list[tuple[str, Any]] = []  # method and request
        self._token = token
        self._credentials = credentials
        self._socket = socket
        self._changed = threading.Condition()
        self._streams: list[queue.SimpleQueue[dict[str, Any] | None]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}" if self._socket is None else f"unix:{self._socket}"

    def start(self) -> None:
        methods = {
            "ListMetadata": (
                self._list,
                wire.ListMetadataRequest,
                grpc.unary_unary_rpc_method_handler,
            ),
            "GetValues": (self._get, wire.GetValuesRequest, grpc.unary_unary_rpc_method_handler),
            "PublishValue": (
                self._publish,
                _PUBLISHED["PublishValueRequest"],
                grpc.unary_unary_rpc_method_handler,
            ),
            "Subscribe": (
                self._subscribe,
                wire.SubscribeRequest,
                grpc.unary_stream_rpc_method_handler,
            ),
        }
        handlers = {
            name: kind(
                self._noting(name, method),
                request_deserializer=request.FromString,
                response_serializer=lambda reply: reply.SerializeToString(),
            )
            for name, (method, request, kind) in methods.items()
        }
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="broker")
        self._server = grpc.server(self._pool, options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, handlers),)
        )
        if self._credentials is None:
            self.port = self._server.add_insecure_port(self.address)
        else:
            self.port = self._server.add_secure_port(self.address, self._credentials)
        self._server.start()

    def stop(self) -> None:
        """Dies: every call ends, every thread too."""
        self.answers.set()
        assert self._server.stop(None).wait(WAIT_S)
        self._pool.shutdown()

    def publish(self, path: str, value: Any) -> None:
        self.publish_point(path, datapoint(value))

    def publish_point(self, path: str, point: Any) -> None:
        with self._changed:
            self.points[path] = point
            for stream in self._streams:
                stream.put({path: point})

    def is_left(self) -> bool:
        """Nobody subscribes now."""
        return not self._streams

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits, in a thread, for what a call changes."""
        with self._changed:
            assert self._changed.wait_for(holds, WAIT_S)

    def calls(self, method: str) -> int:
        return sum(name == method for name, _ in self.asked)

    # ---- the service

    def _noting(self, name: str, method: Any) -> Any:
        def noted(request: Any, context: Any) -> Any:
            headers = dict(context.invocation_metadata())
            if self._token and headers.get("authorization") != f"Bearer {self._token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid auth token")
            with self._changed:
                self.asked.append((name, request))
                self._changed.notify_all()
            return method(request, context)

        return noted

    def _known(self, path: str, context: Any) -> None:
        if path not in self.points:
            context.abort(grpc.StatusCode.NOT_FOUND, "Path not found")

    def _list(self, request: Any, context: Any) -> Any:
        return wire.ListMetadataResponse(
            metadata=[{"path": path, "unit": unit} for path, unit in self.units.items()]
        )

    def _get(self, request: Any, context: Any) -> Any:
        paths = [each.path for each in request.signal_ids]
        for path in paths:
            self._known(path, context)
            if path in self.hidden:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "Permission denied")
        if not self.answers.wait(WAIT_S):
            context.abort(grpc.StatusCode.INTERNAL, "nobody let this broker go on")
        if self.claimed is not None:
            paths = [path for path in self.claimed if path in paths]
        return wire.GetValuesResponse(data_points=[self.points[path] for path in paths])

    def _publish(self, request: Any, context: Any) -> Any:
        self._known(request.signal_id.path, context)
        value = request.data_point.value
        field = value.WhichOneof("typed_value")
        point = {} if field is None else {"value": {field: getattr(value, field)}}
        self.publish_point(request.signal_id.path, point)
        return _PUBLISHED["PublishValueResponse"]()

    def _subscribe(self, request: Any, context: Any) -> Iterator[Any]:
        for path in request.signal_paths:
            self._known(path, context)
        paths = set(request.signal_paths) - self.hidden
        updates: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        context.add_callback(lambda: updates.put(None))
        with self._changed:
            self._streams.append(updates)
            if not self.mute:
                updates.put({path: self.points[path] for path in paths})
            self._changed.notify_all()
        try:
            while (changed := updates.get()) is not None:
                entries = [{"key": path, "value": changed[path]} for path in paths & changed.keys()]
                if entries or not paths:
                    yield wire.SubscribeResponse(entries=entries)
        finally:
            with self._changed:
                self._streams.remove(updates)
                self._changed.notify_all()
