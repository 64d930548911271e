"""The messages of gRPC `kuksa.val.v2` that an adapter needs, and their numbers on the wire.

Under `client`, over protobuf. KUKSA's own stubs want a newer protobuf than libp2p allows, so the
table below is ours: only the fields that are read or written here, in a descriptor pool of its own,
where no other package's stubs of the same names are in the way. What is not in the table (arrays,
time stamps, descriptions) is skipped when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from .signals import Value

PACKAGE: Final = "kuksa.val.v2"
SERVICE: Final = f"{PACKAGE}.VAL"

# (name, number, type), "[]" for repeated. From proto/kuksa/val/v2/{types,val}.proto of
# github.com/eclipse-kuksa/kuksa-databroker at e37f138.
Fields = tuple[tuple[str, int, str], ...]
MESSAGES: Final[Mapping[str, Fields]] = {
    "Value": (
        ("string", 11, "string"),
        ("bool", 12, "bool"),
        ("int32", 13, "sint32"),
        ("int64", 14, "sint64"),
        ("uint32", 15, "uint32"),
        ("uint64", 16, "uint64"),
        ("float", 17, "float"),
        ("double", 18, "double"),
    ),
    "Datapoint": (("value", 2, "Value"),),
    "SignalID": (("path", 2, "string"),),
    "GetValuesRequest": (("signal_ids", 1, "SignalID[]"),),
    "GetValuesResponse": (("data_points", 1, "Datapoint[]"),),
    "SubscribeRequest": (("signal_paths", 1, "string[]"), ("buffer_size", 2, "uint32")),
    # On the wire a map is a repeated message of key and value.
    "Entry": (("key", 1, "string"), ("value", 2, "Datapoint")),
    "SubscribeResponse": (("entries", 1, "Entry[]"),),
    "Metadata": (("path", 9, "string"), ("unit", 16, "string")),
    "ListMetadataRequest": (("root", 1, "string"),),
    "ListMetadataResponse": (("metadata", 1, "Metadata[]"),),
}
# Messages of which at most one field is set, which one being part of what is said.
ONEOFS: Final = {"Value": "typed_value", "SignalID": "signal"}

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES: Final = {
    "string": _Field.TYPE_STRING,
    "bool": _Field.TYPE_BOOL,
    "sint32": _Field.TYPE_SINT32,
    "sint64": _Field.TYPE_SINT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
}


def classes(messages: Mapping[str, Fields]) -> dict[str, Any]:
    """A message class of protobuf for every row of a table like `MESSAGES`."""
    file = descriptor_pb2.FileDescriptorProto(name="vss.proto", package=PACKAGE, syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        if name in ONEOFS:
            message.oneof_decl.add(name=ONEOFS[name])
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number)
            repeated = kind.endswith("[]")
            field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            kind = kind.removesuffix("[]")
            if kind in _TYPES:
                field.type = _TYPES[kind]
            else:
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            if name in ONEOFS:
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in messages
    }


_CLASSES: Final = classes(MESSAGES)
GetValuesRequest: Final = _CLASSES["GetValuesRequest"]
GetValuesResponse: Final = _CLASSES["GetValuesResponse"]
SubscribeRequest: Final = _CLASSES["SubscribeRequest"]
SubscribeResponse: Final = _CLASSES["SubscribeResponse"]
ListMetadataRequest: Final = _CLASSES["ListMetadataRequest"]
ListMetadataResponse: Final = _CLASSES["ListMetadataResponse"]


def value_of(datapoint: Any) -> Value:
    """A Datapoint's plain value; None if the broker has none, or one of a type not asked for."""
    kind = datapoint.value.WhichOneof("typed_value")
    return None if kind is None else getattr(datapoint.value, kind)


def values_by_path(update: Any) -> dict[str, Value]:
    """Of a SubscribeResponse."""
    return {entry.key: value_of(entry.value) for entry in update.entries}
