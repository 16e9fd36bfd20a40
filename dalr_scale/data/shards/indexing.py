"""Builds and refreshes the indexes of shards; ``index_file`` describes their format."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dalr_scale.data.shards.files import (
    IMAGE_EXTENSIONS,
    Member,
    open_regular,
    read_exactly,
    split_name,
    walk_tar,
)
from dalr_scale.data.shards.images import check_image
from dalr_scale.data.shards.index_file import (
    CAPTION_LIMIT,
    ITEM,
    MEMBER_LIMIT,
    NO_CAPTION,
    QUARANTINE,
    REASONS,
    SAMPLE,
    WHOLE,
    IndexFile,
    IndexHeader,
    current_index,
    index_path,
    shard_status,
)
from dalr_scale.errors import UserError
from dalr_scale.run.files import process_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)


def ensure_index(shard: Path, *, deep: bool = False) -> IndexFile:
    """Return the index of a shard; build and write it when it is missing, damaged or stale.

    With ``deep`` every image is decoded, and those that cannot be decoded are quarantined.

    Several processes may do this at the same time: each writes its own temporary file and renames
    it. If the directory is not writable, the index stays in memory.

    Raises:
        UserError: the shard is not a valid WebDataset tar of samples, or holds none.
    """
    found = current_index(shard)
    if found is not None and found.header.deep >= deep:
        return found
    if found is None and index_path(shard).exists():
        log.warning("%s: the index is damaged or older than the shard; building it again", shard)
    header, blob = build_index(shard, deep=deep)
    if header.quarantined:
        log.warning("%s: %d lines or samples are quarantined", shard, header.quarantined)
    try:
        write_index(shard, blob)
    except OSError as error:
        log.warning("%s: the index is kept in memory only (%s)", shard, error.strerror)
        return IndexFile(shard, header, blob)
    return IndexFile(shard, header)


def write_index(shard: Path, blob: bytes) -> None:
    """Write an index next to its shard, by temporary file and rename."""
    path = index_path(shard)
    temporary = path.with_name(f"{path.name}.tmp-{process_name()}")
    try:
        temporary.write_bytes(blob)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def build_index(shard: Path, *, deep: bool = False) -> tuple[IndexHeader, bytes]:
    """Read a shard from end to end and return the header and the bytes of its index.

    Args:
        shard: the shard.
        deep: decode every image too.

    Raises:
        UserError: the tar is irregular (see ``walk_tar``), the members of a sample are not
            adjacent, no sample can be used, or the shard changed while it was read.
    """
    before = shard_status(shard)
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
    after = shard_status(shard)
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
        quarantined=len(rows.quarantined),
        deep=deep,
    )
    return header, header.pack() + body


class _Quarantined(Exception):
    """A sample cannot be used; the argument is the number of its reason."""


@dataclass
class _Rows:
    """The tables of an index while they are being filled."""

    items: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    samples: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    quarantined: list[tuple[int, int, int]] = field(default_factory=list)
    keys: bytearray = field(default_factory=bytearray)

    def add(self, descriptor: int, key: str, members: list[Member], deep: bool) -> None:
        """Append one sample with its items; without items if it has to be quarantined."""
        number, first = len(self.samples), len(self.items)
        image = 0, 0, 0
        try:
            by_extension = _by_extension(members)
            image = _image_row(descriptor, by_extension, deep)
            if "txt" in by_extension:
                self._add_lines(descriptor, by_extension["txt"], number)
            if len(self.items) == first and not any(
                row[0] == number for row in self.quarantined[-1:]
            ):
                raise _Quarantined(NO_CAPTION)
        except _Quarantined as fault:
            self.quarantined.append((number, WHOLE, fault.args[0]))
        raw_key = key.encode("utf-8")
        self.samples.append((len(self.keys), len(raw_key), image[2], image[0], image[1], first))
        self.keys += raw_key

    def _add_lines(self, descriptor: int, member: Member, sample: int) -> None:
        """Append a row for each line that is not blank."""
        if member.size > MEMBER_LIMIT:
            raise _Quarantined(5)
        start = member.offset
        lines = read_exactly(descriptor, member.size, start).split(b"\n")
        for number, line in enumerate(lines):
            text = line.strip()
            if text:
                try:
                    text = _cut(text)
                except UnicodeDecodeError:
                    self.quarantined.append((sample, number, 1))
                else:
                    offset = start + len(line) - len(line.lstrip())
                    self.items.append((offset, len(text), zlib.crc32(text), sample, number))
            start += len(line) + 1

    def first_fault(self) -> str:
        if not self.quarantined:
            return ""
        sample, line, reason = self.quarantined[0]
        start, size = self.samples[sample][:2]
        key = self.keys[start : start + size].decode()
        where = "" if line == WHOLE else f"line {line + 1} of "
        return f" ({where}sample {key!r} {REASONS[reason]})"

    def pack(self) -> bytes:
        return b"".join(
            (
                np.array(self.items, ITEM).tobytes(),
                np.array(self.samples, SAMPLE).tobytes(),
                np.array(self.quarantined, QUARANTINE).tobytes(),
                bytes(self.keys),
            )
        )


def _grouped(shard: Path) -> Iterator[tuple[str, list[Member]]]:
    """Group the members into samples; the members of a sample are adjacent."""
    seen: set[str] = set()
    for key, group in groupby(walk_tar(shard), key=lambda member: split_name(member.name)[0]):
        if key in seen:
            raise UserError(
                f"{shard}: the members of sample {key!r} are not adjacent; "
                "write the shard again with its names sorted"
            )
        seen.add(key)
        yield key, list(group)


def _by_extension(members: list[Member]) -> dict[str, Member]:
    found = {split_name(member.name)[1]: member for member in members}
    if len(found) < len(members):
        raise _Quarantined(2)
    return found


def _image_row(descriptor: int, members: dict[str, Member], deep: bool) -> tuple[int, int, int]:
    """Return (offset, size, crc32) of the sample's image, zeros where it has none."""
    images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    if not images:
        return 0, 0, 0
    if len(images) > 1:
        raise _Quarantined(3)
    image = images[0]
    if not 0 < image.size <= MEMBER_LIMIT:
        raise _Quarantined(4)
    data = read_exactly(descriptor, image.size, image.offset)
    if deep:
        try:
            check_image(data)
        except ValueError as error:
            raise _Quarantined(6) from error
    return image.offset, image.size, zlib.crc32(data)


def _cut(text: bytes) -> bytes:
    """Check that a line is UTF-8, and cut it to at most CAPTION_LIMIT bytes of whole characters."""
    if len(text) <= CAPTION_LIMIT:
        text.decode("utf-8")
        return text
    return text[:CAPTION_LIMIT].decode("utf-8", "ignore").encode("utf-8")
