"""The row losses as data: what `row_losses` adds up on one student matrix.

Each term knows its arguments' checks and its dense definition on a block of cosines. The names of
the fields are those of the single functions in ``losses.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, chunked, reference
from .similarity import Similarity

# A constant similarity and a span of rows to its block [stop - start, N].
Blocks = Callable[[Similarity, int, int], Tensor]


@dataclass(frozen=True, eq=False)
class InfoNCE:
    """Arguments of `dalr_kernels.info_nce`, and the term's weight in the total."""

    temperature: float
    margin: float = 0.0
    weight: float = 1.0
    soft_labels: Similarity | None = None
    clamp_soft_labels: bool = False
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    mask_above: tuple[Similarity, float] | None = None

    def check(self, rows: Tensor, cols: Tensor) -> None:
        """Refuse arguments that do not fit; see `dalr_kernels.info_nce`."""
        dtype = checks.compute_dtype(rows, cols)
        checks.temperatures(dtype, temperature=self.temperature)
        checks.margin_angle(self.margin)
        checks.weight(self.weight)
        checks.similarity("soft_labels", self.soft_labels, rows, cols.shape[0])
        if self.mask_above is not None:
            checks.similarity("mask_above", self.mask_above[0], rows, cols.shape[0])
        checks.ids(self.row_ids, self.col_ids, rows, cols.shape[0])

    def similarities(self) -> list[Similarity]:
        """Constant matrices that the term reads."""
        found = []
        if self.soft_labels is not None and self.margin > 0.0:
            found.append(self.soft_labels)
        if self.mask_above is not None:
            found.append(self.mask_above[0])
        return found

    def losses(self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks) -> Tensor:
        """One loss per row of a block that starts at row `start`; ``[r]``."""
        stop = start + cosines.shape[0]
        soft = None
        if self.soft_labels is not None and self.margin > 0.0:
            soft = blocks(self.soft_labels, start, stop)
            soft = soft.clamp(0.0, 1.0) if self.clamp_soft_labels else soft
        return reference.info_nce_rows(
            cosines,
            col_offset + start,
            temperature=self.temperature,
            margin=self.margin,
            soft_RN=soft,
            excluded_RN=self._excluded(cosines, start, col_offset, blocks),
        )

    def _excluded(
        self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks
    ) -> Tensor | None:
        if self.row_ids is None and self.mask_above is None:
            return None
        stop, own = start + cosines.shape[0], col_offset + start
        part = None if self.row_ids is None else self.row_ids[start:stop]
        excluded = chunked.excluded_cells(
            cosines.shape[0], cosines.shape[1], own, part, self.col_ids, cosines.device, own=False
        )
        if self.mask_above is not None:
            excluded |= blocks(self.mask_above[0], start, stop) > self.mask_above[1]
            excluded.diagonal(own).fill_(False)
        return excluded


@dataclass(frozen=True, eq=False)
class AlignmentKL:
    """Arguments of `dalr_kernels.alignment_kl`; without `teacher` the shared one is used."""

    student_temperature: float = 0.45
    teacher_temperature: float = 0.5
    margin: float = 0.0
    temperature: float = 1.0
    weight: float = 1.0
    teacher: Similarity | None = None

    def check(self, rows: Tensor, cols: Tensor) -> None:
        """Refuse arguments that do not fit; see `dalr_kernels.alignment_kl`."""
        dtype = checks.compute_dtype(rows, cols)
        checks.temperatures(
            dtype,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            temperature=self.temperature,
        )
        product = self.temperature * self.student_temperature
        checks.temperatures(dtype, **{"temperature * student_temperature": product})
        checks.margin_angle(self.margin)
        checks.weight(self.weight)
        checks.teacher(self.teacher, rows, cols.shape[0])

    def similarities(self) -> list[Similarity]:
        """Constant matrices that the term reads."""
        return [] if self.teacher is None else [self.teacher]

    def losses(self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks) -> Tensor:
        """One loss per row of a block that starts at row `start`; ``[r]``."""
        assert self.teacher is not None
        return reference.alignment_kl_rows(
            cosines,
            col_offset + start,
            blocks(self.teacher, start, start + cosines.shape[0]),
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            margin=self.margin,
            temperature=self.temperature,
        )


@dataclass(frozen=True, eq=False)
class ListNet:
    """Arguments of `dalr_kernels.list_net`; without `teacher` the shared one is used."""

    temperature: float
    teacher_temperature: float
    margin: float = 0.0
    weight: float = 1.0
    teacher: Similarity | None = None

    def check(self, rows: Tensor, cols: Tensor) -> None:
        """Refuse arguments that do not fit; see `dalr_kernels.list_net`."""
        checks.temperatures(
            checks.compute_dtype(rows, cols),
            teacher_temperature=self.teacher_temperature,
            temperature=self.temperature,
        )
        checks.margin_angle(self.margin)
        checks.weight(self.weight)
        checks.teacher(self.teacher, rows, cols.shape[0])

    def similarities(self) -> list[Similarity]:
        """Constant matrices that the term reads."""
        return [] if self.teacher is None else [self.teacher]

    def losses(self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks) -> Tensor:
        """One loss per row of a block that starts at row `start`; ``[r]``."""
        assert self.teacher is not None
        return reference.list_net_rows(
            cosines,
            col_offset + start,
            blocks(self.teacher, start, start + cosines.shape[0]),
            teacher_temperature=self.teacher_temperature,
            temperature=self.temperature,
            margin=self.margin,
        )


@dataclass(frozen=True, eq=False)
class ListMLE:
    """Arguments of `dalr_kernels.list_mle`; without `teacher` the shared one is used."""

    temperature: float
    margin: float = 0.0
    reduction: str = "mean"
    eps: float = 0.0
    weight: float = 1.0
    teacher: Similarity | None = None

    def check(self, rows: Tensor, cols: Tensor) -> None:
        """Refuse arguments that do not fit; see `dalr_kernels.list_mle`."""
        checks.temperatures(checks.compute_dtype(rows, cols), temperature=self.temperature)
        checks.margin_angle(self.margin)
        checks.weight(self.weight)
        checks.teacher(self.teacher, rows, cols.shape[0])
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")
        if not self.eps >= 0.0:
            raise ValueError(f"eps must not be negative, got {self.eps}")

    def similarities(self) -> list[Similarity]:
        """Constant matrices that the term reads."""
        return [] if self.teacher is None else [self.teacher]

    def losses(self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks) -> Tensor:
        """One loss per row of a block that starts at row `start`; ``[r]``."""
        assert self.teacher is not None
        return reference.list_mle_rows(
            cosines,
            col_offset + start,
            blocks(self.teacher, start, start + cosines.shape[0]),
            temperature=self.temperature,
            margin=self.margin,
            mean=self.reduction == "mean",
            eps=self.eps,
        )


Term = InfoNCE | AlignmentKL | ListNet | ListMLE


class RowLosses(NamedTuple):
    """What `row_losses` returns; components are detached and unweighted, None where not asked.

    Attributes:
        total: Weighted sum of the terms, the differentiable result.
        info_nce: Mean of the term over the rows, for logging; likewise the others.
        alignment_kl: See `info_nce`.
        list_net: See `info_nce`.
        list_mle: See `info_nce`.
    """

    total: Tensor
    info_nce: Tensor | None
    alignment_kl: Tensor | None
    list_net: Tensor | None
    list_mle: Tensor | None


def block_cache(
    similarities: list[Similarity], dtype: torch.dtype
) -> tuple[Blocks, Callable[[], None]]:
    """Blocks of normalised similarities, each made once per span, and a way to forget them."""
    units = {id(s): s.normalised(dtype) for s in similarities}
    kept: dict[tuple[int, int, int], Tensor] = {}

    def block(similarity: Similarity, start: int, stop: int) -> Tensor:
        key = id(similarity), start, stop
        if key not in kept:
            kept[key] = units[id(similarity)].block(start, stop)
        return kept[key]

    return block, kept.clear
