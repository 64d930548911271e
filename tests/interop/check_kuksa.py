"""The generated stubs of kuksa-client, which share no code with meshnode, as the other side.

Run by a Python that has `kuksa-client==0.6.0` (it needs a protobuf that libp2p does not allow):
`.venv-kuksa/bin/python tests/interop/check_kuksa.py publish ADDRESS` sends what stands in the lines
of stdin, `[path, field of Value, value]` each, to a broker, reads it back and prints one line of
JSON with counts. `... serve` is a broker: it prints its port, has what stands in the first line of
stdin (a list of such lines, each with the signal's unit) and publishes the lines after it, until
stdin ends.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from kuksa.val.v2 import types_pb2, val_pb2, val_pb2_grpc

TIMEOUT_S = 20.0


def point(field: str, value: Any) -> types_pb2.Datapoint:
    """As a provider makes it: with the time."""
    made = types_pb2.Datapoint()
    made.timestamp.FromNanoseconds(time.time_ns())
    if field.endswith("_array"):
        getattr(made.value, field).values.extend(value)
    else:
        setattr(made.value, field, value)
    return made


def publish(address: str) -> int:
    counts = {"listed": 0, "published": 0, "read": 0, "pushed": 0}
    with grpc.insecure_channel(address) as channel:
        stub = val_pb2_grpc.VALStub(channel)
        listed = stub.ListMetadata(val_pb2.ListMetadataRequest(root="Vehicle"), timeout=TIMEOUT_S)
        paths = {each.path for each in listed.metadata}
        counts["listed"] = len(paths)
        for line in sys.stdin:
            path, field, value = json.loads(line)
            signal = types_pb2.SignalID(path=path)
            stub.PublishValue(
                val_pb2.PublishValueRequest(signal_id=signal, data_point=point(field, value)),
                timeout=TIMEOUT_S,
            )
            counts["published"] += 1
            request = val_pb2.GetValuesRequest(signal_ids=[signal])
            (read,) = stub.GetValues(request, timeout=TIMEOUT_S).data_points
            counts["read"] += read.value == point(field, value).value
        updates = stub.Subscribe(
            val_pb2.SubscribeRequest(signal_paths=sorted(paths), buffer_size=10), timeout=TIMEOUT_S
        )
        counts["pushed"] = len(next(updates).entries)
        updates.cancel()
    print(json.dumps(counts))
    return 0


class Served(val_pb2_grpc.VALServicer):  # type: ignore[misc]
    """As much of a broker as an adapter calls."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self.points = {path: point(field, value) for path, field, value, _ in rows}
        self.units = {path: unit for path, _, _, unit in rows}
        self.streams: list[queue.SimpleQueue[str | None]] = []

    def publish(self, path: str, field: str, value: Any) -> None:
        self.points[path] = point(field, value)
        for stream in list(self.streams):
            stream.put(path)

    def ListMetadata(self, request: Any, context: Any) -> Any:
        return val_pb2.ListMetadataResponse(
            metadata=[
                types_pb2.Metadata(
                    path=path,
                    id=number,
                    data_type=types_pb2.DATA_TYPE_FLOAT,
                    entry_type=types_pb2.ENTRY_TYPE_SENSOR,
                    description="what it is",
                    comment="and what it is not",
                    unit=self.units[path],
                    max=types_pb2.Value(float=100),
                    min_sample_interval=types_pb2.SampleInterval(interval_ms=100),
                )
                for number, path in enumerate(self.points)
            ]
        )

    def GetValues(self, request: Any, context: Any) -> Any:
        return val_pb2.GetValuesResponse(
            data_points=[self.points[each.path] for each in request.signal_ids]
        )

    def Subscribe(self, request: Any, context: Any) -> Iterator[Any]:
        if request.buffer_size == 0:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "one update would push out another")
        updates: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        context.add_callback(lambda: updates.put(None))
        self.streams.append(updates)
        paths = list(request.signal_paths)
        yield val_pb2.SubscribeResponse(entries={path: self.points[path] for path in paths})
        while (changed := updates.get()) is not None:
            yield val_pb2.SubscribeResponse(entries={changed: self.points[changed]})


def serve() -> int:
    served = Served(json.loads(sys.stdin.readline()))
    server = grpc.server(ThreadPoolExecutor(8))
    val_pb2_grpc.add_VALServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    for line in sys.stdin:
        served.publish(*json.loads(line))
    server.stop(None).wait(TIMEOUT_S)
    return 0


if __name__ == "__main__":
    raise SystemExit(publish(sys.argv[2]) if sys.argv[1] == "publish" else serve())
