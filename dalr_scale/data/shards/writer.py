"""Writing shards: WebDataset tars with deterministic bytes, put in place only when complete."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, BinaryIO

from dalr_scale.data.shards.files import COMPANION_SUFFIXES, SHARD_EXTENSIONS
from dalr_scale.data.shards.index_file import index_path
from dalr_scale.errors import UserError
from dalr_scale.run.files import write_durably

_STATE = "progress.json"
_LAYOUT = 2  # raise it when the same input would give other bytes or other counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from webdataset.writer import TarWriter


def open_tar_writer(stream: BinaryIO) -> TarWriter:
    """Return a WebDataset writer whose bytes depend on the content only.

    The time stamp must be the integer 0: a float makes the tar library add a PAX header to each
    member.
    """
    # The package imports torch, which would delay --help and refusals by seconds.
    from webdataset.writer import TarWriter

    return TarWriter(stream, encoder=False, user="", group="", mtime=0)


class ShardSetWriter:
    """Writes ``PREFIX-000000.tar``, ``PREFIX-000001.tar`` ... into a directory.

    A context manager. The shards are built in a hidden directory next to their final place and
    moved when the block ends without an exception; otherwise nothing appears. ``shards`` then lists
    the written files.

    A job with a name (``resuming``) may ``commit`` each full shard with its progress: after an
    interruption the same job continues with the committed shards and their ``progress``.
    """

    def __init__(
        self, output: Path, prefix: str, *, samples_per_shard: int, overwrite: bool = False
    ) -> None:
        """Prepare to write.

        Args:
            output: directory of the shards, created when missing.
            prefix: start of the file names; letters, digits, ``-`` and ``_``.
            samples_per_shard: samples in every shard but the last.
            overwrite: replace an earlier set of the same prefix, with all companion files.

        Raises:
            UserError: the set exists and ``overwrite`` is off, or an argument is unusable.
        """
        if not prefix or not prefix.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"prefix {prefix!r}: use letters, digits, - and _ only")
        if samples_per_shard < 1:
            raise UserError(f"{samples_per_shard} samples per shard; use at least 1")
        self.output = output
        self.shards: list[Path] = []
        self._prefix = prefix
        self._per_shard = samples_per_shard
        self._overwrite = overwrite
        self._building = output / f".{prefix}.partial"
        self._keys: set[str] = set()
        self._count = 0
        self._job = ""
        self.progress: dict[str, Any] = {}
        self._names: list[str] = []
        self._stream: BinaryIO | None = None
        self._writer: TarWriter | None = None
        if not overwrite and self._existing():
            raise UserError(
                f"{self._existing()[0]}: exists already; choose another --output or --prefix, "
                "or replace it with --overwrite"
            )

    def _existing(self) -> list[Path]:
        """Return the shards of an earlier set (six digits, so not those of ``PREFIX-more``)."""
        pattern = f"{self._prefix}-" + "[0-9]" * 6 + ".tar"
        return sorted(self.output.glob(pattern))

    def __enter__(self) -> ShardSetWriter:
        """Create the directory to build in; remove the files of another job there."""
        state = self._committed()
        if state is None:
            shutil.rmtree(self._building, ignore_errors=True)
            self._building.mkdir(parents=True)
        else:
            self._names = state["shards"]
            self._count = len(self._names) * self._per_shard
            self.progress = state["progress"]
            for path in self._building.iterdir():
                if path.name not in (*self._names, _STATE):
                    path.unlink()
        return self

    def resuming(self, job: str) -> ShardSetWriter:
        """Set the name of the job: only the same name continues with the committed shards."""
        self._job = job
        return self

    def _committed(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self._building / _STATE).read_bytes())
            wanted = {"job": self._job, "per_shard": self._per_shard, "layout": _LAYOUT}
            if not self._job or any(state[name] != value for name, value in wanted.items()):
                return None
            sizes = {name: (self._building / name).stat().st_size for name in state["shards"]}
            return state if sizes == state["sizes"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_full(self) -> bool:
        """Whether the shard that is being written has all its samples."""
        return self._count % self._per_shard == 0

    def commit(self, progress: dict[str, Any]) -> None:
        """Close the full shard and record the progress of the job."""
        self._close_shard()
        state = {
            "layout": _LAYOUT,
            "job": self._job,
            "per_shard": self._per_shard,
            "shards": self._names,
            "sizes": {name: (self._building / name).stat().st_size for name in self._names},
            "progress": progress,
        }
        write_durably(self._building / _STATE, json.dumps(state).encode())

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample.

        Args:
            key: name of the sample within the set, without dots.
            members: content by extension, e.g. ``{"jpg": ..., "txt": ...}``.
        """
        if not key or "." in key or key.startswith("/") or not key.isprintable() or "\\" in key:
            raise ValueError(f"key {key!r} is empty, has a dot, or is not a relative name")
        if key in self._keys:
            raise ValueError(f"key {key!r} was written before")
        if not members or not SHARD_EXTENSIONS.issuperset(members):
            raise ValueError(f"members {sorted(members)} of {key!r}: allowed {SHARD_EXTENSIONS}")
        if self._count % self._per_shard == 0:
            self._next_shard()
        self._keys.add(key)
        self._count += 1
        assert self._writer is not None
        self._writer.write({"__key__": key, **members})

    def _next_shard(self) -> None:
        self._close_shard()
        name = f"{self._prefix}-{len(self._names):06d}.tar"
        self._names.append(name)
        self._stream = (self._building / name).open("wb")
        self._writer = open_tar_writer(self._stream)

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._stream is not None:
            self._stream.close()
        self._writer = self._stream = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Move the shards into place, or remove them after an exception."""
        try:
            self._close_shard()
            if kind is None:
                self._publish()
        finally:
            interrupted = kind is not None and not issubclass(kind, UserError)
            if not (interrupted and (self._building / _STATE).exists()):
                shutil.rmtree(self._building, ignore_errors=True)

    def _publish(self) -> None:
        for old in self._existing() if self._overwrite else []:
            index_path(old).unlink(missing_ok=True)
            for suffix in COMPANION_SUFFIXES:
                for companions in old.parent.glob(f"{old.stem}.*{suffix}"):
                    companions.unlink()
            if old.name not in self._names:
                old.unlink()
        for name in self._names:
            (self._building / name).replace(self.output / name)
            self.shards.append(self.output / name)


def write_text_shards(
    sentences: Iterable[str],
    output: Path,
    prefix: str,
    *,
    per_member: int = 1024,
    members_per_shard: int = 64,
    overwrite: bool = False,
) -> list[Path]:
    """Pack sentences into text shards, many to a ``.txt`` member, in the order given.

    Args:
        sentences: one sentence each; white space inside is reduced to single spaces, so that a
            sentence is always one line, and blank ones are left out.
        output: directory of the shards.
        prefix: start of the file names.
        per_member: sentences in one ``.txt`` member.
        members_per_shard: members in one shard.
        overwrite: replace an earlier set of the same prefix.

    Returns:
        The shards written.

    Raises:
        UserError: there is no sentence, or the set exists and ``overwrite`` is off.
    """
    if per_member < 1:
        raise UserError(f"{per_member} sentences per member; use at least 1")
    with ShardSetWriter(
        output, prefix, samples_per_shard=members_per_shard, overwrite=overwrite
    ) as writer:
        block: list[str] = []
        number = 0
        for sentence in sentences:
            line = " ".join(sentence.split())
            if line:
                block.append(line)
            if len(block) == per_member:
                _write_block(writer, number, block)
                number, block = number + 1, []
        if block:
            _write_block(writer, number, block)
        elif not number:
            raise UserError(f"{prefix}: there is no sentence to write; the input is empty or blank")
    return writer.shards


def _write_block(writer: ShardSetWriter, number: int, block: list[str]) -> None:
    # Half of a surrogate pair (possible in JSON) has no UTF-8 form; it becomes a question mark.
    text = "\n".join(block) + "\n"
    writer.write(f"{number:08d}", {"txt": text.encode("utf-8", "replace")})
