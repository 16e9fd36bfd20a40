"""Arrays that are stored in a file and read row by row.

They are read with ``pread`` and never memory-mapped. When a mapped file is truncated, or its
storage fails, the kernel ends the process with SIGBUS, which no handler can turn into a message. A
read returns fewer bytes or raises ``OSError``: training can name the file, try again, or continue
without the row.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dalr_scale.data.shards.files import open_regular, read_exactly
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CALL = 1 << 15  # bytes read in the time of one more system call, about 4 us
_BLOCK = 1 << 24  # bytes of one read, at most


class TruncatedFile(UserError):
    """A file is shorter than when it was opened, or its offsets point outside it."""


class OpenFile:
    """A regular file open for reading; it is closed when its last reference is dropped.

    Attributes:
        path: the file, for messages.
        size: its bytes when it was opened.
    """

    def __init__(self, path: Path | str, descriptor: int | None = None) -> None:
        """Open a file, or take over a descriptor.

        Raises:
            UserError: it is missing or not a regular file.
        """
        self.descriptor = -1
        self.path = path
        self.descriptor = open_regular(path) if descriptor is None else descriptor
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    @classmethod
    def of_bytes(cls, path: Path | str, content: bytes) -> OpenFile:
        """Return a file that exists in memory only; ``path`` is its name in messages."""
        descriptor = os.memfd_create("dalr_scale")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        return cls(path, descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """Return ``size`` bytes at ``offset``.

        Raises:
            TruncatedFile: the file ends before them.
            OSError: the storage fails.
        """
        data = read_exactly(self.descriptor, size, offset)
        if len(data) != size:
            raise self.truncated()
        return data

    def read_into(self, place: memoryview, offset: int) -> None:
        """Fill ``place`` with the bytes at ``offset``; errors as ``read``."""
        if os.preadv(self.descriptor, (place,), offset) != len(place):
            place[:] = self.read(len(place), offset)  # some network file systems return less

    def truncated(self) -> TruncatedFile:
        """Return the error that this file has changed since it was opened."""
        return TruncatedFile(
            f"{self.path}: has been truncated or changed since it was opened; restore it and "
            "start again"
        )


@dataclass(frozen=True)
class FileArray:
    """An array in a file, C order.

    Attributes:
        file: the file.
        offset: bytes before its first element.
        shape: its shape; rows are counted along the first axis.
        dtype: type of an element, structured ones included.
    """

    file: OpenFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def whole(self) -> np.ndarray:
        """Return all rows; errors as ``rows``."""
        return self._block(0, len(self))

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of all rows, some at a time; errors as ``rows``."""
        end = self.offset + len(self) * self.row_bytes
        for at in range(self.offset, end, _BLOCK):
            yield self.file.read(min(_BLOCK, end - at), at)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return some rows: [len(numbers), *shape[1:]].

        Args:
            numbers: int64 [n] in 0 ... len(self) - 1.

        Raises:
            TruncatedFile: the file ends before one of them.
            OSError: the storage fails.
        """
        if not len(numbers):
            return self._view(b"")
        low, high = int(numbers.min()), int(numbers.max()) + 1
        if self._near(low, high, len(numbers), len(numbers)):
            return self._block(low, high)[numbers - low]
        return self._one_by_one(numbers, np.ones(len(numbers), np.int64))

    def spans(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return ``lengths[i]`` rows from ``starts[i]`` on, for each i, one after the other.

        Args:
            starts: int64 [n].
            lengths: int64 [n].

        Raises:
            TruncatedFile: they reach outside the array, or the file ends before one of them.
            OSError: the storage fails.
        """
        if not len(starts):
            return self._view(b"")
        if int(lengths.min()) < 0:
            raise self.file.truncated()
        low, high = int(starts.min()), int((starts + lengths).max())
        if self._near(low, high, len(starts), int(lengths.sum())):
            return gather_rows(self._block(low, high), starts - low, lengths)
        return self._one_by_one(starts, lengths)

    def _near(self, low: int, high: int, calls: int, rows: int) -> bool:
        """Whether one read of the whole range is cheaper than ``calls`` system calls."""
        if low < 0 or high > len(self):
            raise self.file.truncated()
        return (high - low - rows) * self.row_bytes <= min(calls * _CALL, _BLOCK)

    def _one_by_one(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        width = self.row_bytes
        sizes, offsets = lengths * width, self.offset + starts * width
        raw = np.empty(int(sizes.sum()), np.uint8)
        place, at = raw.data, 0
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            self.file.read_into(place[at : at + size], offset)
            at += size
        return self._view(raw)

    def _block(self, low: int, high: int) -> np.ndarray:
        width = self.row_bytes
        return self._view(self.file.read((high - low) * width, self.offset + low * width))

    def _view(self, data: bytes | np.ndarray) -> np.ndarray:
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])


class RaggedRows(NamedTuple):
    """Rows of different lengths that belong to some rows of a batch.

    Attributes:
        rows: int64 [n], rows of the batch.
        values: [sum of lengths, ...], one row after the other.
        lengths: int64 [n].
    """

    rows: np.ndarray
    values: np.ndarray
    lengths: np.ndarray


def gather_rows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the slices ``values[start : start + length]`` of some rows, one after the other.

    Args:
        values: [n, ...].
        starts: int64 [rows].
        lengths: int64 [rows].
    """
    return values[np.repeat(starts, lengths) + places(lengths)]


def places(lengths: np.ndarray) -> np.ndarray:
    """Return 0 ... length - 1 for each of some lengths, one after the other: int64 [total]."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def row_sums(values: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """Return the CRC-32 of every row's bytes: uint32 [rows].

    Args:
        values: [rows, dim]; or [n, ...] cut into rows of these lengths, one after the other.
        lengths: int64 [rows], or None where every row is one of ``values``.
    """
    width = values.itemsize * math.prod(values.shape[1:])
    sizes = np.ones(len(values), np.int64) if lengths is None else lengths
    stops = np.cumsum(sizes * width).tolist()
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    starts = [0, *stops[:-1]] if stops else []
    return np.array([zlib.crc32(data[a:b]) for a, b in zip(starts, stops, strict=True)], "<u4")
