"""One open shard: reads rows of its items into the records of a batch."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from dalr_scale.data.shards.arrays import OpenFile, RaggedRows
from dalr_scale.data.shards.files import read_exactly
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dalr_scale.data.shards.features_store import FeatureTable
    from dalr_scale.data.shards.index_file import IndexRows
    from dalr_scale.data.shards.token_id_store import TokenIdTable
    from dalr_scale.data.stream.records import Records

_IMAGE_ROLES = ("image", "caption")


class OpenShard:
    """A shard with its index, feature sets and token ids; their files close with the object.

    Attributes:
        index: rows of the shard's index.
        features: feature set by role.
        ids: stored token ids, or None.
        first_sample: number of the shard's first sample within the source.
    """

    def __init__(
        self,
        index: IndexRows,
        features: dict[str, FeatureTable],
        ids: TokenIdTable | None,
        first_sample: int,
    ) -> None:
        """Open the shard's own file.

        Raises:
            UserError: the shard is missing, or has changed since it was indexed.
        """
        self.index = index
        self.features = features
        self.ids = ids
        self.first_sample = first_sample
        self.file = OpenFile(index.shard)
        if self.file.size != index.header.shard_size:
            raise UserError(f"{index.shard}: changed since it was indexed; start again")

    def read_into(
        self, records: Records, where: np.ndarray, local: np.ndarray, max_length: int
    ) -> None:
        """Read some items into their rows of ``records``.

        Args:
            records: the records to fill.
            where: int64 [n], rows of ``records``.
            local: int64 [n], numbers of the items within this shard.
            max_length: token ids kept of an item, special tokens included.
        """
        rows = self.index.items.rows(local)
        samples = rows["sample"].astype(np.int64)
        records.image_ids[where] = self._image_ids(samples)
        if records.sentences:
            self._read_sentences(records, where, rows)
        if records.images is not None:
            self._read_images(records.images, records.faults, where, samples)
        for role, table in self.features.items():
            found = table.read(samples if table.level == "sample" else local)
            if found.lengths is not None:
                part = RaggedRows(where, found.values, found.lengths)
                records.token_feature_parts.append(part)
            else:
                records.features[role][where] = found.values
            records.note(where, self._with_keys(samples, found.faults))
        if self.ids is not None:
            ids = self.ids.read(local, max_length)
            records.token_id_parts.append(RaggedRows(where, ids.values, ids.lengths))
            records.special = self.ids.special
            records.note(where, self._with_keys(samples, ids.faults))

    def images(self, samples: np.ndarray) -> Iterator[bytes | None]:
        """Yield the encoded images of samples; None for one that differs from what was indexed."""
        rows = self.index.samples.rows(samples)[["image", "image_size", "image_crc32"]]
        for offset, size, crc in rows.tolist():
            data = read_exactly(self.file.descriptor, size, offset)
            yield data if zlib.crc32(data) == crc else None

    def changed(self, sample: int, what: str) -> str:
        """Return the message that ``what`` of a sample differs from what was indexed."""
        return (
            f"{self.index.shard}: {what} of sample {self.index.key(sample)!r} differs from what "
            "was indexed; copy the shard again, then run dalr-scale index"
        )

    def _image_ids(self, samples: np.ndarray) -> np.ndarray:
        ids = samples + self.first_sample
        if any(role in self.features for role in _IMAGE_ROLES):
            return ids
        if not self.index.header.images:
            return np.full_like(ids, -1)
        return np.where(self.index.samples.rows(samples)["image_size"] > 0, ids, -1)

    def _read_sentences(self, records: Records, where: np.ndarray, rows: np.ndarray) -> None:
        for at, (offset, size, crc, sample, line) in zip(
            where.tolist(), rows.tolist(), strict=True
        ):
            data = read_exactly(self.file.descriptor, size, offset)
            if zlib.crc32(data) == crc:
                records.sentences[at] = data.decode("utf-8")
            else:
                records.faults.setdefault(at, self.changed(sample, f"line {line + 1}"))

    def _read_images(
        self, images: list[bytes], faults: dict[int, str], where: np.ndarray, samples: np.ndarray
    ) -> None:
        found = zip(where.tolist(), samples.tolist(), self.images(samples), strict=True)
        for at, sample, data in found:
            if data is None:
                faults.setdefault(at, self.changed(sample, "the image"))
            else:
                images[at] = data

    def _with_keys(self, samples: np.ndarray, faults: Mapping[int, str]) -> dict[int, str]:
        """Add the sample's key to faults of features and token ids, which know numbers only."""
        return {
            position: f"{why} (sample {self.index.key(int(samples[position]))!r})"
            for position, why in faults.items()
        }
