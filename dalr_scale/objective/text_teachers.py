"""The similarities of the sentence teachers: S_TT and the ranking list R."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from dalr_kernels import Similarity
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dalr_scale.config.schema import TextTeacherConfig
    from dalr_scale.objective.views import LossBatch

# The keys that a term with a sentence teacher reads (`Term.settings`): here, or where features are
# loaded.
TEACHER_KEYS = ("teacher_mix", "teacher_similarity_dtype", "teacher_tokenizer")


def text_similarity(objective: TextTeacherConfig, batch: LossBatch) -> Similarity:
    """S_TT: the cosine of the mixed features, or the mix of the cosines."""
    if objective.teacher_mix == "features" and len(batch.rows.text) > 1:
        return batch.once("S_TT", lambda: _of_mixed_features(objective, batch))
    return rank_similarity(objective, batch)


def rank_similarity(objective: TextTeacherConfig, batch: LossBatch) -> Similarity:
    """R before its temperature: always the mix of the teachers' cosines."""
    return batch.once("R", lambda: _mix_of_cosines(objective, batch))


def widened(features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features as they are summed: in float32 at least, in float64 where they or `dtype` are."""
    double = torch.float64 in (features.dtype, dtype)
    return features.double() if double else features.float()


def _of_mixed_features(objective: TextTeacherConfig, batch: LossBatch) -> Similarity:
    dtype = getattr(torch, objective.teacher_similarity_dtype)
    rows, cols = (
        _weighted_sum(batch.text_weights, [widened(features, dtype) for features in side.text])
        for side in (batch.rows, batch.cols)
    )
    return Similarity(((1.0, rows, cols),), dtype)


def _mix_of_cosines(objective: TextTeacherConfig, batch: LossBatch) -> Similarity:
    factors = tuple(zip(batch.text_weights, batch.rows.text, batch.cols.text, strict=True))
    return Similarity(factors, getattr(torch, objective.teacher_similarity_dtype))


def _weighted_sum(weights: Sequence[float], features: Sequence[Tensor]) -> Tensor:
    first, *others = [w * e for w, e in zip(weights, features, strict=True)]
    return sum(others, start=first)
