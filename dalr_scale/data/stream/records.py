"""The rows of one read of a source, filled shard by shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dalr_scale.data.shards.arrays import RaggedRows, places
from dalr_scale.data.shards.token_id_store import NO_SPECIAL_TOKENS, SpecialTokens, pad_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOKENS = "tokens"  # the role whose features are one vector per token


@dataclass
class Records:
    """What was read for n items.

    Attributes:
        sentences: n captions or sentences; empty when they were not requested.
        image_ids: int64 [n]; number of the item's sample over the whole source, -1 without image.
        features: by role, float32 [n, dim].
        images: n encoded images; None unless the source reads images.
        token_features: float32 [n, T, dim], zero-padded to the longest row, and their bool mask
            [n, T]; None unless the source has the role ``tokens``.
        token_ids: stored token ids and their mask, int64 [n, L]; None unless the source has them.
        faults: position -> what is wrong with that row; its values above must not be used.
        token_feature_parts, token_id_parts: rows as the shards have them, before ``pad``.
        special: special tokens around every row of token ids.
    """

    sentences: list[str]
    image_ids: np.ndarray
    features: dict[str, np.ndarray]
    images: list[bytes] | None
    token_features: tuple[np.ndarray, np.ndarray] | None = None
    token_ids: tuple[np.ndarray, np.ndarray] | None = None
    faults: dict[int, str] = field(default_factory=dict)
    token_feature_parts: list[RaggedRows] = field(default_factory=list, repr=False)
    token_id_parts: list[RaggedRows] = field(default_factory=list, repr=False)
    special: SpecialTokens = NO_SPECIAL_TOKENS

    @classmethod
    def empty(cls, count: int, dims: Mapping[str, int], *, text: bool, images: bool) -> Records:
        """Return records of ``count`` rows that have not been read yet.

        Args:
            count: number of rows.
            dims: width of the features by role.
            text: whether sentences will be read.
            images: whether images will be read.
        """
        vectors = {
            role: np.empty((count, dim), np.float32) for role, dim in dims.items() if role != TOKENS
        }
        sentences = [""] * count if text else []
        return cls(
            sentences, np.full(count, -1, np.int64), vectors, [b""] * count if images else None
        )

    def note(self, where: np.ndarray, faults: Mapping[int, str]) -> None:
        """Add faults given by position within ``where``; the first fault of a row is kept."""
        for position, fault in faults.items():
            self.faults.setdefault(int(where[position]), fault)

    def pad(self, token_dim: int | None, pad_id: int | None) -> Records:
        """Lay the rows of token features and token ids out as matrices.

        Args:
            token_dim: width of the token features; None where there are none.
            pad_id: padding id of the stored token ids; None where there are none.
        """
        count = len(self.image_ids)
        if token_dim is not None:
            self.token_features = _pad_features(self.token_feature_parts, count, token_dim)
        if pad_id is not None:
            self.token_ids = pad_ids(self.token_id_parts, count, self.special, pad_id)
        self.token_feature_parts, self.token_id_parts = [], []
        return self


def _pad_features(
    parts: Sequence[RaggedRows], count: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return token features [n, T, dim] and their mask [n, T], T being the longest row."""
    longest = max((int(part.lengths.max()) for part in parts if len(part.lengths)), default=0)
    features = np.zeros((count, longest, dim), np.float32)
    lengths_of_rows = np.zeros(count, np.int64)
    for rows, values, lengths in parts:
        features[np.repeat(rows, lengths), places(lengths)] = values
        lengths_of_rows[rows] = lengths
    return features, np.arange(longest) < lengths_of_rows[:, None]
