"""The index beside a shard: where every item is, and the checksum of its bytes.

``X.tar.idx`` is a fixed header and four arrays that are memory-mapped as they are:

    header   magic, version, shard size and modification time, counts, SHA-256, checksums
    items    one row per caption or sentence (``ITEM``), in shard order
    samples  one row per sample (``SAMPLE``), in shard order
    aside    one row per line or sample that cannot be used (``ASIDE``): the quarantine list
    keys     the sample keys, one after the other, UTF-8

An item is one non-blank line of a ``.txt`` member, without the blanks around it. What is set aside
has no item, so training never sees it; the list is part of the data's fingerprint. A fault of the
archive itself (a header, the end marker, a torn sample) is no matter of one sample: the shard is
refused, because nobody can say what is missing from it. The index belongs
to one state of the shard: its size, modification time and SHA-256 are recorded, a change is
noticed, and the index is built again.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from dalr_scale.data.images import check_image
from dalr_scale.data.shards import (
    IMAGE_EXTENSIONS,
    Member,
    open_regular,
    read_exactly,
    split_name,
    walk_tar,
)
from dalr_scale.errors import UserError
from dalr_scale.runstate import process_name

MEMBER_LIMIT = 64 * 1024 * 1024  # bytes of one picture or text member
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

ASIDE = np.dtype([("sample", "<u4"), ("line", "<u4"), ("reason", "<u4")])
REASONS = (
    "has no caption",
    "is not UTF-8",
    "has two members of one kind",
    "has several pictures",
    "has an empty or huge picture",
    "has a huge text",
    "has a picture that cannot be decoded",
)
NO_CAPTION = 0  # an incomplete pair rather than a damaged one
WHOLE = 0xFFFFFFFF  # in place of a line: the sample with all its lines

_MAGIC = b"DALRIDX\x02"
_HEADER = struct.Struct("<8sQqQQQQQI32sII")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexHeader:
    """Counts and identity of an indexed shard; sizes in bytes, time in nanoseconds.

    ``aside`` counts the quarantine list; ``deep`` says that every picture was decoded for it.
    """

    shard_size: int
    mtime_ns: int
    items: int
    samples: int
    images: int
    key_bytes: int
    sha256: str
    body_crc32: int
    aside: int = 0
    deep: bool = False

    def pack(self) -> bytes:
        """Return the header as it stands in the file, its own checksum last."""
        body = _HEADER.pack(
            _MAGIC,
            self.shard_size,
            self.mtime_ns,
            self.items,
            self.samples,
            self.images,
            self.key_bytes,
            self.aside,
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
        magic, size, mtime, items, samples, images, keys, aside, deep, sha, body_crc, crc = (
            _HEADER.unpack(data)
        )
        if magic != _MAGIC or crc != zlib.crc32(data[:-4]):
            return None
        return cls(
            size, mtime, items, samples, images, keys, sha.hex(), body_crc, aside, bool(deep)
        )

    @property
    def file_size(self) -> int:
        """Bytes that the whole index file must have."""
        arrays = self.items * ITEM.itemsize + self.samples * SAMPLE.itemsize
        arrays += self.aside * ASIDE.itemsize
        return _HEADER.size + arrays + self.key_bytes


@dataclass(frozen=True)
class ShardIndex:
    """The arrays of one index: ``items`` (dtype ITEM), ``samples`` (SAMPLE), ``aside`` (ASIDE)
    and the keys."""

    shard: Path
    header: IndexHeader
    items: np.ndarray
    samples: np.ndarray
    aside: np.ndarray
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
        for sample, line, reason in self.aside.tolist():
            if incomplete or reason != NO_CAPTION:
                where = "" if line == WHOLE else f"line {line + 1} of "
                what = f"{where}sample {self.key(sample)!r}"
                found.append(f"{self.shard}: {what} {REASONS[reason]}")
        return found


@dataclass(frozen=True)
class IndexFile:
    """An index whose header has been read and whose arrays are loaded on demand.

    ``blob`` holds the whole index in memory where the shard's folder cannot be written to.
    """

    shard: Path
    header: IndexHeader
    blob: bytes | None = None

    def load(self) -> ShardIndex:
        """Map the arrays and check them: size, checksum, and every offset against the shard.

        Raises:
            UserError: the index is damaged.
        """
        data = self.blob if self.blob is not None else _map(index_path(self.shard))
        view = memoryview(data)
        header = self.header
        if len(view) != header.file_size or view[: _HEADER.size] != header.pack():
            raise _damaged(self.shard)
        if zlib.crc32(view[_HEADER.size :]) != header.body_crc32:
            raise _damaged(self.shard)
        items = np.frombuffer(view, ITEM, header.items, _HEADER.size)
        at = _HEADER.size + items.nbytes
        samples = np.frombuffer(view, SAMPLE, header.samples, at)
        at += samples.nbytes
        aside = np.frombuffer(view, ASIDE, header.aside, at)
        index = ShardIndex(self.shard, header, items, samples, aside, view[at + aside.nbytes :])
        _check_bounds(index)
        return index


def index_path(shard: Path) -> Path:
    """Return where the index of a shard lies: ``X.tar`` -> ``X.tar.idx``."""
    return shard.with_name(shard.name + ".idx")


def current_index(shard: Path) -> IndexFile | None:
    """Return the index beside the shard if it is there, whole, and of this state of the shard."""
    path = f"{shard}.idx"  # thousands of shards pass here: strings are faster than paths
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
    status = _status(shard)
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


def ensure_index(shard: Path, *, deep: bool = False) -> IndexFile:
    """Return the index of a shard; build and write it when it is missing, damaged or stale.

    With ``deep`` every picture is decoded, and those that cannot be are set aside.

    Several processes may do this at once: each writes its own temporary file and renames it. In a
    folder that cannot be written to, the index stays in memory.

    Raises:
        UserError: the shard is not a valid WebDataset tar of samples, or holds none.
    """
    found = current_index(shard)
    if found is not None and found.header.deep >= deep:
        return found
    if found is None and index_path(shard).exists():
        _log.warning("%s: the index is damaged or older than the shard; building it again", shard)
    header, blob = build_index(shard, deep=deep)
    if header.aside:
        _log.warning("%s: %d lines or samples are set aside", shard, header.aside)
    try:
        write_index(shard, blob)
    except OSError as error:
        _log.warning("%s: the index is kept in memory only (%s)", shard, error.strerror)
        return IndexFile(shard, header, blob)
    return IndexFile(shard, header)


def write_index(shard: Path, blob: bytes) -> None:
    """Write an index beside its shard, by temporary file and rename."""
    path = index_path(shard)
    temporary = path.with_name(f"{path.name}.tmp-{process_name()}")
    try:
        temporary.write_bytes(blob)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_index(shard: Path, *, deep: bool = False) -> tuple[IndexHeader, bytes]:
    """Read a shard from end to end and return the header and the bytes of its index.

    Args:
        shard: the shard.
        deep: decode every picture too.

    Raises:
        UserError: the tar is irregular (see ``walk_tar``), a sample is torn apart, no sample can
            be used, or the shard changed while it was read.
    """
    before = _status(shard)
    rows = _Rows()
    descriptor = open_regular(shard)
    try:
        for key, members in _grouped(shard):
            rows.add(descriptor, key, members, deep)
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(descriptor)
    if not rows.items:
        raise UserError(
            f"{shard}: no usable sample; a sample needs a .txt member with one caption per line"
            + rows.first_fault()
        )
    after = _status(shard)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{shard}: changed while it was indexed; wait until it has been written")
    body = rows.pack()
    header = IndexHeader(
        shard_size=after.st_size,
        mtime_ns=after.st_mtime_ns,
        items=len(rows.items),
        samples=len(rows.samples),
        images=sum(row[4] > 0 for row in rows.samples),
        key_bytes=len(rows.keys),
        sha256=sha256,
        body_crc32=zlib.crc32(body),
        aside=len(rows.aside),
        deep=deep,
    )
    return header, header.pack() + body


class _SetAside(Exception):
    """A sample cannot be used; the argument is the number of its reason."""


@dataclass
class _Rows:
    """The tables of an index while they are being filled."""

    items: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    samples: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    aside: list[tuple[int, int, int]] = field(default_factory=list)
    keys: bytearray = field(default_factory=bytearray)

    def add(self, descriptor: int, key: str, members: list[Member], deep: bool) -> None:
        """Append one sample with its items; or without, when it has to be set aside."""
        number, first = len(self.samples), len(self.items)
        image = 0, 0, 0
        try:
            by_extension = _by_extension(members)
            image = _image_row(descriptor, by_extension, deep)
            if "txt" in by_extension:
                self._add_lines(descriptor, by_extension["txt"], number)
            if len(self.items) == first and not any(row[0] == number for row in self.aside[-1:]):
                raise _SetAside(NO_CAPTION)
        except _SetAside as fault:
            self.aside.append((number, WHOLE, fault.args[0]))
        raw_key = key.encode("utf-8")
        self.samples.append((len(self.keys), len(raw_key), image[2], image[0], image[1], first))
        self.keys += raw_key

    def _add_lines(self, descriptor: int, member: Member, sample: int) -> None:
        """Append a row for each line that is not blank."""
        if member.size > MEMBER_LIMIT:
            raise _SetAside(5)
        start = member.offset
        lines = read_exactly(descriptor, member.size, start).split(b"\n")
        for number, line in enumerate(lines):
            text = line.strip()
            if text:
                try:
                    text = _cut(text)
                except UnicodeDecodeError:
                    self.aside.append((sample, number, 1))
                else:
                    offset = start + len(line) - len(line.lstrip())
                    self.items.append((offset, len(text), zlib.crc32(text), sample, number))
            start += len(line) + 1

    def first_fault(self) -> str:
        if not self.aside:
            return ""
        sample, line, reason = self.aside[0]
        start, size = self.samples[sample][:2]
        key = self.keys[start : start + size].decode()
        where = "" if line == WHOLE else f"line {line + 1} of "
        return f" ({where}sample {key!r} {REASONS[reason]})"

    def pack(self) -> bytes:
        return b"".join(
            (
                np.array(self.items, ITEM).tobytes(),
                np.array(self.samples, SAMPLE).tobytes(),
                np.array(self.aside, ASIDE).tobytes(),
                bytes(self.keys),
            )
        )


def check_shard(shard: Path) -> list[str]:
    """Compare a shard with the index beside it, byte by byte, and return what does not agree.

    Nothing is written. A changed modification time alone is no fault.
    """
    path = index_path(shard)
    if not path.is_file():
        return [f"{path}: missing; run dalr-scale index {shard}"]
    old = read_header(path)
    if old is None:
        return [f"{path}: damaged or of another version; run dalr-scale index {shard}"]
    try:
        arrays = IndexFile(shard, old).load()
        faults = [f"{shard}: {text}" for text in _crc_faults(arrays)]
        new, _ = build_index(shard, deep=old.deep)
    except UserError as error:
        return [str(error)]
    if replace(new, mtime_ns=0) != replace(old, mtime_ns=0) and not faults:
        faults.append(f"{shard}: differs from what was indexed; copy or index it again")
    return faults


def _crc_faults(index: ShardIndex) -> Iterator[str]:
    """Name every caption and picture whose bytes have another checksum than the index says."""
    descriptor = open_regular(index.shard)
    try:
        for offset, size, crc, sample, line in index.items.tolist():
            if zlib.crc32(read_exactly(descriptor, size, offset)) != crc:
                yield f"line {line + 1} of sample {index.key(sample)!r} has changed"
        for number, row in enumerate(index.samples):
            data = read_exactly(descriptor, int(row["image_size"]), int(row["image"]))
            if zlib.crc32(data) != int(row["image_crc32"]):
                yield f"the picture of sample {index.key(number)!r} has changed"
    finally:
        os.close(descriptor)


def _grouped(shard: Path) -> Iterator[tuple[str, list[Member]]]:
    """Group the members into samples; the members of a sample stand together."""
    seen: set[str] = set()
    for key, group in groupby(walk_tar(shard), key=lambda member: split_name(member.name)[0]):
        if key in seen:
            raise UserError(
                f"{shard}: the members of sample {key!r} do not stand together; "
                "write the shard again with its names sorted"
            )
        seen.add(key)
        yield key, list(group)


def _by_extension(members: list[Member]) -> dict[str, Member]:
    found = {split_name(member.name)[1]: member for member in members}
    if len(found) < len(members):
        raise _SetAside(2)
    return found


def _image_row(descriptor: int, members: dict[str, Member], deep: bool) -> tuple[int, int, int]:
    """Return (offset, size, crc32) of the sample's picture, zeros where it has none."""
    pictures = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    if not pictures:
        return 0, 0, 0
    if len(pictures) > 1:
        raise _SetAside(3)
    picture = pictures[0]
    if not 0 < picture.size <= MEMBER_LIMIT:
        raise _SetAside(4)
    data = read_exactly(descriptor, picture.size, picture.offset)
    if deep:
        try:
            check_image(data)
        except ValueError as error:
            raise _SetAside(6) from error
    return picture.offset, picture.size, zlib.crc32(data)


def _cut(text: bytes) -> bytes:
    """Check that a line is UTF-8 and cut a huge one to CAPTION_LIMIT bytes of whole characters."""
    if len(text) <= CAPTION_LIMIT:
        text.decode("utf-8")
        return text
    return text[:CAPTION_LIMIT].decode("utf-8", "ignore").encode("utf-8")


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _map(path: Path) -> mmap.mmap:
    descriptor = open_regular(path)
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file cannot be mapped
        raise UserError(f"{path}: is empty; remove it and run dalr-scale index") from error
    finally:
        os.close(descriptor)


def _damaged(shard: Path) -> UserError:
    path = index_path(shard)
    return UserError(f"{path}: is damaged; remove it and run dalr-scale index {shard}")


def _check_bounds(index: ShardIndex) -> None:
    """Refuse rows that point outside the shard, whatever their checksum says."""
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
        and bool(np.all(index.aside["sample"] < header.samples))
        and bool(np.all(index.aside["reason"] < len(REASONS)))
        and bool(np.all(items["size"] <= CAPTION_LIMIT))
        and bool(np.all(samples["image_size"] <= MEMBER_LIMIT))
    )
    if not whole:
        raise _damaged(index.shard)
