"""The order of a job that is only asked about: as the real one, and nothing is stored for it.

Used by `Mesh.would` of both clients. Blobs get the ids that they would have in the node's store, so
that a car which holds them already is seen to be warm; reading them is blocking, for a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from jaxkernels import host
from jaxkernels.spec import KernelInfo
from meshnode.errors import LocalResource
from meshnode.ledger.blobs import blob_id_of
from meshnode.protocol.events import JobOrder
from meshnode.protocol.types import CHUNK_BYTES, BlobRef

from .orders import Note, Terms, check_kernel, inline_args, make_order, plain_bytes
from .programs import Foreign, foreign_order


def unstored_refs(prepared: host.Prepared) -> dict[int, BlobRef]:
    """References of the arguments that would not travel in frames. LocalResource for a file that
    cannot be read."""
    inline = inline_args(prepared)
    refs: dict[int, BlobRef] = {}
    for number, arg in enumerate(prepared.args):
        if number not in inline:
            refs[number] = file_ref(arg.path) if arg.path else _ref(_chunks(plain_bytes(arg.array)))
    return refs


def imagined_order(
    program: KernelInfo | Foreign, prepared: host.Prepared, refs: dict[int, BlobRef], terms: Terms
) -> JobOrder:
    """As `Mesh.submit_kernel` and `Mesh.submit_foreign` would make it; UsageError as there."""
    if isinstance(program, Foreign):
        code = _ref(_chunks(memoryview(program.content)))
        return foreign_order(program, prepared, code, refs, terms)
    check_kernel(program, prepared)
    return make_order(prepared, refs, terms, Note.now(prepared, terms))


def kflop_per_unit(program: KernelInfo | Foreign, order: JobOrder) -> int:
    """0 if it is not known: a function of one's own is counted by the cars that judge it."""
    if isinstance(program, Foreign):
        return 0
    flops = program.flops_per_unit
    if program.stepped is not None:
        flops = flops * order.steps // max(1, program.stepped.steps_default)
    return int(flops) // 1000


def file_ref(path: Path) -> BlobRef:
    """What `Mesh.put_path` would give."""
    return _ref(_file(path))


def _ref(chunks: Iterator[bytes | memoryview]) -> BlobRef:
    size = 0
    digests: list[bytes] = []
    for chunk in chunks:
        size += len(chunk)
        digests.append(hashlib.sha256(chunk).digest())
    return BlobRef(blob_id_of(size, digests), size)


def _chunks(content: memoryview) -> Iterator[memoryview]:
    return (content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES))


def _file(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise LocalResource(f"{path} cannot be read: {error.strerror}") from None
