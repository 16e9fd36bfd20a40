"""The manifest of a checkpoint: its files with size and digest.

    manifest.json      step, run state, fingerprint, and path, size and SHA-256 of every file
    manifest.sha256    guards the manifest itself; `sha256sum -c manifest.sha256` works

Everything read here may come from a damaged disk or an untrusted source. Without a key a manifest
proves integrity, not authorship: loading with `weights_only=True` remains the safety net.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypedDict

from dalr_scale.run.files import JsonTable, JsonValue, fsync_directory
from dalr_scale.run.state import RunState

if TYPE_CHECKING:
    from dalr_scale.run.ranks import Ranks

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"
MAX_MANIFEST_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint; `path` is relative to its directory, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    world_size: int
    state: RunState
    fingerprint: JsonTable
    files: tuple[FileEntry, ...]
    saved_at: str
    schema: int = SCHEMA


# Writing


def list_files(directory: Path) -> list[str]:
    """Relative names of all files below `directory`, sorted; the two manifest files left out.

    Raises:
        ValueError: for a link, device or socket, and for names that JSON cannot hold.
    """
    names: list[str] = []
    for parent, directories, files in os.walk(directory):
        for name in directories + files:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(directory).as_posix()
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{relative} is a link or a special file")
            relative.encode()  # UnicodeEncodeError is a ValueError
            if stat.S_ISREG(mode):
                names.append(relative)
    return sorted(set(names) - {MANIFEST, MANIFEST_SUM})


def hash_and_sync(directory: Path, name: str) -> FileEntry:
    """Size and SHA-256 of a file that is on the disk when this returns."""
    with (directory / name).open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name, os.fstat(file.fileno()).st_size, digest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest with its own digest, durably."""
    plain = {
        "schema": manifest.schema,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "saved_at": manifest.saved_at,
        "state": manifest.state.to_json(),
        "fingerprint": manifest.fingerprint,
        "files": [vars(entry) for entry in manifest.files],
    }
    data = (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()
    for name, content in ((MANIFEST, data), (MANIFEST_SUM, _sum_line(data))):
        with (directory / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for parent, _, _ in os.walk(directory):
        fsync_directory(Path(parent))


def _sum_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


# Verifying


def verify(directory: Path, ranks: Ranks) -> tuple[Manifest | None, list[str]]:
    """Check one checkpoint on all ranks, each its share of the bytes.

    Returns:
        The manifest (None if it cannot be read) and the problems found, the same on every rank.
        Each problem names the file, what was expected and what is there.
    """
    manifest: Manifest | str = ""
    if ranks.rank == 0:
        try:
            manifest = read_manifest(directory)
        except (OSError, ValueError, RecursionError) as error:
            manifest = f"{MANIFEST}: {error}"
    manifest = ranks.broadcast_object(manifest)
    if isinstance(manifest, str):
        return None, [manifest]
    share = manifest.files[ranks.rank :: ranks.size]
    problems = [problem for entry in share if (problem := check_file(directory, entry))]
    if ranks.rank == 0:
        problems += _unlisted(directory, manifest)
    parts = ranks.gather_objects(problems) or []
    return manifest, ranks.broadcast_object([problem for part in parts for problem in part])


def read_manifest(directory: Path) -> Manifest:
    """Read and validate manifest.json.

    Raises:
        OSError, ValueError: if it is missing, changed or malformed; the message says what is wrong.
    """
    if directory.is_symlink():
        raise ValueError("the checkpoint is a symbolic link")
    data, line = _read_small(directory / MANIFEST), _read_small(directory / MANIFEST_SUM)
    if line != _sum_line(data):
        expected = line[:64].decode("ascii", "backslashreplace")
        actual = hashlib.sha256(data).hexdigest()
        raise ValueError(f"{MANIFEST_SUM} expects {expected}, sha256 of {MANIFEST} is {actual}")
    try:
        manifest = _parse(json.loads(data))
    except (KeyError, TypeError) as error:
        raise ValueError(f"malformed: {type(error).__name__} {error}") from None
    if len({entry.path for entry in manifest.files}) != len(manifest.files):
        raise ValueError("a file is listed twice")
    if manifest.step != manifest.state.step:
        raise ValueError(f"step {manifest.step}, but the state is of step {manifest.state.step}")
    return manifest


class _Plain(TypedDict):
    """manifest.json as JSON gives it back; only the digest of its bytes has been verified."""

    schema: int
    step: int
    world_size: int
    saved_at: str
    state: JsonTable
    fingerprint: JsonTable
    files: list[dict[str, JsonValue]]


def _parse(plain: _Plain) -> Manifest:
    if plain["schema"] != SCHEMA:
        raise ValueError(f"schema {plain['schema']!r}, this version reads {SCHEMA}")
    return Manifest(
        step=plain["step"],
        world_size=plain["world_size"],
        state=RunState.from_json(plain["state"]),
        fingerprint=dict(plain["fingerprint"]),
        files=tuple(_file_entry(f["path"], f["size"], f["sha256"]) for f in plain["files"]),
        saved_at=plain["saved_at"],
    )


def _file_entry(path: JsonValue, size: JsonValue, sha256: JsonValue) -> FileEntry:
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(sha256, str):
        raise ValueError(f"malformed entry {path!r}, size {size!r}, sha256 {sha256!r}")
    return FileEntry(path, size, sha256)


def _read_small(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path.name} is not a plain file of at most {MAX_MANIFEST_BYTES} B")
        return file.read()


def check_file(directory: Path, entry: FileEntry) -> str | None:
    """Compare one file with its entry; None if it is the same, otherwise the reason."""
    if reason := _refused_name(entry):
        return reason
    path = directory.joinpath(*PurePosixPath(entry.path).parts)
    try:
        for part in [path, *path.parents][: len(PurePosixPath(entry.path).parts)]:
            if part.is_symlink():
                return f"{entry.path}: symbolic link refused"
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{entry.path}: not a plain file"
        # A longer file is wrong whatever is in it, and might be endless.
        actual = "not computed"
        if status.st_size <= entry.size:
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{entry.path}: {error.strerror or error}, expected sha256 {entry.sha256}"
    if (status.st_size, actual) != (entry.size, entry.sha256):
        return (
            f"{entry.path}: expected {entry.size} bytes, sha256 {entry.sha256}; "
            f"found {status.st_size} bytes, sha256 {actual}"
        )
    return None


def _refused_name(entry: FileEntry) -> str | None:
    name = entry.path
    if not _DIGEST.fullmatch(entry.sha256):
        return f"{name}: malformed sha256 in the manifest"
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        return f"{name!r}: path refused, it must stay inside the checkpoint"
    return None


def _unlisted(directory: Path, manifest: Manifest) -> list[str]:
    # Loaders find shards by pattern, so a file added later could be read without a digest. Dot
    # files are allowed: file systems and desktops create them and no loader matches them.
    try:
        present = list_files(directory)
    except (OSError, ValueError) as error:
        return [str(error)]
    listed = {entry.path for entry in manifest.files}
    extra = [n for n in present if n not in listed and not PurePosixPath(n).name.startswith(".")]
    return [f"{name}: not in the manifest; move it elsewhere" for name in extra]
