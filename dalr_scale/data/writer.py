"""Writing shards: WebDataset tars with deterministic bytes, put in place only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from dalr_scale.data.index import index_path
from dalr_scale.data.shards import BESIDE_SUFFIXES, SHARD_EXTENSIONS
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from webdataset.writer import TarWriter


def open_tar_writer(stream: BinaryIO) -> TarWriter:
    """Return a WebDataset writer whose bytes depend on the content only.

    The time stamp must be the integer 0: a float makes the tar library add a PAX header to each
    member.
    """
    # The package imports torch, seconds that a refused command or --help need not wait for.
    from webdataset.writer import TarWriter

    return TarWriter(stream, encoder=False, user="", group="", mtime=0)


class ShardSetWriter:
    """Writes ``PREFIX-000000.tar``, ``PREFIX-000001.tar`` ... into a folder.

    A context manager. The shards are built in a hidden folder beside their final place and moved
    when the block ends without an exception; otherwise nothing appears. ``shards`` then lists what
    was written.
    """

    def __init__(
        self, output: Path, prefix: str, *, samples_per_shard: int, overwrite: bool = False
    ) -> None:
        """Prepare to write.

        Args:
            output: folder of the shards, created when missing.
            prefix: start of the file names; letters, digits, ``-`` and ``_``.
            samples_per_shard: samples in every shard but the last.
            overwrite: replace an earlier set of the same prefix, with all that lies beside it.

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
        """Create the folder to build in; what an interrupted run left there is removed."""
        shutil.rmtree(self._building, ignore_errors=True)
        self._building.mkdir(parents=True)
        return self

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample.

        Args:
            key: name of the sample within the set, without dots.
            members: content by extension, e.g. ``{"jpg": ..., "txt": ...}``.
        """
        if not key or "." in key or key.startswith("/") or not key.isprintable() or "\\" in key:
            raise ValueError(f"key {key!r} is empty, has a dot, or is no relative name")
        if key in self._keys:
            raise ValueError(f"key {key!r} was written before")
        if not members or not SHARD_EXTENSIONS.issuperset(members):
            raise ValueError(f"members {sorted(members)} of {key!r}: allowed {SHARD_EXTENSIONS}")
        if len(self._keys) % self._per_shard == 0:
            self._next_shard()
        self._keys.add(key)
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
        """Put the shards in place, or remove every trace of them after an exception."""
        try:
            self._close_shard()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._building, ignore_errors=True)

    def _publish(self) -> None:
        for old in self._existing() if self._overwrite else []:
            index_path(old).unlink(missing_ok=True)
            for suffix in BESIDE_SUFFIXES:
                for beside in old.parent.glob(f"{old.stem}.*{suffix}"):
                    beside.unlink()
            if old.name not in self._names:
                old.unlink()
        for name in self._names:
            os.replace(self._building / name, self.output / name)
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
        output: folder of the shards.
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
    # Half of a surrogate pair (JSON can spell one) has no UTF-8 form; it becomes a question mark.
    text = "\n".join(block) + "\n"
    writer.write(f"{number:08d}", {"txt": text.encode("utf-8", "replace")})
