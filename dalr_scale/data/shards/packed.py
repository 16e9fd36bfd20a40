"""Packed records: one small WebDataset tar of whole arrays next to a shard.

Such a tar holds one sample: a manifest (its first member) and a few ``.npy`` members, with a row
for every item (or sample) of the shard. Rows are read from their place in the tar (see ``arrays``):
a batch costs a few array operations, not Python calls for each row. Nothing is unpickled, and every
size is compared with the file before anything is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dalr_scale.data.shards.arrays import FileArray, OpenFile
from dalr_scale.data.shards.files import BLOCK, Member, open_regular, read_exactly, walk_descriptor
from dalr_scale.data.shards.writer import open_tar_writer
from dalr_scale.errors import UserError
from dalr_scale.run.files import process_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CRC = np.dtype("<u4")
OFFSET = np.dtype("<i8")

_KEY = "00000000"
_MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 1 << 20
_PEEK = 4096 - BLOCK  # with the header one page
_NPY_HEADER_LIMIT = 10_000
_NPY_START = 16_384  # bytes that hold any header of that size
_NPY_1 = b"\x93NUMPY\x01\x00"
_ArrayHeader = tuple[int, tuple[int, ...], bool, np.dtype]  # its size, shape, Fortran order, type


class PackedTar:
    """A packed tar that has been walked and whose manifest has been read.

    Attributes:
        path: the tar.
        manifest: the facts recorded with the arrays.
    """

    def __init__(self, path: Path, arrays: frozenset[str], remedy: str) -> None:
        """Open and walk the tar and read its manifest.

        Args:
            path: the tar.
            arrays: names of the arrays it may hold.
            remedy: what to do about a malformed file, for messages.

        Raises:
            UserError: it is irregular, or has no manifest that is a JSON object.
        """
        self.path = path
        self._remedy = remedy
        extensions = frozenset((_MANIFEST, *(f"{name}.npy" for name in arrays)))
        self._file = OpenFile(path)  # one descriptor for all arrays
        members = walk_descriptor(self._file.descriptor, path, extensions)
        self._members = {member.name: member for member in members}
        self.manifest: dict[str, object] = self._read_manifest()

    def malformed(self, why: str) -> UserError:
        """Return the error that this file is malformed."""
        return UserError(f"{self.path}: {why}; {self._remedy}")

    def has(self, name: str) -> bool:
        """Whether the array ``name`` is there."""
        return f"{_KEY}.{name}.npy" in self._members

    def array(self, name: str, dtype: np.dtype, dimensions: int) -> FileArray:
        """Return an array after checking its type, order, shape and size.

        Raises:
            UserError: it is missing, or of another type or shape.
        """
        member, (start, shape, fortran, found) = self._array_header(name)
        if found != dtype or fortran or len(shape) != dimensions:
            raise self.malformed(
                f"has {found} {shape} in {member.name}, not a {dimensions}-d {dtype.name} array"
            )
        count = 1
        for extent in shape:  # Python integers: a product of absurd extents cannot wrap around
            count *= int(extent)
        if min(shape) < 1 or count * dtype.itemsize != member.size - start:
            raise self.malformed(f"has an array of shape {shape} in {member.size} bytes")
        return FileArray(self._file, member.offset + start, shape, dtype)

    def itemsize(self, name: str) -> int:
        """Return the bytes of one element, as stated in the array's header."""
        return self._array_header(name)[1][3].itemsize

    def _array_header(self, name: str) -> tuple[Member, _ArrayHeader]:
        member = self._member(f"{name}.npy")
        size = min(member.size, _NPY_START)
        start = self._file.read(size, member.offset)
        if start[:8] == _NPY_1 and len(start) >= 10:  # the header only, which is cached
            start = start[: 10 + int.from_bytes(start[8:10], "little")]
        try:
            return member, _parse_npy(start)
        except (ValueError, KeyError) as error:
            raise self.malformed(f"has an unreadable array in {member.name}") from error

    def _member(self, extension: str) -> Member:
        name = f"{_KEY}.{extension}"
        if name not in self._members:
            raise self.malformed(f"has no member {name}")
        return self._members[name]

    def _read_manifest(self) -> dict[str, object]:
        member = self._member(_MANIFEST)
        if member.size > _MANIFEST_LIMIT:
            raise self.malformed(f"has a manifest of {member.size} bytes")
        try:
            manifest = json.loads(self._file.read(member.size, member.offset))
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict):
            raise self.malformed("has no manifest that is a JSON object")
        return manifest


def peek_manifest(path: Path | str) -> dict[str, object] | None:
    """Read the manifest of a packed tar from its first bytes only.

    This costs a tenth of opening it, which matters for thousands of shards. None means that it is
    not as ``write_packed`` writes it; opening it then reports the fault.
    """
    descriptor = open_regular(path)
    try:
        start = read_exactly(descriptor, BLOCK + _PEEK, 0)
    finally:
        os.close(descriptor)
    name, size = start[:100].rstrip(b"\0"), start[124:135]
    if name != f"{_KEY}.{_MANIFEST}".encode() or not size.isdigit() or int(size, 8) > _PEEK:
        return None
    try:
        manifest = json.loads(start[BLOCK : BLOCK + int(size, 8)])
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_packed(
    path: Path, manifest: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a packed tar by temporary file and rename; the bytes depend on the content only."""
    members = {_MANIFEST: json.dumps(manifest, sort_keys=True, indent=1).encode()}
    members |= {f"{name}.npy": _npy_bytes(array) for name, array in arrays.items()}
    temporary = path.with_name(f"{path.name}.tmp-{process_name()}")
    try:
        with temporary.open("wb") as stream, open_tar_writer(stream) as writer:
            writer.write({"__key__": _KEY, **members})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(arrays: Sequence[np.ndarray | FileArray]) -> str:
    """Return the SHA-256 of the bytes of some arrays, one after the other."""
    found = hashlib.sha256()
    for array in arrays:
        if isinstance(array, FileArray):
            for block in array.blocks():
                found.update(block)
        else:
            found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


@lru_cache(maxsize=4096)  # shards of one size share their headers; parsing is slow
def _parse_npy(start: bytes) -> _ArrayHeader:
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, found = read(stream, max_header_size=_NPY_HEADER_LIMIT)
    return stream.tell(), shape, fortran, found


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
