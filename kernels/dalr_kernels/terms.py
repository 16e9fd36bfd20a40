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

from dalr_kernels import reference
from dalr_kernels import validation as checks
from dalr_kernels.eager import closed_form
from dalr_kernels.eager.closed_form import Block, GradientSink, Shift
from dalr_kernels.similarity import Similarity

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

    def shift(self) -> Shift:
        """The margin that is applied to the cosines before the term sees them."""
        if self.margin > 0.0 and self.soft_labels is not None:
            return Shift(self.margin, self.soft_labels, self.clamp_soft_labels)
        return Shift(self.margin)

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

    def closed_losses(self, student: Tensor, block: Block, gradient_sink: GradientSink) -> Tensor:
        """The losses of a block in closed form; ``[r]``.

        Args:
            student: Cosines after the margin ``[r, N]``.
            block: Where the rows lie, and their constants.
            sink: Takes their derivative by `student`.
        """
        with block.buffers.borrow(1, len(student)) as (excluded,):
            masked = self.row_ids is not None or self.mask_above is not None
            if masked:
                self._mark_excluded(excluded, block)
            return closed_form.info_nce(
                student,
                block.first_column,
                self.temperature,
                excluded if masked else None,
                gradient_sink,
                block.buffers,
            )

    def _mark_excluded(self, excluded: Tensor, block: Block) -> None:
        excluded.zero_()
        if self.row_ids is not None and self.col_ids is not None:
            rows, cols = block.labels(self.row_ids, self.col_ids)
            torch.eq(rows[block.start : block.stop, None], cols, out=excluded)
        if self.mask_above is not None:
            similarity, threshold = self.mask_above
            with block.buffers.borrow(1, len(excluded)) as (above,):
                excluded += torch.gt(block.constant(similarity), threshold, out=above)
        excluded.diagonal(block.first_column).zero_()

    def _excluded(
        self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks
    ) -> Tensor | None:
        if self.row_ids is None and self.mask_above is None:
            return None
        stop, own = start + cosines.shape[0], col_offset + start
        part = None if self.row_ids is None else self.row_ids[start:stop]
        excluded = reference.excluded_elements(
            cosines.shape[0], cosines.shape[1], own, part, self.col_ids, cosines.device, own=False
        )
        if self.mask_above is not None:
            excluded |= blocks(self.mask_above[0], start, stop) > self.mask_above[1]
            excluded.diagonal(own).fill_(False)
        return excluded


class _WithTeacher:
    """Common part of the terms with a teacher, their own or the one given to `row_losses`."""

    margin: float
    teacher: Similarity | None

    def shift(self) -> Shift:
        """The margin that is applied to the cosines before the term sees them."""
        return Shift(self.margin)

    def similarities(self) -> list[Similarity]:
        """Constant matrices that the term reads."""
        return [] if self.teacher is None else [self.teacher]

    def losses(self, cosines: Tensor, start: int, col_offset: int, blocks: Blocks) -> Tensor:
        """One loss per row of a block that starts at row `start`; ``[r]``."""
        assert self.teacher is not None
        teacher = blocks(self.teacher, start, start + cosines.shape[0])
        return self._definition(cosines, col_offset + start, teacher)

    def _definition(self, cosines: Tensor, first_column: int, teacher: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class AlignmentKL(_WithTeacher):
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

    def _definition(self, cosines: Tensor, first_column: int, teacher: Tensor) -> Tensor:
        return reference.alignment_kl_rows(
            cosines,
            first_column,
            teacher,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            margin=self.margin,
            temperature=self.temperature,
        )

    def closed_losses(self, student: Tensor, block: Block, gradient_sink: GradientSink) -> Tensor:
        """See `InfoNCE.closed_losses`."""
        assert self.teacher is not None
        return closed_form.alignment_kl(
            student,
            block.constant(self.teacher),
            self.temperature * self.student_temperature,
            self.teacher_temperature,
            gradient_sink,
            block.buffers,
        )


@dataclass(frozen=True, eq=False)
class ListNet(_WithTeacher):
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

    def _definition(self, cosines: Tensor, first_column: int, teacher: Tensor) -> Tensor:
        return reference.list_net_rows(
            cosines,
            first_column,
            teacher,
            teacher_temperature=self.teacher_temperature,
            temperature=self.temperature,
            margin=self.margin,
        )

    def closed_losses(self, student: Tensor, block: Block, gradient_sink: GradientSink) -> Tensor:
        """See `InfoNCE.closed_losses`."""
        assert self.teacher is not None
        return closed_form.list_net(
            student,
            block.first_column,
            block.constant(self.teacher),
            self.temperature,
            self.teacher_temperature,
            gradient_sink,
            block.buffers,
        )


@dataclass(frozen=True, eq=False)
class ListMLE(_WithTeacher):
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

    def _definition(self, cosines: Tensor, first_column: int, teacher: Tensor) -> Tensor:
        return reference.list_mle_rows(
            cosines,
            first_column,
            teacher,
            temperature=self.temperature,
            margin=self.margin,
            mean=self.reduction == "mean",
            eps=self.eps,
        )

    def closed_losses(self, student: Tensor, block: Block, gradient_sink: GradientSink) -> Tensor:
        """See `InfoNCE.closed_losses`."""
        assert self.teacher is not None
        share = 1.0 / student.shape[1] if self.reduction == "mean" else 1.0
        return closed_form.list_mle(
            student,
            block.constant(self.teacher),
            self.temperature,
            self.eps,
            share,
            gradient_sink,
            block.buffers,
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
    info_nce: Tensor | None = None
    alignment_kl: Tensor | None = None
    list_net: Tensor | None = None
    list_mle: Tensor | None = None


def constant_blocks(similarities: list[Similarity], dtype: torch.dtype) -> Blocks:
    """Blocks of similarities that are normalized once."""
    units = {id(s): s.normalized(dtype) for s in similarities}
    return lambda similarity, start, stop: units[id(similarity)].block(start, stop)
