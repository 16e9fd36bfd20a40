"""Remote shards: copied whole into a local cache, verified, then read like any other shard.

Nothing is opened over the network unless its scheme is allowed by name, and training itself reads
local files only: a broken connection stops the start of a run, not step 40,000.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

from tqdm import tqdm

from dalr_scale.data.shards.features_store import features_path
from dalr_scale.data.shards.files import expand_braces
from dalr_scale.data.shards.index_file import read_header
from dalr_scale.errors import UserError
from dalr_scale.run.files import process_name, write_durably

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SCHEMES = ("https", "http", "s3", "gs", "hf", "memory")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PAUSES = (1.0, 5.0)
_TIMEOUT = 60  # seconds without a byte
_THREADS = 8
_IDENTITY = ("ETag", "etag", "checksum", "blob_id", "lfs", "LastModified", "mtime", "last_commit")
log = logging.getLogger(__name__)


RemoteFacts = dict[str, str | int | None]  # size and identity of a remote file


class FileSystem(Protocol):
    """The part of an fsspec file system that is used here."""

    def glob(self, path: str) -> list[str]: ...

    def info(self, path: str) -> Mapping[str, object]: ...

    def get_file(self, rpath: str, lpath: str) -> None: ...


class RemoteShards:
    """Turns URLs of shards into local files.

    A copy is stored as ``CACHE/HASH-OF-DIRECTORY/NAME.tar`` with a record of its origin. Its size
    is compared with the remote one, and its SHA-256 with the one that the store reports (``hf``)
    and with the one in ``NAME.tar.idx``, if that exists next to the remote shard. A copy is used
    again as long as neither its bytes nor the remote file have changed; without a connection it is
    used unchecked.
    """

    def __init__(
        self, allowed: Sequence[str], cache: str = "", features: Sequence[str] = ()
    ) -> None:
        """Set the allowed schemes.

        Args:
            allowed: URL schemes.
            cache: directory of the copies; empty: ``~/.cache/dalr_scale``.
            features: feature sets to copy with a shard that has them.

        Raises:
            UserError: a scheme that is never opened.
        """
        for scheme in allowed:
            if scheme not in SCHEMES:
                raise UserError(
                    f"data.remote: {scheme!r} is not one of the schemes that can be read: "
                    f"{', '.join(SCHEMES)}"
                )
        self._allowed = tuple(allowed)
        self._cache = Path(cache or "~/.cache/dalr_scale").expanduser()
        self._features = tuple(features)

    def localise(self, pattern: str, local: Callable[[str], Path]) -> list[Path]:
        """Return the local files of a URL, or ``local(pattern)`` for anything else.

        Raises:
            UserError: a scheme that is not allowed, or shards that cannot be copied.
        """
        found = _URL.match(pattern)
        if not found:
            return [local(pattern)]
        scheme = found[1].lower()
        if scheme not in self._allowed or "::" in pattern:
            raise UserError(
                f"{_shown(pattern)!r} is remote: add {scheme!r} to data.remote to allow it"
                if scheme in SCHEMES
                else f"{_shown(pattern)!r} is a URL of a kind that is never opened; name a file"
            )
        system = _file_system(scheme)
        urls = [url for text in expand_braces(pattern) for url in _expand(system, scheme, text)]
        with ThreadPoolExecutor(_THREADS) as pool:
            copies = pool.map(lambda url: self._copy(system, url), urls)
            bar = tqdm(copies, total=len(urls), desc="remote shards", unit="", disable=None)
            return list(bar)

    def _copy(self, system: FileSystem, url: str) -> Path:
        name = PurePosixPath(urlsplit(url).path).name
        if not re.fullmatch(r"[\w.-]+\.tar", name):
            raise UserError(f"{_shown(url)!r} is not the name of a shard; it must end in .tar")
        directory = url.rpartition("/")[0]
        target = self._cache / hashlib.sha256(directory.encode()).hexdigest()[:16] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _ensure_copy(system, url, target)
            for feature in self._features:
                companion = features_path(target, feature)
                theirs = f"{directory}/{companion.name}"
                if _info(system, theirs) is not None:
                    _ensure_copy(system, theirs, companion)
        return target


def _file_system(scheme: str) -> FileSystem:
    import fsspec

    options: dict[str, object] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs a package that is not installed ({error.name}): "
            "pip install 'dalr-scale[remote]'"
        ) from error


def _expand(system: FileSystem, scheme: str, text: str) -> list[str]:
    if not any(mark in text for mark in "*?["):
        return [text]
    if scheme in ("http", "https"):
        raise UserError(f"{_shown(text)!r}: a web server lists no files; name them, or use braces")
    found = [f"{scheme}://{str(path).lstrip('/')}" for path in sorted(system.glob(text))]
    found = [url for url in found if url.endswith(".tar") and url.count(".", url.rfind("/")) == 1]
    if not found:
        raise UserError(f"no shard matches {_shown(text)!r}; check the URL")
    return found


def _ensure_copy(system: FileSystem, url: str, target: Path) -> None:
    """Copy one file unless an unchanged copy exists."""
    note = target.with_name(f"{target.name}.origin.json")
    there = _info(system, url)
    known = _read_note(note)
    if target.exists() and known is not None:
        if there is not None and known["remote"] != there:
            raise UserError(
                f"{_shown(url)} has changed since it was copied; remove {target} to copy it again"
            )
        status = target.stat()
        if [status.st_size, status.st_mtime_ns] == known["local"] or (
            _sha256(target) == known["sha256"]
        ):
            return
        log.warning("%s: the copy is damaged; copying it again", target)
    if there is None:
        raise UserError(f"{_shown(url)} cannot be found; check the URL and the connection")
    sha256 = _download(system, url, target, there)
    status = target.stat()
    record = {
        "url": _shown(url),
        "remote": there,
        "local": [status.st_size, status.st_mtime_ns],
        "sha256": sha256,
    }
    write_durably(note, json.dumps(record, indent=1).encode())


def _download(system: FileSystem, url: str, target: Path, there: RemoteFacts) -> str:
    """Copy a file and return its SHA-256; repeat a broken or incomplete copy."""
    temporary = target.with_name(f"{target.name}.tmp-{process_name()}")
    fault = ""
    try:
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            try:
                system.get_file(url, str(temporary))
            except Exception as error:  # every file system has its own exceptions
                fault = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            sha256, have = _sha256(temporary), temporary.stat().st_size
            fault = _mismatch(system, url, target, sha256, have, there)
            if not fault:
                temporary.replace(target)
                return sha256
    finally:
        temporary.unlink(missing_ok=True)
    raise UserError(
        f"{_shown(url)} could not be copied in {len(_PAUSES) + 1} tries ({fault.strip()})"
    )


def _mismatch(
    system: FileSystem, url: str, target: Path, sha256: str, have: int, there: RemoteFacts
) -> str:
    if there["size"] is not None and have != there["size"]:
        return f"{have} of {there['size']} bytes arrived"
    if there.get("sha256", sha256) != sha256:
        return "its SHA-256 is not the one that the store reports"
    wanted = _indexed_sha256(system, url, target)
    return f"its SHA-256 is not that of {_shown(url)}.idx" if wanted not in (None, sha256) else ""


def _indexed_sha256(system: FileSystem, url: str, target: Path) -> str | None:
    """Return the SHA-256 in the index of the remote shard; None without an index."""
    temporary = target.with_name(f"{target.name}.idx.tmp-{process_name()}")
    try:
        if _info(system, f"{url}.idx") is None:
            return None
        system.get_file(f"{url}.idx", str(temporary))
        header = read_header(temporary)
        return header.sha256 if header is not None else None
    except OSError:
        return None
    finally:
        temporary.unlink(missing_ok=True)


def _info(system: FileSystem, url: str) -> RemoteFacts | None:
    """Return size and identity of a remote file; None when it cannot be reached."""
    try:
        info = system.info(url)
    except Exception:  # absent, forbidden or unreachable: exceptions differ by file system
        return None
    size = cast("int | str | None", info.get("size"))
    identity: RemoteFacts = {
        name: str(info[name]) for name in _IDENTITY if info.get(name) is not None
    }
    if (sha256 := getattr(info.get("lfs"), "sha256", None)) is not None:
        identity["sha256"] = str(sha256)
    return {"size": int(size) if size is not None else None, **identity}


def _read_note(path: Path) -> dict[str, object] | None:
    try:
        note = json.loads(path.read_bytes())
        return note if {"remote", "local", "sha256"} <= set(note) else None
    except (OSError, ValueError, TypeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Lock a shard: one rank of a host copies it, the other ranks wait."""
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _shown(url: str) -> str:
    """Return a URL without its possibly secret parts: user, password and query."""
    head, separator, rest = url.partition("://")
    return head + separator + rest.partition("?")[0].rpartition("@")[2]
