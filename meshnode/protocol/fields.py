"""The types of field that objects and messages share: an id, a digest, a time, a span of units."""

from __future__ import annotations

from typing import Final, NamedTuple

from .rule import (
    Bstr,
    Many,
    Row,
    Tstr,
    Uint,
)
from .types import (
    ADDR_CHARS_MAX,
    ADDRS_MAX,
    BLOB_BYTES_MAX,
    DIMS_MAX,
    JOB_UNITS_MAX,
    LEASE_UNITS_MAX,
    ArraySpec,
    BlobRef,
)

NETWORK: Final = Bstr(8)
PEER: Final = Bstr(38)
ACCOUNT: Final = Bstr(32)
DIGEST: Final = Bstr(32)
ID16: Final = Bstr(16)
PREFIX8: Final = Bstr(8)
MS: Final = Uint()
ADDRS: Final = Many(Tstr(ADDR_CHARS_MAX), ADDRS_MAX)
CLASS_DIGEST: Final = Bstr(8)
BLOB: Final = Row(BlobRef, DIGEST, Uint(BLOB_BYTES_MAX))
ARRAY: Final = Row(ArraySpec, Tstr(16), Many(Uint(1 << 40), DIMS_MAX))


class Span(NamedTuple):
    """[first, first + size): units of a job."""

    first: int
    size: int


SPAN: Final = Row(Span, Uint(JOB_UNITS_MAX), Uint(JOB_UNITS_MAX))
RUN: Final = Row(Span, Uint(JOB_UNITS_MAX), Uint(LEASE_UNITS_MAX))  # of one lease
