"""One stream of items over several shards, read by item number in any order."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from dalr_scale.data.shards.arrays import CutOff, OpenFile, places
from dalr_scale.data.shards.features_store import (
    FeatureTable,
    feature_facts,
    features_path,
    open_features,
)
from dalr_scale.data.shards.files import companions, read_exactly, shard_names
from dalr_scale.data.shards.index import ensure_index
from dalr_scale.data.shards.index_file import IndexFile, IndexRows
from dalr_scale.data.shards.token_store import (
    STORED_TOKENS,
    Encoding,
    TokenTable,
    open_tokens,
    pad_rows,
    tokens_ending,
)
from dalr_scale.errors import UserError

TOKENS = "tokens"  # the role whose features are one vector per token
_IMAGE_ROLES = ("image", "caption")
_OPENED_AT_START = 128  # shards whose feature sets are checked in full before the first batch
_OPEN_FILES = 20_000  # of one process
_RETRY_SECONDS = (1.0, 5.0)  # before the second and the third try of a read that failed
_NO_FEATURES: Mapping[str, str] = MappingProxyType({})
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Records:
    """What was read for n items.

    Attributes:
        sentences: n captions or sentences; empty when they were not asked for.
        image_ids: int64 [n]; number of the item's sample over the whole source, -1 without image.
        features: by role, float32 [n, dim].
        tokens: token features float32 [n, T, dim], zero-padded to the longest, and their bool mask
            [n, T]; None unless the source has the role ``tokens``.
        images: n encoded images; None unless the source reads images.
        encoded: stored token ids and their mask, int64 [n, L]; None unless the source has them.
        faults: position -> what is wrong with that row; its values above must not be used.
    """

    sentences: list[str]
    image_ids: np.ndarray
    features: dict[str, np.ndarray]
    tokens: tuple[np.ndarray, np.ndarray] | None
    images: list[bytes] | None
    encoded: tuple[np.ndarray, np.ndarray] | None = None
    faults: dict[int, str] = field(default_factory=dict)


class _OpenShard:
    """A shard with its index and packed records; their files close when it is dropped."""

    def __init__(
        self, index: IndexRows, features: dict[str, FeatureTable], ids: TokenTable | None
    ) -> None:
        self.index = index
        self.features = features
        self.ids = ids
        self.file = OpenFile(index.shard)
        if self.file.size != index.header.shard_size:
            raise UserError(f"{index.shard}: changed since it was indexed; start again")


class _Batch:
    """The rows of one read while they are being filled, shard by shard."""

    def __init__(self, count: int, dims: Mapping[str, int], text: bool, images: bool) -> None:
        self.count = count
        self.sentences = [""] * count if text else []
        self.images: list[bytes] | None = [b""] * count if images else None
        self.image_ids = np.full(count, -1, np.int64)
        self.vectors = {
            role: np.empty((count, dim), np.float32) for role, dim in dims.items() if role != TOKENS
        }
        self.tokens: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.ids: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.special: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self.faults: dict[int, str] = {}

    def note(self, where: np.ndarray, faults: Mapping[int, str]) -> None:
        """Add faults given by position within ``where``."""
        for position, fault in faults.items():
            self.faults.setdefault(int(where[position]), fault)


class Source:
    """All items of some shards, numbered 0 ... num_items - 1.

    Shards are taken in the order of their SHA-256, so that neither their names nor the order they
    are listed in changes the numbering. The order and the batches are made elsewhere.

    Attributes:
        num_items: captions or sentences.
        num_samples: samples, with or without images.
        part_items: items of each weighted part, in the order of their numbers.
        shards: the shards in their order.
        has_ids: whether every shard has stored token ids of the wanted encoding.
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
            shards: shard files, each with another content.
            features: feature set name by role, e.g. ``{"image": "clip"}``; the role ``tokens``
                takes a set of level ``token``, every other role one of level sample or item.
            with_images: read the images too; every sample must have one.
            encoding: the token ids to read where all shards have them stored.
            part_sizes: shards of each part that is drawn from on its own; empty: one part.

        Raises:
            UserError: a shard or feature set is missing, damaged or does not fit, two shards have
                the same content, or images are missing.
        """
        files = [ensure_index(shard) for shard in shards]
        if not files:
            raise UserError("no shards were named; give at least one")
        _refuse_equal(files)
        parts = _parts(files, part_sizes or (len(files),))
        files = [file for part in parts for file in part]
        self._files = files
        self._features = dict(features)
        self._with_images = with_images
        self._encoding = encoding
        self._item_start = _starts([file.header.items for file in files])
        self._sample_start = _starts([file.header.samples for file in files])
        self._cache: OrderedDict[int, _OpenShard] = OrderedDict()
        self._file_budget = _file_budget()
        self.shards = [file.shard for file in files]
        self.part_items = tuple(sum(file.header.items for file in part) for part in parts)
        self.num_items = int(self._item_start[-1])
        self.num_samples = int(self._sample_start[-1])
        if with_images:
            self._require_images()
        self._dims, sums = self._audit_features()
        self.fingerprint = _fingerprint(files, sums)
        self.contents = _contents(files, sums)
        self.has_ids = self._find_ids()

    def __getstate__(self) -> dict[str, object]:
        """Pickle without open files; a spawned worker opens its own."""
        return {**self.__dict__, "_cache": OrderedDict()}

    def quarantine(self) -> list[str]:
        """Name the damaged lines and samples that the indexes have set aside."""
        listed = [file for file in self._files if file.header.quarantined]
        return [line for file in listed for line in file.load().quarantine(incomplete=False)]

    def used_samples(self) -> np.ndarray:
        """Return which samples have an item, bool [num_samples]; the others are set aside."""
        return np.concatenate([_used(file) for file in self._files])

    def use_ids(self, encoding: Encoding) -> None:
        """Read token ids too where all shards have them stored (see ``has_ids``)."""
        self._encoding = encoding
        self.has_ids = self._find_ids()
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
        """Name an item for a message: shard, sample key and line."""
        shard = int(np.searchsorted(self._item_start, item, side="right")) - 1
        index = self._open(shard).index
        row = index.items.rows(np.array([item - int(self._item_start[shard])]))[0]
        return f"{index.shard}, sample {index.key(int(row['sample']))!r}, line {row['line'] + 1}"

    def read(self, ids: np.ndarray, *, text: bool = True, strict: bool = True) -> Records:
        """Read items by number, in the order given.

        Args:
            ids: integers [n] in 0 ... num_items - 1.
            text: read the sentences.
            strict: raise on the first bad row; otherwise bad rows are named in ``faults``.

        Raises:
            UserError: bytes differ from what was indexed, or a feature is not finite (with
                ``strict``; the message names the shard and the sample); a shard cannot be read.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_items):
            raise ValueError(f"item numbers must be in 0 ... {self.num_items - 1}")
        batch = _Batch(len(ids), self._dims, text, self._with_images)
        for shard, where, local in self._by_shard(ids):
            try:
                self._retried(shard, lambda s=shard, w=where, x=local: self._fill(batch, s, w, x))
            except CutOff as error:  # which of its rows are left, nobody needs to know
                batch.note(where, dict.fromkeys(range(len(where)), str(error)))
        if batch.faults and strict:
            position = min(batch.faults)
            raise UserError(batch.faults[position])
        return self._records(batch)

    def _fill(self, batch: _Batch, shard: int, where: np.ndarray, local: np.ndarray) -> None:
        """Read the rows that lie in one shard into their places."""
        opened = self._open(shard)
        rows = opened.index.items.rows(local)
        samples = rows["sample"].astype(np.int64)
        batch.image_ids[where] = self._image_ids(shard, opened.index, samples)
        if batch.sentences:
            self._fill_texts(batch, opened, where, rows)
        if batch.images is not None:
            self._fill_images(batch, opened, where, samples)
        for role, table in opened.features.items():
            found = table.read(samples if table.level == "sample" else local)
            if found.lengths is not None:
                batch.tokens.append((where, found.values, found.lengths))
            else:
                batch.vectors[role][where] = found.values
            batch.note(where, _with_keys(opened, samples, found.faults))
        if self.has_ids and opened.ids is not None and self._encoding is not None:
            ids = opened.ids.read(local, self._encoding.max_length)
            batch.ids.append((where, ids.values, ids.lengths))
            batch.special = opened.ids.prefix, opened.ids.suffix
            batch.note(where, _with_keys(opened, samples, ids.faults))

    def _records(self, batch: _Batch) -> Records:
        encoded = None
        if self.has_ids and self._encoding is not None:
            encoded = pad_rows(batch.ids, batch.count, batch.special, self._encoding.pad_id)
        tokens = None
        if TOKENS in self._dims:
            tokens = _pad(batch.tokens, batch.count, self._dims[TOKENS])
        return Records(
            batch.sentences,
            batch.image_ids,
            batch.vectors,
            tokens,
            batch.images,
            encoded,
            batch.faults,
        )

    def _retried(self, shard: int, read: Callable[[], _T]) -> _T:
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
                        f"{len(_RETRY_SECONDS) + 1} tries; bring it back and start again"
                    ) from error
                _log.warning("%s: cannot be read (%s); trying again", path, cause.strerror)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (shard, positions in ``ids``, item numbers within the shard)."""
        shard = np.searchsorted(self._item_start, ids, side="right") - 1
        order = np.argsort(shard, kind="stable")
        cuts = np.flatnonzero(np.diff(shard[order])) + 1
        for where in np.split(order, cuts) if len(ids) else []:
            number = int(shard[where[0]])
            yield number, where, ids[where] - self._item_start[number]

    def _fill_texts(
        self, batch: _Batch, opened: _OpenShard, where: np.ndarray, rows: np.ndarray
    ) -> None:
        for at, (offset, size, crc, sample, line) in zip(
            where.tolist(), rows.tolist(), strict=True
        ):
            data = read_exactly(opened.file.descriptor, size, offset)
            if zlib.crc32(data) == crc:
                batch.sentences[at] = data.decode("utf-8")
            else:
                batch.faults.setdefault(at, _changed(opened, sample, f"line {line + 1}"))

    def _fill_images(
        self, batch: _Batch, opened: _OpenShard, where: np.ndarray, samples: np.ndarray
    ) -> None:
        assert batch.images is not None
        images = zip(
            where.tolist(), samples.tolist(), self._read_images(opened, samples), strict=True
        )
        for at, sample, data in images:
            if data is None:
                batch.faults.setdefault(at, _changed(opened, sample, "the image"))
            else:
                batch.images[at] = data

    def _read_images(self, opened: _OpenShard, samples: np.ndarray) -> Iterator[bytes | None]:
        """Yield the encoded images of samples; None for one that is not what was indexed."""
        rows = opened.index.samples.rows(samples)[["image", "image_size", "image_crc32"]]
        for offset, size, crc in rows.tolist():
            data = read_exactly(opened.file.descriptor, size, offset)
            yield data if zlib.crc32(data) == crc else None

    def _image_ids(self, shard: int, index: IndexRows, samples: np.ndarray) -> np.ndarray:
        ids = samples + self._sample_start[shard]
        if any(role in self._features for role in _IMAGE_ROLES):
            return ids
        if not index.header.images:
            return np.full_like(ids, -1)
        return np.where(index.samples.rows(samples)["image_size"] > 0, ids, -1)

    def read_images(self, samples: np.ndarray) -> list[bytes]:
        """Return the encoded images of some samples (numbers over the whole source)."""
        found = []
        for sample in np.asarray(samples, np.int64).tolist():
            shard = int(np.searchsorted(self._sample_start, sample, side="right")) - 1
            opened, local = self._open(shard), sample - int(self._sample_start[shard])
            (data,) = self._read_images(opened, np.array([local]))
            if data is None:
                raise UserError(_changed(opened, local, "the image"))
            found.append(data)
        return found

    def _open(self, shard: int) -> _OpenShard:
        """Return an open shard from a cache with a bounded number of open files."""
        opened = self._cache.get(shard)
        if opened is None:
            file = self._files[shard]
            tables = {
                role: open_features(file.shard, name, file.header)
                for role, name in self._features.items()
            }
            encoding = self._encoding if self.has_ids else None
            ids = encoding and open_tokens(file.shard, encoding.tokenizer_sha256, file.header)
            # the shard, its index, its ids, and each feature set
            while self._cache and (len(self._cache) + 1) * (len(tables) + 3) > self._file_budget:
                self._cache.popitem(last=False)
            opened = self._cache[shard] = _OpenShard(file.open(), tables, ids)
        else:
            self._cache.move_to_end(shard)
        return opened

    def _find_ids(self) -> bool:
        """Whether all shards have the wanted ids; only some of them are a forgotten command."""
        if self._encoding is None or self._encoding.max_length > STORED_TOKENS:
            return False
        ending = tokens_ending(self._encoding.tokenizer_sha256)
        places = [os.path.split(companions(shard, ending)) for shard in self.shards]
        names = {
            directory: set(os.listdir(directory or ".")) for directory in {f for f, _ in places}
        }
        there = [name in names[directory] for directory, name in places]
        missing = [shard for shard, found in zip(self.shards, there, strict=True) if not found]
        if missing and len(missing) < len(self.shards):
            _log.warning(
                "%d of %d shards have no stored token ids (%s ...): tokenising while reading; "
                "run dalr-scale tokens on all of them",
                len(missing), len(self.shards), missing[0],
            )  # fmt: skip
        return not missing

    def _require_images(self) -> None:
        for file in self._files:
            missing = file.header.samples - file.header.images
            if missing:
                missing = int((_used(file) & (file.load().samples["image_size"] == 0)).sum())
            if missing:
                raise UserError(
                    f"{file.shard}: {missing} of {file.header.samples} samples have no image; "
                    "prepare the shard from images, or use stored features"
                )

    def _audit_features(self) -> tuple[dict[str, int], list[str]]:
        """Look at every feature set: equal widths over the shards, levels that fit the roles.

        The sets of the first shards are opened as a whole, those of a long list when they are read.
        """
        dims: dict[str, int] = {}
        sums: list[str] = []
        roles = sorted(self._features.items())
        for number, file in enumerate(self._files):
            for role, name in roles:
                if number < _OPENED_AT_START:
                    open_features(file.shard, name, file.header)
                level, dim, sha256 = feature_facts(file.shard, name, file.header)
                if (level == "token") != (role == TOKENS):
                    path = features_path(file.shard, name)
                    raise UserError(f"{path}: level {level} cannot serve as {role!r} features")
                if dims.setdefault(role, dim) != dim:
                    path = features_path(file.shard, name)
                    raise UserError(
                        f"{path}: width {dim}, but {dims[role]} in other shards; "
                        "compute these features again with one model"
                    )
                sums.append(f"{role} {sha256}")
        return dims, sums


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _used(file: IndexFile) -> np.ndarray:
    """Which samples of a shard have an item: bool [samples]."""
    return np.bincount(file.load().items["sample"], minlength=file.header.samples) > 0


def _fingerprint(files: list[IndexFile], feature_sums: list[str]) -> str:
    lines = [f"{file.header.sha256} {file.header.items} {file.header.samples}" for file in files]
    quarantined = [file for file in files if file.header.quarantined]
    lines += [f"aside {file.load().quarantined.tobytes().hex()}" for file in quarantined]
    return hashlib.sha256("\n".join(["source 1", *lines, *feature_sums]).encode()).hexdigest()


def _contents(files: list[IndexFile], feature_sums: list[str]) -> dict[str, str]:
    """Shard -> digest, and shard and role -> digest of the features."""
    names = shard_names([file.shard for file in files])
    found = {name: _fingerprint([file], [])[:32] for name, file in zip(names, files, strict=True)}
    roles = len(feature_sums) // len(files)
    for number, line in enumerate(feature_sums):
        role, sha256 = line.split(" ")
        found[f"{names[number // roles]} ({role} features)"] = sha256[:32]
    return found


def _pad(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], count: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay token features out as [n, T, dim] with their mask, T the longest row."""
    longest = max((int(lengths.max()) for _, _, lengths in parts if len(lengths)), default=0)
    tokens = np.zeros((count, longest, dim), np.float32)
    kept = np.zeros(count, np.int64)
    for where, values, lengths in parts:
        tokens[np.repeat(where, lengths), places(lengths)] = values
        kept[where] = lengths
    return tokens, np.arange(longest) < kept[:, None]


def _changed(opened: _OpenShard, sample: int, what: str) -> str:
    index = opened.index
    return (
        f"{index.shard}: {what} of sample {index.key(sample)!r} differs from what was indexed; "
        "copy the shard again, then run dalr-scale index"
    )


def _with_keys(
    opened: _OpenShard, samples: np.ndarray, faults: Mapping[int, str]
) -> dict[int, str]:
    """Add the sample's key to faults of what lies beside the shard, which knows numbers only."""
    return {
        position: f"{why} (sample {opened.index.key(int(samples[position]))!r})"
        for position, why in faults.items()
    }


def _refuse_equal(files: Sequence[IndexFile]) -> None:
    for one, two in pairwise(sorted(files, key=lambda file: file.header.sha256)):
        if one.header.sha256 == two.header.sha256:
            raise UserError(f"{one.shard} and {two.shard} have the same content; name one")


def _parts(files: Sequence[IndexFile], sizes: Sequence[int]) -> list[list[IndexFile]]:
    """Cut the files into parts, each in the order of its shards' content."""
    if sum(sizes) != len(files) or min(sizes) < 1:
        raise ValueError(f"parts of {list(sizes)} shards do not make {len(files)}")
    ends = np.cumsum(sizes).tolist()
    return [
        sorted(files[end - size : end], key=lambda file: file.header.sha256)
        for end, size in zip(ends, sizes, strict=True)
    ]


def _file_budget() -> int:
    """Files that open shards may take; the soft limit of this process is raised for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _OPEN_FILES if hard == resource.RLIM_INFINITY else min(2 * _OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _OPEN_FILES if soft == resource.RLIM_INFINITY else min(_OPEN_FILES, soft // 2)
