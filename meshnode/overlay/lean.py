"""Load of libp2p what the overlay uses, and not the rest.

First of all in this package: importing this module loads libp2p. `import libp2p` pulls in QUIC,
WebSocket, WebRTC, AutoTLS, mDNS, Prometheus and two HTTP clients. With the packages below
replaced by empty stand-ins while libp2p loads, and libp2p's own __init__ left out, a process
takes 65 MB instead of 91 and the import 0.37 s instead of 0.66 (measured: trio, cbor2, nacl and
the modules used here). The stand-ins are gone from `sys.modules` afterwards, so that anybody
else who imports one of the packages gets the real one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

UNUSED: Final = frozenset(
    {
        "aioquic",  # QUIC: 2 MB/s here, not used
        "httpx",  # AutoTLS
        "prometheus_client",  # libp2p's own metrics server
        "requests",  # AutoTLS
        "trio_websocket",  # WebSocket transport
        "wsproto",
        "zeroconf",  # mDNS
    }
)


class _StandIn(ModuleType):
    """A module that has whatever is asked for, as a class that does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Exception,), {"__class_getitem__": classmethod(lambda cls, _: cls)})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in UNUSED:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def _load() -> None:
    if "libp2p" in sys.modules:
        return
    spec = importlib.util.find_spec("libp2p")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("libp2p is not installed", name="libp2p")
    package = ModuleType("libp2p")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["libp2p"] = package
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        # libp2p's modules import each other in a circle; this is where its own __init__ enters.
        importlib.import_module("libp2p.transport.quic.utils")
        for name in ("host.basic_host", "kad_dht.kad_dht", "pubsub.gossipsub", "pubsub.pubsub"):
            importlib.import_module(f"libp2p.{name}")
        for name in ("security.noise.transport", "security.insecure.transport"):
            importlib.import_module(f"libp2p.{name}")
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _StandIn):
                del sys.modules[name]


_load()
