"""One stream of items over several shards, read by item number in any order."""

from __future__ import annotations

import logging
import resource
import time
from collections import OrderedDict
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from dalr_scale.data.shards.arrays import TruncatedFile
from dalr_scale.data.shards.features_store import open_features
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.token_id_store import (
    STORED_TOKENS,
    Encoding,
    open_token_ids,
    token_ids_ending,
)
from dalr_scale.data.stream import integrity
from dalr_scale.data.stream.open_shard import OpenShard
from dalr_scale.data.stream.records import TOKENS, Records
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from dalr_scale.data.stream.order import Kind

_OPEN_FILES = 20_000  # of one process
_RETRY_SECONDS = (1.0, 5.0)  # before the second and the third attempt of a read that failed
_NO_FEATURES: Mapping[str, str] = MappingProxyType({})
_T = TypeVar("_T")
log = logging.getLogger(__name__)


class Source:
    """All items of some shards, numbered 0 ... num_items - 1.

    Shards are numbered in the order of their SHA-256, so that neither their names nor the order in
    which they are listed changes the numbers. ``order`` and ``loader`` choose the items of a batch.

    Attributes:
        num_items: captions or sentences.
        num_samples: samples, with or without images.
        part_items: items of each weighted part, in the order of their numbers.
        shards: the shards in their order.
        has_token_ids: whether every shard has stored token ids of the requested encoding.
        fingerprint: changes with the content of any shard or feature set, not with names.
        contents: shard or feature set -> digest of its content, to name the one that changed.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        features: Mapping[str, str] = _NO_FEATURES,
        with_images: bool = False,
        encoding: Encoding | None = None,
        part_sizes: Sequence[int] = (),
    ) -> None:
        """Open the indexes of the shards, building those that are missing.

        Args:
            shards: shard files, each of different content.
            features: feature set name by role, e.g. ``{"image": "clip"}``; the role ``tokens``
                takes a set of level ``token``, every other role one of level sample or item.
            with_images: read the images too; every sample must have one.
            encoding: the token ids to read where all shards have them stored.
            part_sizes: shards of each part that is drawn from separately; empty: one part.

        Raises:
            UserError: a shard or feature set is missing, damaged or does not fit, two shards have
                the same content, or images are missing.
        """
        files = [ensure_index(shard) for shard in shards]
        if not files:
            raise UserError("no shards were named; give at least one")
        integrity.refuse_equal(files)
        parts = integrity.split_parts(files, part_sizes or (len(files),))
        files = [file for part in parts for file in part]
        self._files = files
        self._features = dict(features)
        self._with_images = with_images
        self._encoding = encoding
        self._item_start = _starts([file.header.items for file in files])
        self._sample_start = _starts([file.header.samples for file in files])
        self._cache: OrderedDict[int, OpenShard] = OrderedDict()
        self._file_budget = _file_budget()
        self.shards = [file.shard for file in files]
        self.part_items = tuple(sum(file.header.items for file in part) for part in parts)
        self.num_items = int(self._item_start[-1])
        self.num_samples = int(self._sample_start[-1])
        if with_images:
            integrity.require_images(files)
        self._dims, sums = integrity.check_features(files, self._features)
        self.fingerprint = integrity.fingerprint(files, sums)
        self.contents = integrity.digests(files, sums)
        self.has_token_ids = self._find_token_ids()

    def __getstate__(self) -> dict[str, object]:
        """Pickle without open files; a spawned worker opens its own."""
        return {**self.__dict__, "_cache": OrderedDict()}

    def quarantine(self) -> list[str]:
        """Return a sentence for each damaged line or sample that the indexes have quarantined."""
        listed = [file for file in self._files if file.header.quarantined]
        return [line for file in listed for line in file.load().quarantine(incomplete=False)]

    def used_samples(self) -> np.ndarray:
        """Return which samples have an item, bool [num_samples]; the rest is quarantined."""
        return np.concatenate([integrity.used_samples(file) for file in self._files])

    def use_token_ids(self, encoding: Encoding) -> None:
        """Read token ids too where all shards have them stored (see ``has_token_ids``)."""
        self._encoding = encoding
        self.has_token_ids = self._find_token_ids()
        self._cache.clear()

    def feature_dim(self, role: str) -> int:
        """Return the width of a role's features.

        Raises:
            UserError: the source was opened without that role.
        """
        if role not in self._dims:
            raise UserError(f"no stored features for {role!r}; name a feature set for it")
        return self._dims[role]

    def describe(self, item: int) -> str:
        """Return shard, sample key and line of an item, for a message."""
        shard = self._shard_of(self._item_start, item)
        index = self._open(shard).index
        row = index.items.rows(np.array([item - int(self._item_start[shard])]))[0]
        return f"{index.shard}, sample {index.key(int(row['sample']))!r}, line {row['line'] + 1}"

    def read(self, ids: np.ndarray, *, text: bool = True, strict: bool = True) -> Records:
        """Read items by number, in the order given.

        Args:
            ids: integers [n] in 0 ... num_items - 1.
            text: read the sentences.
            strict: raise on the first bad row; otherwise bad rows are listed in ``faults``.

        Raises:
            UserError: bytes differ from what was indexed, or a feature is not finite (with
                ``strict``; the message names the shard and the sample); a shard cannot be read.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_items):
            raise ValueError(f"item numbers must be in 0 ... {self.num_items - 1}")
        records = Records.empty(len(ids), self._dims, text=text, images=self._with_images)
        for shard, where, local in self._by_shard(ids):
            try:
                self._with_retries(
                    shard, lambda s=shard, w=where, x=local: self._read_shard(records, s, w, x)
                )
            except TruncatedFile as error:  # every row of the shard counts as bad
                records.note(where, dict.fromkeys(range(len(where)), str(error)))
        if records.faults and strict:
            raise UserError(records.faults[min(records.faults)])
        encoding = self._encoding if self.has_token_ids else None
        return records.pad(self._dims.get(TOKENS), encoding.pad_id if encoding else None)

    def read_images(self, samples: np.ndarray) -> list[bytes]:
        """Return the encoded images of some samples (numbers over the whole source).

        Raises:
            UserError: an image differs from what was indexed.
        """
        found = []
        for sample in np.asarray(samples, np.int64).tolist():
            shard = self._shard_of(self._sample_start, sample)
            opened, local = self._open(shard), sample - int(self._sample_start[shard])
            (data,) = opened.images(np.array([local]))
            if data is None:
                raise UserError(opened.changed(local, "the image"))
            found.append(data)
        return found

    @staticmethod
    def _shard_of(starts: np.ndarray, number: int) -> int:
        return int(np.searchsorted(starts, number, side="right")) - 1

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (shard, positions in ``ids``, item numbers within the shard)."""
        shard = np.searchsorted(self._item_start, ids, side="right") - 1
        order = np.argsort(shard, kind="stable")
        cuts = np.flatnonzero(np.diff(shard[order])) + 1
        for where in np.split(order, cuts) if len(ids) else []:
            number = int(shard[where[0]])
            yield number, where, ids[where] - self._item_start[number]

    def _read_shard(
        self, records: Records, shard: int, where: np.ndarray, local: np.ndarray
    ) -> None:
        max_length = self._encoding.max_length if self._encoding is not None else 0
        self._open(shard).read_into(records, where, local, max_length)

    def _with_retries(self, shard: int, read: Callable[[], _T]) -> _T:
        """Read from a shard, again after a pause when the file system fails."""
        for pause in (*_RETRY_SECONDS, None):
            try:
                return read()
            except (OSError, UserError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if not isinstance(cause, OSError):
                    raise
                self._cache.pop(shard, None)
                path = self.shards[shard]
                if pause is None:
                    raise UserError(
                        f"{path}: cannot be read ({cause.strerror}) after "
                        f"{len(_RETRY_SECONDS) + 1} tries; restore it and start again"
                    ) from error
                log.warning("%s: cannot be read (%s); trying again", path, cause.strerror)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _open(self, shard: int) -> OpenShard:
        """Return an open shard from a cache with a bounded number of open files."""
        opened = self._cache.get(shard)
        if opened is not None:
            self._cache.move_to_end(shard)
            return opened
        file = self._files[shard]
        tables = {
            role: open_features(file.shard, name, file.header)
            for role, name in self._features.items()
        }
        encoding = self._encoding if self.has_token_ids else None
        ids = encoding and open_token_ids(file.shard, encoding.tokenizer_sha256, file.header)
        # the shard, its index, its token ids, and each feature set
        while self._cache and (len(self._cache) + 1) * (len(tables) + 3) > self._file_budget:
            self._cache.popitem(last=False)
        opened = OpenShard(file.open(), tables, ids, int(self._sample_start[shard]))
        self._cache[shard] = opened
        return opened

    def _find_token_ids(self) -> bool:
        """Whether all shards have the requested ids; warn where only some of them have."""
        if self._encoding is None or self._encoding.max_length > STORED_TOKENS:
            return False
        ending = token_ids_ending(self._encoding.tokenizer_sha256)
        missing = integrity.without_companion(self._files, ending)
        if missing and len(missing) < len(self.shards):
            log.warning(
                "%d of %d shards have no stored token ids (%s ...): tokenizing while reading; "
                "run dalr-scale tokens on all of them",
                len(missing), len(self.shards), missing[0].shard,
            )  # fmt: skip
        return not missing


class Sources(NamedTuple):
    """The streams of a run; None for a stream that it does not have."""

    text: Source | None
    pairs: Source | None

    def of(self, kind: Kind) -> Source | None:
        """Return the source of ``text`` or ``pair`` batches."""
        return self.pairs if kind == "pair" else self.text


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _file_budget() -> int:
    """Return the number of files that open shards may use; raises this process's soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _OPEN_FILES if hard == resource.RLIM_INFINITY else min(2 * _OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _OPEN_FILES if soft == resource.RLIM_INFINITY else min(_OPEN_FILES, soft // 2)
