"""The manifest of a checkpoint: what belongs to it, byte for byte.

    manifest.json      step, run state, fingerprint, and path, size and SHA-256 of every file
    manifest.sha256    guards the manifest itself; `sha256sum -c manifest.sha256` works

Everything read here may come from a damaged disk or from a stranger. Without a key a manifest
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
from typing import Any

from dalr_scale.run.state import RunState, World, fsync_folder

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"
MAX_MANIFEST_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint; `path` is relative to its folder, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    world_size: int
    state: RunState
    fingerprint: dict[str, Any]
    files: tuple[FileEntry, ...]
    saved_at: str
    schema: int = SCHEMA


# Writing


def list_files(folder: Path) -> list[str]:
    """Relative names of all files below `folder`, sorted; the two manifest files left out.

    Raises:
        ValueError: for a link, device or socket, and for names that JSON cannot hold.
    """
    names = []
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(folder).as_posix()
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{relative} is a link or a special file")
            relative.encode()  # UnicodeEncodeError is a ValueError
            if stat.S_ISREG(mode):
                names.append(relative)
    return sorted(set(names) - {MANIFEST, MANIFEST_SUM})


def hash_and_sync(folder: Path, name: str) -> FileEntry:
    with open(folder / name, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name, os.fstat(file.fileno()).st_size, digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
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
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        fsync_folder(Path(parent))


def _sum_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


# Verifying


def verify(folder: Path, world: World) -> tuple[Manifest | None, list[str]]:
    """Check one checkpoint on all ranks, each its share of the bytes.

    Returns:
        The manifest (None if it cannot be read) and the problems found, the same on every rank.
        Each problem names the file, what was expected and what is there.
    """
    manifest: Manifest | str = ""
    if world.rank == 0:
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError, RecursionError) as error:
            manifest = f"{MANIFEST}: {error}"
    manifest = world.broadcast_object(manifest)
    if isinstance(manifest, str):
        return None, [manifest]
    share = manifest.files[world.rank :: world.size]
    problems = [problem for entry in share if (problem := check_file(folder, entry))]
    if world.rank == 0:
        problems += _unlisted(folder, manifest)
    parts = world.gather_objects(problems) or []
    return manifest, world.broadcast_object([problem for part in parts for problem in part])


def read_manifest(folder: Path) -> Manifest:
    """Read and validate manifest.json.

    Raises:
        OSError, ValueError: if it is missing, changed or malformed; the message says what is wrong.
    """
    if folder.is_symlink():
        raise ValueError("the checkpoint is a symbolic link")
    data, line = _read_small(folder / MANIFEST), _read_small(folder / MANIFEST_SUM)
    if line != _sum_line(data):
        expected = line[:64].decode("ascii", "backslashreplace")
        actual = hashlib.sha256(data).hexdigest()
        raise ValueError(f"{MANIFEST_SUM} expects {expected}, sha256 of {MANIFEST} is {actual}")
    plain = json.loads(data)
    try:
        if plain["schema"] != SCHEMA:
            raise ValueError(f"schema {plain['schema']!r}, this version reads {SCHEMA}")
        files = tuple(FileEntry(f["path"], f["size"], f["sha256"]) for f in plain["files"])
        state = RunState.from_json(plain["state"])
        manifest = Manifest(
            plain["step"],
            plain["world_size"],
            state,
            dict(plain["fingerprint"]),
            files,
            plain["saved_at"],
        )
        twice = len({entry.path for entry in files}) != len(files)
    except (KeyError, TypeError) as error:
        raise ValueError(f"malformed: {type(error).__name__} {error}") from None
    if twice:
        raise ValueError("a file is listed twice")
    if manifest.step != state.step:
        raise ValueError(f"step {manifest.step}, but the state is of step {state.step}")
    return manifest


def _read_small(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path.name} is not a plain file of at most {MAX_MANIFEST_BYTES} B")
        return file.read()


def check_file(folder: Path, entry: FileEntry) -> str | None:
    """Compare one file with its entry; None if it is the same, otherwise the reason."""
    if reason := _refused_name(entry):
        return reason
    path = folder.joinpath(*PurePosixPath(entry.path).parts)
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
            with open(path, "rb") as file:
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
    if not isinstance(name, str) or not isinstance(entry.size, int):
        return f"malformed manifest entry {entry!r}"
    if not isinstance(entry.sha256, str) or not _DIGEST.fullmatch(entry.sha256):
        return f"{name}: malformed sha256 in the manifest"
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        return f"{name!r}: path refused, it must stay inside the checkpoint"
    return None


def _unlisted(folder: Path, manifest: Manifest) -> list[str]:
    # Loaders find shards by pattern, so a file added later could be read although nobody hashed
    # it. Dot files are left alone: file systems and desktops make them and no loader matches them.
    try:
        present = list_files(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    listed = {entry.path for entry in manifest.files}
    extra = [n for n in present if n not in listed and not PurePosixPath(n).name.startswith(".")]
    return [f"{name}: not in the manifest; move it elsewhere" for name in extra]
