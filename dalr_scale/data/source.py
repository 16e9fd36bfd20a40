"""One stream of items over several shards, read by item number in any order."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dalr_scale.data.features_store import FeatureTable, open_features
from dalr_scale.data.index import IndexFile, ShardIndex, ensure_index
from dalr_scale.data.shards import open_regular, read_exactly
from dalr_scale.errors import UserError

TOKENS = "tokens"  # the role whose features are one vector per token
_IMAGE_ROLES = ("image", "caption")
_OPEN_FILES = 512  # half of the usual limit of 1,024 per process
_NO_FEATURES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Records:
    """What was read for n items.

    Attributes:
        sentences: n captions or sentences.
        image_ids: int64 [n]; number of the item's sample over the whole source, -1 without image.
        features: by role, float32 [n, dim].
        tokens: token features float32 [n, T, dim], zero-padded to the longest, and their bool mask
            [n, T]; None unless the source has the role ``tokens``.
        images: n encoded pictures; None unless the source reads images.
    """

    sentences: list[str]
    image_ids: np.ndarray
    features: dict[str, np.ndarray]
    tokens: tuple[np.ndarray, np.ndarray] | None
    images: list[bytes] | None


class _OpenShard:
    """A shard with its arrays and feature tables; closes its descriptor when it is dropped."""

    def __init__(self, index: ShardIndex, features: dict[str, FeatureTable]) -> None:
        self.index = index
        self.features = features
        self.descriptor = -1
        self.descriptor = open_regular(index.shard)
        if os.fstat(self.descriptor).st_size != index.header.shard_size:
            raise UserError(f"{index.shard}: changed since it was indexed; start again")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Source:
    """All items of some shards, numbered 0 ... num_items - 1.

    Shards are taken in the order of their SHA-256, so that neither their names nor the order they
    are listed in changes the numbering. The order and the batches are made elsewhere.

    Attributes:
        num_items: captions or sentences.
        num_samples: samples, with or without pictures.
        shards: the shards in their order.
        fingerprint: changes with the content of any shard or feature set, not with names.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        features: Mapping[str, str] = _NO_FEATURES,
        with_images: bool = False,
    ) -> None:
        """Open the indexes of the shards, building those that are missing.

        Args:
            shards: shard files, each with another content.
            features: feature set name by role, e.g. ``{"image": "clip"}``; the role ``tokens``
                takes a set of level ``token``, every other role one of level sample or item.
            with_images: read the pictures too; every sample must have one.

        Raises:
            UserError: a shard or feature set is missing, damaged or does not fit, two shards have
                the same content, or pictures are missing.
        """
        files = sorted((ensure_index(Path(s)) for s in shards), key=lambda f: f.header.sha256)
        if not files:
            raise UserError("no shards were named; give at least one")
        for one, two in pairwise(files):
            if one.header.sha256 == two.header.sha256:
                raise UserError(f"{one.shard} and {two.shard} have the same content; name one")
        self._files = files
        self._features = dict(features)
        self._with_images = with_images
        self._item_start = _starts([file.header.items for file in files])
        self._sample_start = _starts([file.header.samples for file in files])
        self._cache: OrderedDict[int, _OpenShard] = OrderedDict()
        self.shards = [file.shard for file in files]
        self.num_items = int(self._item_start[-1])
        self.num_samples = int(self._sample_start[-1])
        if with_images:
            self._require_images()
        self._dims, sums = self._audit_features()
        self.fingerprint = _fingerprint(files, sums)

    def __getstate__(self) -> dict[str, object]:
        """Pickle without open files; a spawned worker opens its own."""
        return {**self.__dict__, "_cache": OrderedDict()}

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
        row = index.items[item - int(self._item_start[shard])]
        return f"{index.shard}, sample {index.key(int(row['sample']))!r}, line {row['line'] + 1}"

    def read(self, ids: np.ndarray) -> Records:
        """Read items by number, in the order given.

        Args:
            ids: integers [n] in 0 ... num_items - 1.

        Raises:
            UserError: bytes differ from what was indexed, or a feature is not finite; the message
                names the shard and the sample.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_items):
            raise ValueError(f"item numbers must be in 0 ... {self.num_items - 1}")
        count = len(ids)
        sentences = [""] * count
        images: list[bytes] | None = [b""] * count if self._with_images else None
        image_ids = np.full(count, -1, np.int64)
        vectors = {
            role: np.empty((count, dim), np.float32)
            for role, dim in self._dims.items()
            if role != TOKENS
        }
        token_rows: list[np.ndarray] = [np.empty((0, 0), np.float32)] * count
        for shard, where, local in self._by_shard(ids):
            opened = self._open(shard)
            rows = opened.index.items[local]
            samples = rows["sample"].astype(np.int64)
            for at, text in zip(where.tolist(), self._texts(opened, rows), strict=True):
                sentences[at] = text
            image_ids[where] = self._image_ids(shard, opened.index, samples)
            if images is not None:
                for at, data in zip(where.tolist(), self._images(opened, samples), strict=True):
                    images[at] = data
            for role, table in opened.features.items():
                wanted = samples if table.level == "sample" else local
                if role == TOKENS:
                    for at, part in zip(where.tolist(), table.read_tokens(wanted), strict=True):
                        token_rows[at] = part
                else:
                    vectors[role][where] = table.read(wanted)
        tokens = _pad(token_rows, self._dims[TOKENS]) if TOKENS in self._dims else None
        return Records(sentences, image_ids, vectors, tokens, images)

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (shard, positions in ``ids``, item numbers within the shard)."""
        shard = np.searchsorted(self._item_start, ids, side="right") - 1
        order = np.argsort(shard, kind="stable")
        cuts = np.flatnonzero(np.diff(shard[order])) + 1
        for where in np.split(order, cuts) if len(ids) else []:
            number = int(shard[where[0]])
            yield number, where, ids[where] - self._item_start[number]

    def _texts(self, opened: _OpenShard, rows: np.ndarray) -> Iterator[str]:
        for offset, size, crc, sample, line in rows.tolist():
            data = read_exactly(opened.descriptor, size, offset)
            if zlib.crc32(data) != crc:
                raise _changed(opened, sample, f"line {line + 1}")
            yield data.decode("utf-8")

    def _images(self, opened: _OpenShard, samples: np.ndarray) -> Iterator[bytes]:
        for sample in samples.tolist():
            row = opened.index.samples[sample]
            data = read_exactly(opened.descriptor, int(row["image_size"]), int(row["image"]))
            if zlib.crc32(data) != int(row["image_crc32"]):
                raise _changed(opened, sample, "the picture")
            yield data

    def _image_ids(self, shard: int, index: ShardIndex, samples: np.ndarray) -> np.ndarray:
        ids = samples + self._sample_start[shard]
        if any(role in self._features for role in _IMAGE_ROLES):
            return ids
        return np.where(index.samples["image_size"][samples] > 0, ids, -1)

    def read_images(self, samples: np.ndarray) -> list[bytes]:
        """Return the encoded pictures of some samples (numbers over the whole source)."""
        found = []
        for sample in np.asarray(samples, np.int64).tolist():
            shard = int(np.searchsorted(self._sample_start, sample, side="right")) - 1
            local = np.array([sample - int(self._sample_start[shard])])
            found += self._images(self._open(shard), local)
        return found

    def _open(self, shard: int) -> _OpenShard:
        """Return an open shard from a cache with a bounded number of open files.

        A memory map holds a descriptor too: the index, and each feature set (tokens have two).
        """
        opened = self._cache.get(shard)
        if opened is None:
            file = self._files[shard]
            tables = {
                role: open_features(file.shard, name, file.header)
                for role, name in self._features.items()
            }
            while self._cache and len(self._cache) * (len(tables) + 3) >= _OPEN_FILES:
                self._cache.popitem(last=False)
            opened = self._cache[shard] = _OpenShard(file.load(), tables)
        else:
            self._cache.move_to_end(shard)
        return opened

    def _require_images(self) -> None:
        for file in self._files:
            missing = file.header.samples - file.header.images
            if missing:
                raise UserError(
                    f"{file.shard}: {missing} of {file.header.samples} samples have no picture; "
                    "prepare the shard from pictures, or use stored features"
                )

    def _audit_features(self) -> tuple[dict[str, int], list[str]]:
        """Open every feature set once: equal widths over the shards, levels that fit the roles."""
        dims: dict[str, int] = {}
        sums: list[str] = []
        for file in self._files:
            for role, name in sorted(self._features.items()):
                table = open_features(file.shard, name, file.header)
                if (table.level == "token") != (role == TOKENS):
                    raise UserError(
                        f"{table.path}: level {table.level} cannot serve as {role!r} features"
                    )
                if dims.setdefault(role, table.dim) != table.dim:
                    raise UserError(
                        f"{table.path}: width {table.dim}, but {dims[role]} in other shards; "
                        "compute these features again with one model"
                    )
                sums.append(f"{role} {table.manifest['values_sha256']}")
        return dims, sums


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _fingerprint(files: list[IndexFile], feature_sums: list[str]) -> str:
    lines = [f"{file.header.sha256} {file.header.items} {file.header.samples}" for file in files]
    return hashlib.sha256("\n".join(["source 1", *lines, *feature_sums]).encode()).hexdigest()


def _pad(rows: list[np.ndarray], dim: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max((len(row) for row in rows), default=0)
    tokens = np.zeros((len(rows), longest, dim), np.float32)
    mask = np.zeros((len(rows), longest), bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        mask[number, : len(row)] = True
    return tokens, mask


def _changed(opened: _OpenShard, sample: int, what: str) -> UserError:
    index = opened.index
    return UserError(
        f"{index.shard}: {what} of sample {index.key(sample)!r} differs from what was indexed; "
        "copy the shard again, then run dalr-scale index"
    )
