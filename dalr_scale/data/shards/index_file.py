"""The index of a shard: place and checksum of every item.

``X.tar.idx`` is a fixed header and four arrays, read without conversion:

    header       magic, version, shard size and modification time, counts, SHA-256, checksums
    items        one row per caption or sentence (``ITEM``), in shard order
    samples      one row per sample (``SAMPLE``), in shard order
    quarantined  one row per line or sample that cannot be used (``QUARANTINE``)
    keys         the sample keys, one after the other, UTF-8

An item is one non-blank line of a ``.txt`` member, without surrounding white space. A quarantined
line or sample has no item, so training never sees it; the list is part of the data's fingerprint.
With a fault of the archive itself (a header, the end marker, the members of a sample not adjacent)
the whole shard is refused, because the missing content is unknown. The index belongs to one state
of the shard: its size, modification time and SHA-256 are recorded, a change is detected, and the
index is built again.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalr_scale.data.shards.arrays import FileArray, OpenFile
from dalr_scale.data.shards.files import open_regular, read_exactly
from dalr_scale.errors import UserError

MEMBER_LIMIT = 64 * 1024 * 1024  # bytes of one image or text member
CAPTION_LIMIT = 64 * 1024  # bytes of one line that are used; no tokenizer needs more

ITEM = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("sample", "<u4"), ("line", "<u4")]
)
SAMPLE = np.dtype(
    [
        ("key", "<u8"),  # position in the key block
        ("key_size", "<u4"),
        ("image_crc32", "<u4"),
        ("image", "<u8"),  # offset in the shard; meaningless where image_size is 0
        ("image_size", "<u4"),
        ("first_item", "<u4"),
    ]
)

QUARANTINE = np.dtype([("sample", "<u4"), ("line", "<u4"), ("reason", "<u4")])
REASONS = (
    "has no caption",
    "is not UTF-8",
    "has two members of one kind",
    "has several images",
    "has an empty or huge image",
    "has a huge text",
    "has an image that cannot be decoded",
)
NO_CAPTION = 0  # incomplete, not damaged
WHOLE = 0xFFFFFFFF  # in place of a line: the sample with all its lines

_MAGIC = b"DALRIDX\x02"
_HEADER = struct.Struct("<8sQqQQQQQI32sII")


@dataclass(frozen=True)
class IndexHeader:
    """Counts and identity of an indexed shard; sizes in bytes, time in nanoseconds.

    ``quarantined`` counts the quarantine list; ``deep`` says that every image was decoded for it.
    """

    shard_size: int
    mtime_ns: int
    items: int
    samples: int
    images: int
    key_bytes: int
    sha256: str
    body_crc32: int
    quarantined: int = 0
    deep: bool = False

    def pack(self) -> bytes:
        """Return the header as stored in the file, its own checksum last."""
        body = _HEADER.pack(
            _MAGIC,
            self.shard_size,
            self.mtime_ns,
            self.items,
            self.samples,
            self.images,
            self.key_bytes,
            self.quarantined,
            int(self.deep),
            bytes.fromhex(self.sha256),
            self.body_crc32,
            0,
        )[:-4]
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> IndexHeader | None:
        """Return the header, or None when it is of another version or damaged."""
        if len(data) != _HEADER.size:
            return None
        magic, size, mtime, items, samples, images, keys, quarantined, deep, sha, body_crc, crc = (
            _HEADER.unpack(data)
        )
        if magic != _MAGIC or crc != zlib.crc32(data[:-4]):
            return None
        return cls(
            size, mtime, items, samples, images, keys, sha.hex(), body_crc, quarantined, bool(deep)
        )

    def rows(self, level: str) -> int:
        """Return the rows of features of a level: samples for ``sample``, else items."""
        return self.samples if level == "sample" else self.items

    @property
    def file_size(self) -> int:
        """Bytes that the whole index file must have."""
        arrays = self.items * ITEM.itemsize + self.samples * SAMPLE.itemsize
        arrays += self.quarantined * QUARANTINE.itemsize
        return _HEADER.size + arrays + self.key_bytes


@dataclass(frozen=True)
class ShardIndex:
    """The arrays of an index.

    ``items`` has dtype ITEM, ``samples`` SAMPLE and ``quarantined`` ASIDE; the keys are text.
    """

    shard: Path
    header: IndexHeader
    items: np.ndarray
    samples: np.ndarray
    quarantined: np.ndarray
    key_block: memoryview

    def key(self, sample: int) -> str:
        """Return the key of a sample (row of ``samples``)."""
        row = self.samples[sample]
        start = int(row["key"])
        return bytes(self.key_block[start : start + int(row["key_size"])]).decode("utf-8")

    def keys(self) -> list[str]:
        """Return the keys of all samples, in shard order."""
        return [self.key(sample) for sample in range(len(self.samples))]

    def quarantine(self, *, incomplete: bool = True) -> list[str]:
        """Return the quarantine list, a sentence each, with or without incomplete pairs."""
        found = []
        for sample, line, reason in self.quarantined.tolist():
            if incomplete or reason != NO_CAPTION:
                where = "" if line == WHOLE else f"line {line + 1} of "
                what = f"{where}sample {self.key(sample)!r}"
                found.append(f"{self.shard}: {what} {REASONS[reason]}")
        return found


@dataclass(frozen=True)
class IndexRows:
    """An index that was checked as a whole and whose rows are read from its file.

    Attributes:
        shard, header: as in ``ShardIndex``.
        items, samples: the arrays, dtypes ITEM and SAMPLE.
        keys: the key block.
    """

    shard: Path
    header: IndexHeader
    items: FileArray
    samples: FileArray
    keys: FileArray

    def key(self, sample: int) -> str:
        """Return the key of a sample (row of ``samples``)."""
        row = self.samples.rows(np.array([sample]))[0]
        start, size = np.array([row["key"]], np.int64), np.array([row["key_size"]], np.int64)
        return self.keys.spans(start, size).tobytes().decode("utf-8")


@dataclass(frozen=True)
class IndexFile:
    """An index whose header has been read and whose arrays are loaded on demand.

    ``blob`` holds the whole index in memory where the shard's directory cannot be written to.
    """

    shard: Path
    header: IndexHeader
    blob: bytes | None = None

    def load(self) -> ShardIndex:
        """Read the whole index and check it: size, checksum, every offset against the shard.

        Raises:
            UserError: the index is damaged.
        """
        return self._checked(self._file())

    def open(self) -> IndexRows:
        """Check the index like ``load``, but keep nothing of it in memory.

        Raises:
            UserError: the index is damaged.
        """
        file, header = self._file(), self.header
        self._checked(file)
        items = FileArray(file, _HEADER.size, (header.items,), ITEM)
        at = _HEADER.size + header.items * ITEM.itemsize
        samples = FileArray(file, at, (header.samples,), SAMPLE)
        at += header.samples * SAMPLE.itemsize + header.quarantined * QUARANTINE.itemsize
        keys = FileArray(file, at, (header.key_bytes,), np.dtype(np.uint8))
        return IndexRows(self.shard, header, items, samples, keys)

    def _file(self) -> OpenFile:
        path = index_path(self.shard)
        return OpenFile(path) if self.blob is None else OpenFile.of_bytes(path, self.blob)

    def _checked(self, file: OpenFile) -> ShardIndex:
        header = self.header
        if file.size != header.file_size:
            raise _damaged(self.shard)
        view = memoryview(file.read(header.file_size, 0))
        if view[: _HEADER.size] != header.pack():
            raise _damaged(self.shard)
        if zlib.crc32(view[_HEADER.size :]) != header.body_crc32:
            raise _damaged(self.shard)
        items = np.frombuffer(view, ITEM, header.items, _HEADER.size)
        at = _HEADER.size + items.nbytes
        samples = np.frombuffer(view, SAMPLE, header.samples, at)
        at += samples.nbytes
        quarantined = np.frombuffer(view, QUARANTINE, header.quarantined, at)
        index = ShardIndex(
            self.shard, header, items, samples, quarantined, view[at + quarantined.nbytes :]
        )
        _check_bounds(index)
        return index


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index: ``X.tar`` -> ``X.tar.idx``."""
    return shard.with_name(shard.name + ".idx")


def current_index(shard: Path) -> IndexFile | None:
    """Return the shard's index if it exists, is complete, and is of this state of the shard."""
    path = f"{shard}.idx"  # strings, because paths are slow for thousands of shards
    try:
        descriptor = open_regular(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    try:
        header = IndexHeader.unpack(read_exactly(descriptor, _HEADER.size, 0))
        if header is None or header.file_size != os.fstat(descriptor).st_size:
            return None
    finally:
        os.close(descriptor)
    status = shard_status(shard)
    if header.shard_size != status.st_size or header.mtime_ns != status.st_mtime_ns:
        return None
    return IndexFile(shard, header)


def read_header(path: Path) -> IndexHeader | None:
    """Return the header of an index file, or None when it is damaged or of another version."""
    descriptor = open_regular(path)
    try:
        return IndexHeader.unpack(read_exactly(descriptor, _HEADER.size, 0))
    finally:
        os.close(descriptor)


def shard_status(path: Path) -> os.stat_result:
    """Return size and times of a shard; raises ``UserError`` when it cannot be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _damaged(shard: Path) -> UserError:
    path = index_path(shard)
    return UserError(f"{path}: is damaged; remove it and run dalr-scale index {shard}")


def _check_bounds(index: ShardIndex) -> None:
    """Refuse rows that point outside the shard, even with a valid checksum."""
    items, samples, header = index.items, index.samples, index.header

    def inside(offset: np.ndarray, size: np.ndarray, limit: int) -> bool:
        # Compare before adding: the sum of two unsigned numbers could wrap around.
        start = offset <= np.uint64(limit)
        return bool(np.all(start & (size <= np.uint64(limit) - np.where(start, offset, 0))))

    whole = (
        inside(items["offset"], items["size"], header.shard_size)
        and inside(samples["image"], samples["image_size"], header.shard_size)
        and inside(samples["key"], samples["key_size"], header.key_bytes)
        and bool(np.all(items["sample"] < header.samples))
        and bool(np.all(index.quarantined["sample"] < header.samples))
        and bool(np.all(index.quarantined["reason"] < len(REASONS)))
        and bool(np.all(items["size"] <= CAPTION_LIMIT))
        and bool(np.all(samples["image_size"] <= MEMBER_LIMIT))
    )
    if not whole:
        raise _damaged(index.shard)
