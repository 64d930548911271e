"""The blob store: any order of chunks, nothing wrong kept, what a crash leaves, the quota."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import VerificationFailed
from meshnode.ledger import blobmap, blobs
from meshnode.ledger.blobs import BlobStore
from meshnode.protocol.types import CHUNK_BYTES, ArraySpec, BlobRef, Digest


def cbor_uint(major: int, number: int) -> bytes:
    """RFC 8949 section 3, by hand: the id must not depend on a library's choices."""
    for info, limit, form in ((None, 24, ""), (24, 1 << 8, "B"), (25, 1 << 16, "H")):
        if number < limit:
            if info is None:
                return bytes((major << 5 | number,))
            return bytes((major << 5 | info,)) + struct.pack(">" + form, number)
    return bytes((major << 5 | 26,)) + struct.pack(">I", number)


def manifest_of(content: bytes) -> tuple[BlobRef, tuple[bytes, ...], list[bytes]]:
    pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
    digests = tuple(hashlib.sha256(piece).digest() for piece in pieces)
    listed = cbor_uint(4, len(digests)) + b"".join(cbor_uint(2, 32) + d for d in digests)
    manifest = cbor_uint(4, 2) + cbor_uint(0, len(content)) + listed
    return BlobRef(Digest(hashlib.sha256(manifest).digest()), len(content)), digests, pieces


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def read_all(store: BlobStore, ref: BlobRef) -> bytes:
    fd = store.open_blob(ref.blob_id)
    try:
        return os.pread(fd, ref.size + 1, 0)
    finally:
        os.close(fd)


SIZES = st.sampled_from(
    [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 5 * CHUNK_BYTES + 7]
)


@given(size=SIZES, steps=st.lists(st.tuples(st.integers(0, 5), st.sampled_from("gggbtr"))))
def test_chunks_in_any_order_again_wrong_or_after_a_restart(
    tmp_path_factory: pytest.TempPathFactory, size: int, steps: list[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    content = content_of(size)
    ref, digests, pieces = manifest_of(content)
    store = BlobStore(folder)
    assert store.manifest(ref.blob_id) is None
    assert store.missing(ref, 0, 99) == list(range(len(pieces)))
    store.begin(ref, digests)
    here: set[int] = set()
    for index, kind in steps:
        if index >= len(pieces):
            continue
        match kind:
            case "g":
                store.write_chunk(ref.blob_id, index, pieces[index])
                here.add(index)
            case "b":
                wrong = bytes((pieces[index][0] ^ 1,)) + pieces[index][1:]
                with pytest.raises(VerificationFailed):
                    store.write_chunk(ref.blob_id, index, wrong)
            case "t":
                with pytest.raises(VerificationFailed):
                    store.write_chunk(ref.blob_id, index, pieces[index][:-1])
            case "r":
                store = BlobStore(folder)
                store.begin(ref, digests)
        assert store.missing(ref, 0, len(pieces)) == sorted(set(range(len(pieces))) - here)
    assert store.manifest(ref.blob_id) == (size, digests)
    for index, piece in enumerate(pieces):
        assert store.read_chunk(ref.blob_id, index) == (piece if index in here else None)
    if len(here) < len(pieces):
        assert store.held() == ()
        with pytest.raises(FileNotFoundError):
            store.open_blob(ref.blob_id)
    for index in store.missing(ref, 0, len(pieces)):
        store.write_chunk(ref.blob_id, index, pieces[index])
    assert store.held() == BlobStore(folder).held() == (ref.blob_id,)
    assert read_all(BlobStore(folder), ref) == content


@given(size=SIZES, seed=st.integers(0, 3))
def test_ids_are_those_of_an_independent_computation(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    content = content_of(size, seed)
    ref, digests, _ = manifest_of(content)
    store = BlobStore(folder / "store")
    assert store.put_bytes(content) == ref
    (folder / "file").write_bytes(content)
    assert store.put_file(folder / "file") == ref
    with (folder / "file").open("ab+") as longer:  # an open file counts as far as it is said to
        longer.write(b"more")
        longer.flush()
        assert store.put_open(longer.fileno(), ref.size) == ref
    assert store.manifest(ref.blob_id) == (size, digests)
    assert store.held() == (ref.blob_id,)
    assert store.bytes_used == size
    assert read_all(store, ref) == content
    assert sorted(p.suffix for p in (folder / "store").iterdir()) == [".map", ".raw"]
    for path in (folder / "store").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_put_completes_a_partial_blob(tmp_path: Path) -> None:
    content = content_of(2 * CHUNK_BYTES)
    ref, digests, pieces = manifest_of(content)
    store = BlobStore(tmp_path)
    store.begin(ref, digests)
    store.write_chunk(ref.blob_id, 1, pieces[1])
    assert store.put_bytes(content) == ref
    assert read_all(store, ref) == content
    assert store.bytes_used == ref.size


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.arange(6, dtype=">f4").reshape(2, 3), "float32"),
        (np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)), "int64"),
        (np.array([[True], [False]])[::-1], "bool"),
        (np.float64(2.5).reshape(()), "float64"),
        (np.zeros((0, 4), np.uint8), "uint8"),
    ],
)
def test_arrays_are_little_endian_rows(tmp_path: Path, array: np.ndarray, dtype: str) -> None:
    store = BlobStore(tmp_path)
    ref, spec = store.put_array(array)
    assert spec == ArraySpec(dtype, array.shape)
    flat = np.frombuffer(read_all(store, ref), np.dtype(dtype).newbyteorder("<"))
    assert np.array_equal(flat.reshape(array.shape), array)


def test_a_manifest_that_is_not_the_ids_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    ref, digests, pieces = manifest_of(content_of(2 * CHUNK_BYTES))
    for size, chunk_digests in (
        (ref.size, digests[::-1]),
        (ref.size - 1, digests),
        (ref.size, digests[:1]),
        (-1, ()),
    ):
        with pytest.raises(VerificationFailed):
            store.begin(BlobRef(ref.blob_id, size), chunk_digests)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="no longer"):
        store.write_chunk(ref.blob_id, 0, pieces[0])


def test_ranges(tmp_path: Path) -> None:
    content = content_of(3 * CHUNK_BYTES + 5)
    ref, digests, pieces = manifest_of(content)
    store = BlobStore(tmp_path)
    store.begin(ref, digests)
    store.write_chunk(ref.blob_id, 1, pieces[1])
    first, end = CHUNK_BYTES, 2 * CHUNK_BYTES
    assert store.read_range(ref.blob_id, first + 3, 9) == content[first + 3 : first + 12]
    assert store.read_range(ref.blob_id, first, CHUNK_BYTES) == pieces[1]
    assert store.read_range(ref.blob_id, first - 1, 2) is None
    assert store.read_range(ref.blob_id, end - 1, 2) is None
    assert store.read_range(ref.blob_id, ref.size - 1, 2) is None
    assert store.read_range(Digest(bytes(32)), 0, 0) is None


def test_the_quota_evicts_what_was_used_longest_ago_and_never_a_pinned_blob(
    tmp_path: Path,
) -> None:
    store = BlobStore(tmp_path, bytes_max=3_000)
    a, b, c = (store.put_bytes(content_of(1_000, seed)) for seed in range(3))
    assert store.read_chunk(a.blob_id, 0) is not None  # b is the oldest now
    open_fd = store.open_blob(b.blob_id)
    store.read_chunk(c.blob_id, 0)
    store.read_chunk(a.blob_id, 0)
    d = store.put_bytes(content_of(1_000, 3))
    assert store.held() == (c.blob_id, a.blob_id, d.blob_id)
    assert os.pread(open_fd, 2_000, 0) == content_of(1_000, 1)  # a worker goes on
    os.close(open_fd)
    store.pin(c.blob_id)
    store.pin(c.blob_id)
    store.unpin(c.blob_id)
    e = store.put_bytes(content_of(2_000, 4))
    assert store.held() == (c.blob_id, e.blob_id)
    with pytest.raises(OSError, match="quota") as caught:
        store.put_bytes(content_of(2_001, 5))
    assert caught.value.errno == errno.ENOSPC
    assert store.held() == (c.blob_id, e.blob_id)  # nothing was evicted in vain
    store.unpin(c.blob_id)
    ref, digests, _ = manifest_of(content_of(3_000, 6))
    store.begin(ref, digests)
    assert store.held() == ()
    assert store.bytes_used == 3_000
    assert {path.stem for path in tmp_path.iterdir()} == {ref.blob_id.hex()}


def test_the_order_of_eviction_survives_a_restart(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    refs = [store.put_bytes(content_of(1_000, seed)) for seed in range(3)]
    for age, ref in ((30, refs[1]), (20, refs[2]), (10, refs[0])):
        os.utime(tmp_path / f"{ref.blob_id.hex()}.map", (1e9 - age, 1e9 - age))
    store = BlobStore(tmp_path)
    assert store.held() == tuple(refs[n].blob_id for n in (1, 2, 0))
    store.read_chunk(refs[1].blob_id, 0)
    assert BlobStore(tmp_path).held()[-1] == refs[1].blob_id


def test_halves_of_a_crash_are_cleared_and_foreign_files_stay(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    kept, no_raw, short, torn = (store.put_bytes(content_of(1_000, seed)) for seed in range(4))
    (tmp_path / f"{no_raw.blob_id.hex()}.raw").unlink()
    os.truncate(tmp_path / f"{short.blob_id.hex()}.raw", 10)
    os.truncate(tmp_path / f"{torn.blob_id.hex()}.map", 40)
    for name in ("draft-1-1", f"{bytes(32).hex()}.raw", f"{bytes(32).hex()}.new", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    forged = (tmp_path / f"{kept.blob_id.hex()}.map").read_bytes()
    (tmp_path / f"{bytes(32).hex()}.map").write_bytes(forged)  # not the map of that id
    assert BlobStore(tmp_path).held() == (kept.blob_id,)
    name = kept.blob_id.hex()
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.raw", f"{name}.map", "note.txt"}


def other_boot(folder: Path, monkeypatch: pytest.MonkeyPatch, boot: int) -> BlobStore:
    monkeypatch.setattr(blobmap, "boot_id", lambda: bytes([boot]) * 16)
    return BlobStore(folder)


def corrupt(folder: Path, ref: BlobRef, at: int) -> None:
    """As a power loss does: the map says that the chunk is here, its page never came."""
    with (folder / f"{ref.blob_id.hex()}.raw").open("r+b") as raw:
        raw.seek(at)
        raw.write(bytes(4096))


def test_after_a_reboot_what_never_reached_the_disk_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(4 * CHUNK_BYTES)
    ref, digests, pieces = manifest_of(content)
    store = other_boot(tmp_path, monkeypatch, 1)
    store.begin(ref, digests)
    for index in (0, 1, 3):
        store.write_chunk(ref.blob_id, index, pieces[index])
    corrupt(tmp_path, ref, CHUNK_BYTES)
    store = other_boot(tmp_path, monkeypatch, 2)
    assert store.read_chunk(ref.blob_id, 1) is None
    assert store.read_chunk(ref.blob_id, 0) == pieces[0]
    store.write_chunk(ref.blob_id, 2, pieces[2])
    assert store.missing(ref, 0, 4) == [1]
    # The same boot trusts what it wrote or read back; the next hashes it all once more.
    assert other_boot(tmp_path, monkeypatch, 2).missing(ref, 0, 4) == [1]
    corrupt(tmp_path, ref, 2 * CHUNK_BYTES)
    store = other_boot(tmp_path, monkeypatch, 3)
    assert store.missing(ref, 0, 4) == [1, 2]
    for index in (1, 2):
        store.write_chunk(ref.blob_id, index, pieces[index])
    assert read_all(other_boot(tmp_path, monkeypatch, 4), ref) == content


def test_a_blob_read_back_once_is_not_hashed_at_every_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = other_boot(tmp_path, monkeypatch, 1).put_bytes(content_of(2 * CHUNK_BYTES))
    store = other_boot(tmp_path, monkeypatch, 2)
    assert store.held() == (ref.blob_id,)
    os.close(store.open_blob(ref.blob_id))
    store = other_boot(tmp_path, monkeypatch, 3)
    monkeypatch.setattr(blobs, "hashlib", None)
    os.close(store.open_blob(ref.blob_id))


def test_a_full_disk_is_an_oserror_and_the_chunk_does_not_count(tmp_path: Path) -> None:
    ref, digests, pieces = manifest_of(content_of(2 * CHUNK_BYTES))
    store = BlobStore(tmp_path)
    store.begin(ref, digests)
    raw = tmp_path / f"{ref.blob_id.hex()}.raw"
    kept = tmp_path / "kept"
    raw.rename(kept)
    raw.symlink_to("/dev/full")  # every write to it says ENOSPC
    with pytest.raises(OSError, match="No space left") as caught:
        store.write_chunk(ref.blob_id, 0, pieces[0])
    assert caught.value.errno == errno.ENOSPC
    assert store.missing(ref, 0, 2) == [0, 1]
    kept.replace(raw)
    for index in range(2):
        store.write_chunk(ref.blob_id, index, pieces[index])
    assert store.held() == (ref.blob_id,)


def test_a_put_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, bytes_max=100)
    with pytest.raises(OSError, match="quota"):
        store.put_bytes(bytes(101))
    with pytest.raises(FileNotFoundError):
        store.put_file(tmp_path / "nowhere")
    assert store.bytes_used == 0
    assert list(tmp_path.iterdir()) == []


def test_two_threads_write_one_blob(tmp_path: Path) -> None:
    content = content_of(16 * CHUNK_BYTES)
    ref, digests, pieces = manifest_of(content)
    store = BlobStore(tmp_path)
    store.begin(ref, digests)

    def write(order: list[int]) -> None:
        for index in order:
            store.write_chunk(ref.blob_id, index, pieces[index])

    orders = (list(range(16)), list(reversed(range(16))))
    threads = [threading.Thread(target=write, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert read_all(BlobStore(tmp_path), ref) == content


def test_a_partial_blob_opens_for_the_bytes_that_are_here(tmp_path: Path) -> None:
    content = content_of(3 * CHUNK_BYTES)
    ref, digests, pieces = manifest_of(content)
    store = BlobStore(tmp_path)
    store.begin(ref, digests)
    store.write_chunk(ref.blob_id, 1, pieces[1])
    fd = store.open_blob(ref.blob_id, CHUNK_BYTES + 5, 100)
    try:
        assert os.pread(fd, 100, CHUNK_BYTES + 5) == content[CHUNK_BYTES + 5 : CHUNK_BYTES + 105]
    finally:
        os.close(fd)
    for first, count in ((0, 1), (CHUNK_BYTES, CHUNK_BYTES + 1), (4 * CHUNK_BYTES, 1)):
        with pytest.raises(FileNotFoundError):
            store.open_blob(ref.blob_id, first, count)
