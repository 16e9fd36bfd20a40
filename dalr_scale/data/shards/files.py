"""Shard lists and the only tar reader of the project.

A shard is a plain, uncompressed WebDataset tar. The standard library's ``tarfile`` is not used for
reading: crafted sizes send it into endless loops (https://github.com/python/cpython/issues/130577),
and streaming readers silently skip what follows a corrupt header. The walk below reads one
512-byte header at a time with ``os.pread``, checks every bound before it moves on, and accepts only
archives that end with the end-of-archive marker.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SHARD_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "txt", "json", "npy"))
FEATURE_SUFFIX = ".features.tar"
TOKENS_SUFFIX = ".tokens.tar"
COMPANION_SUFFIXES = (FEATURE_SUFFIX, TOKENS_SUFFIX)  # tars that are not shards but belong to one

_ZERO_BLOCK = bytes(BLOCK)
_LONG_NAME_LIMIT = 4096  # bytes of a GNU long name
_PAX_LIMIT = 64 * 1024  # bytes of one PAX header
_PADDING_LIMIT = 16 * 1024 * 1024  # zeros after the end marker; tar pads to 10 KiB by default
_BRACE_LIMIT = 1_000_000
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """One regular file of a tar: its name, and offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


class _Irregular(Exception):
    """A fault of the archive; the walk adds file and position to the message."""


class _Entry(NamedTuple):
    kind: bytes
    name: bytes
    size: int


def split_name(name: str) -> tuple[str, str]:
    """Split a member name into sample key and lower-case extension, at the first dot of the base.

    This is WebDataset's rule, so that both readers group members into the same samples:
    ``a/b.left.jpg`` is key ``a/b`` with extension ``left.jpg``.
    """
    directory, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return directory + slash + stem, extension.lower()


def companion(shard: Path | str, ending: str) -> str:
    """Return the name of a file that belongs to a shard: ``X.tar`` -> ``X`` + ending."""
    return os.path.splitext(shard)[0] + ending


def sample_key(name: str) -> str:
    """Return the sample key of an image file: its name without suffix, other dots as underscores.

    WebDataset ends a key at the first dot, and a name in a tar must be printable.
    """
    stem, dot, suffix = name.rpartition(".")
    plain = stem if dot and "/" not in suffix else name
    return "".join(c if c.isprintable() and c not in ".\\" else "_" for c in plain)


def open_regular(path: Path | str) -> int:
    """Open a regular file for reading and return its descriptor; pipes and devices are refused."""
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for a writer indefinitely.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is not a regular file; name a file")
    return descriptor


def read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes at ``offset``; fewer only when the file ends before them."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]  # pread returns at most 2 GiB at once, and less on some network file systems
    have = len(data)
    while have < size:
        data = os.pread(descriptor, size - have, offset + have)
        if not data:
            break
        parts.append(data)
        have += len(data)
    return b"".join(parts)


def walk_tar(
    path: Path, *, extensions: frozenset[str] | None = SHARD_EXTENSIONS
) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar in archive order, checking every header.

    Directories are skipped (``tar -cf x.tar directory`` writes them). A leading ``./`` is dropped
    from names.

    Args:
        path: the archive.
        extensions: allowed extensions as ``split_name`` gives them; None allows all.

    Raises:
        UserError: a wrong checksum, a size that is negative or reaches past the file, a link, a
            device or an unknown type, a missing end-of-archive marker, anything but zeros after
            it, a duplicate, absolute, ``..`` or non-UTF-8 name, a foreign extension, a compressed
            or empty file. The message names file and byte position.
    """
    descriptor = open_regular(path)
    try:
        yield from walk_descriptor(descriptor, path, extensions)
    finally:
        os.close(descriptor)


def walk_descriptor(
    descriptor: int, path: Path, extensions: frozenset[str] | None
) -> Iterator[Member]:
    """``walk_tar`` of an open file."""
    file_size = os.fstat(descriptor).st_size
    _refuse_foreign_formats(descriptor, path)
    seen: set[str] = set()
    position = 0
    override: dict[bytes, bytes] = {}
    try:
        while True:
            header = read_exactly(descriptor, BLOCK, position)
            if len(header) < BLOCK:
                raise _Irregular("ends without the end-of-archive marker, so it has been truncated")
            if header == _ZERO_BLOCK:
                _check_padding(descriptor, position, file_size)
                return
            entry = _apply_override(_parse_header(header), override)
            start = position + BLOCK
            if entry.size > file_size - start:
                raise _Irregular(f"a member of {entry.size} bytes reaches past the end of the file")
            if entry.kind in b"xgL":
                if override and entry.kind != b"g":
                    raise _Irregular("two extended headers in a row")
                override |= _read_extension(descriptor, entry, start)
            else:
                override = {}
                member = _regular_member(entry, start, seen, extensions)
                if member is not None:
                    yield member
            position = start + -(-entry.size // BLOCK) * BLOCK
    except _Irregular as error:
        raise UserError(
            f"{path}: {error} (byte {position}); copy or write this file again"
        ) from None


def _refuse_foreign_formats(descriptor: int, path: Path) -> None:
    start = read_exactly(descriptor, 6, 0)
    if not start:
        raise UserError(f"{path}: is empty; copy or write this file again")
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{path}: is {name}-compressed; shards are plain tars, unpack it first")


def _check_padding(descriptor: int, position: int, file_size: int) -> None:
    """Require a second zero block and nothing but zeros up to the end of the file."""
    rest = file_size - position
    if rest < 2 * BLOCK:
        raise _Irregular("ends inside the end-of-archive marker, so it has been truncated")
    if rest > _PADDING_LIMIT:
        raise _Irregular(f"has {rest} bytes after the end-of-archive marker")
    if read_exactly(descriptor, rest, position).count(0) != rest:
        raise _Irregular("has data after the end-of-archive marker, or a zeroed block in it")


def _parse_header(header: bytes) -> _Entry:
    if header[257:262] != b"ustar":
        raise _Irregular("has no ustar header")
    # The checksum field itself counts as eight spaces.
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    if _number(header[148:156], "checksum") != checksum:
        raise _Irregular("has a header with a wrong checksum")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU headers keep other fields where POSIX has the prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _Entry(header[156:157], name, _number(header[124:136], "size"))


def _number(field: bytes, what: str) -> int:
    """Decode a numeric field: octal digits, or GNU's base 256 marked by the first byte."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise _Irregular(f"has a header whose {what} is not a non-negative number")
    return int(digits, 8)


def _read_extension(descriptor: int, entry: _Entry, start: int) -> dict[bytes, bytes]:
    """Return path and size of the next member from a GNU long name or PAX header."""
    limit = _LONG_NAME_LIMIT if entry.kind == b"L" else _PAX_LIMIT
    if entry.size > limit:
        raise _Irregular(f"has an extended header of {entry.size} bytes (at most {limit})")
    data = read_exactly(descriptor, entry.size, start)
    if entry.kind == b"L":
        return {b"path": data.split(b"\0", 1)[0]}
    fields = _parse_pax(data)
    if any(key.startswith(b"GNU.sparse") for key in fields):
        raise _Irregular("has a sparse member")
    if entry.kind == b"g":  # comments of `git archive` and the like; nothing in it names a member
        return {}
    return {key: fields[key] for key in (b"path", b"size") if key in fields}


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    r"""Parse ``LENGTH key=value\n`` records in one pass."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 8)
        if space < 0 or not data[at:space].isdigit():
            raise _Irregular("has a malformed PAX header")
        end = at + int(data[at:space])
        if not space + 1 < end <= len(data) or data[end - 1] != 0x0A:
            raise _Irregular("has a malformed PAX header")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        fields[key] = value
        at = end
    return fields


def _apply_override(entry: _Entry, override: dict[bytes, bytes]) -> _Entry:
    if entry.kind in b"xgL":
        return entry
    if b"path" in override:
        entry = entry._replace(name=override[b"path"])
    if b"size" in override:
        digits = override[b"size"]
        if not digits.isdigit() or len(digits) > 20:
            raise _Irregular("has a PAX size that is not a non-negative number")
        entry = entry._replace(size=int(digits))
    return entry


def _regular_member(
    entry: _Entry, start: int, seen: set[str], extensions: frozenset[str] | None
) -> Member | None:
    """Return the member, or None for a directory; refuse every other type and every bad name."""
    name = _checked_name(entry.name)
    if entry.kind == b"5" and entry.size == 0:
        return None
    if entry.kind not in (b"0", b"\0") or name.endswith("/"):
        raise _Irregular(f"has a member {name!r} that is not a regular file")
    if name in seen:
        raise _Irregular(f"has the member {name!r} twice")
    seen.add(name)
    if extensions is not None and split_name(name)[1] not in extensions:
        allowed = ", ".join(sorted(extensions))
        raise _Irregular(f"has a member {name!r}; allowed extensions are {allowed}")
    return Member(name, start, entry.size)


def _checked_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Irregular(f"has a member name that is not UTF-8, {raw[:80]!r}") from None
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or not name.isprintable():
        raise _Irregular(f"has an unsafe member name, {name[:80]!r}")
    name = name.removeprefix("./")
    if not name and raw != b"./":
        raise _Irregular("has a member without a name")
    return name


def expand_shards(patterns: Sequence[str], root: Path | None = None) -> list[Path]:
    """Expand files, directories, globs and brace ranges to a sorted list of shard files.

    ``data/pairs-{000000..000006}.tar``, ``data/*.tar`` and ``data`` are all understood. What
    lies beside a shard (``*.features.tar``, ``*.tokens.tar``) is left out of directories and globs.

    Args:
        patterns: what to expand.
        root: directory that relative patterns start from; the working directory if None.

    Raises:
        UserError: a pattern matches nothing, names a missing file, or is a URL or a command.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = [path for text in expand_braces(pattern) for path in _match(text, root)]
        if not matches:
            raise UserError(f"no shard matches {pattern!r}; check the path (root: {root or '.'})")
        found.update(matches)
    if not found:
        raise UserError("no shards were named; give at least one file, directory or pattern")
    return [Path(path) for path in sorted(found)]


def _match(text: str, root: Path | None) -> list[str]:
    """Return strings, because paths are slow for thousands of shards."""
    # Streaming readers run commands and open URLs given as file names; this list takes files only.
    if text == "-" or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        raise UserError(f"{text!r} is a URL or a command; name a file")
    path = str((root or Path()) / text)  # a//b and a/./b become a/b
    if os.path.isdir(path):
        candidates = glob.glob(os.path.join(glob.escape(path), "*.tar"))
    elif glob.has_magic(text):
        candidates = glob.glob(path)
    elif os.path.exists(path):
        candidates = [path]
    else:
        raise UserError(f"{path}: no such file; check the path")
    return [c for c in candidates if not c.endswith(COMPANION_SUFFIXES) and os.path.isfile(c)]


def expand_braces(pattern: str) -> list[str]:
    """Expand the innermost brace first: ``{a,b}`` lists and ``{000..010}`` ranges."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _BRACE_LIMIT:
            raise UserError(f"{pattern!r}: the range {found[0]} is empty or too long")
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [text for choice in choices for text in expand_braces(head + choice + tail)]


def shard_names(shards: Sequence[Path]) -> list[str]:
    """Return file names; equal ones with their directory, and numbered if still equal."""
    names = _where_equal([s.name for s in shards], [f"{s.parent.name}/{s.name}" for s in shards])
    return _where_equal(names, [f"{name} ({k})" for k, name in enumerate(names)])


def _where_equal(names: list[str], longer: list[str]) -> list[str]:
    count = Counter(names)
    return [more if count[name] > 1 else name for name, more in zip(names, longer, strict=True)]
