"""`python -m meshnode.worker.check`: the validator alone, in a process that may die of it.

Started by `meshnode.artifact.checking` for `mesh artifact check` and wherever bytes of strangers
are to be judged without being run. Says `R` once jax is imported and the process is confined; then
reads on stdin a line of JSON (`builtin`, `manifest` in hex or null) and the artifact up to the end;
then answers with one line of JSON. A crash is for the parent to see, a hang for it to kill.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, Final

from ..errors import ArtifactRefused, MeshError
from ..protocol.codec import decode
from ..protocol.objects import Manifest
from ..protocol.reasons import Reason
from ..protocol.rule import decode_map
from ..protocol.types import STEP_COUNT
from . import confine
from .header import Header
from .profile import without_devices
from .validate import validated

MEMORY_MB_MAX: Final = 512
ADDRESSES_BYTES_MAX: Final = 4 << 30  # jax's own libraries included
CPU_S_MAX: Final = 120
OPEN_FILES_MAX: Final = 16


def check_manifest(manifest: Manifest, header: Header) -> None:
    """ArtifactRefused unless the manifest says of the artifact what its own header says."""
    args = tuple(arg.spec for arg in manifest.args)
    if manifest.steps is not None:
        args = (*args, STEP_COUNT)
    for what, ours, theirs in (
        ("arguments", args, header.args),
        ("results", manifest.outs, header.outs),
        ("x64 flag", bool(manifest.x64), header.x64),
        ("calling convention", manifest.calling_convention, header.calling_convention),
        ("platforms", manifest.platforms, header.platforms),
    ):
        if ours != theirs:
            text = f"the manifest's {what} are not the artifact's"
            raise ArtifactRefused(Reason.ARTIFACT_MANIFEST, text)


def judge(content: bytes, *, builtin: bool, manifest: Manifest | None) -> dict[str, Any]:
    """The verdict on artifact bytes, as JSON values."""
    try:
        stepped = manifest is not None and manifest.steps is not None
        found = validated(content, builtin=builtin, stepped=stepped)
        if manifest is not None:
            check_manifest(manifest, found.header)
    except ArtifactRefused as refused:
        return {"accepted": False, "reason": refused.reason.name, "text": str(refused)}
    return {
        "accepted": True,
        "reason": Reason.OK.name,
        "text": Reason.OK.text,
        "operations": found.ops,
        "flop": found.cost.flop,
        "bytes": found.cost.bytes,
        "unbounded": found.cost.unbounded,
    }


def _limit() -> None:
    """Before the bytes are read. Stdout is a pipe, so no file need ever be written."""
    for which, most in (
        (resource.RLIMIT_AS, ADDRESSES_BYTES_MAX),
        (resource.RLIMIT_CPU, CPU_S_MAX),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (most, most))


def main() -> None:
    sys.setswitchinterval(1)
    confine.die_with(os.getppid())
    confine.keep_only()
    terms = confine.Terms(MEMORY_MB_MAX, without_devices())
    taken = confine.before_backend(terms)
    _limit()
    confine.after_backend(terms, taken)
    os.write(1, b"R")
    head = json.loads(sys.stdin.buffer.readline())
    content = sys.stdin.buffer.read()
    try:
        manifest = None
        if head["manifest"] is not None:
            payload = decode(bytes.fromhex(head["manifest"]))
            manifest = decode_map(Manifest, payload, closed=True)
        answer = judge(content, builtin=head["builtin"], manifest=manifest)
    except MeshError as error:
        answer = {"accepted": False, "reason": Reason.ARTIFACT_MANIFEST.name, "text": str(error)}
    os.write(1, json.dumps(answer).encode() + b"\n")
    os._exit(0)  # nothing of what the parser left is to be run any more


if __name__ == "__main__":
    main()
