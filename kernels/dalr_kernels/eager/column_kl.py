"""Alignment divergence over columns: every image against the texts of all ranks.

`alignment_kl` takes softmaxes over a row. The other half of L_CMA takes them over a column, whose
elements lie on all ranks. Sending the texts to the images would move vectors both ways; merging
five numbers a column gives the same result. So each rank scores its rows against all columns,
the column statistics are merged, and a second sweep makes the gradient in the local rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dalr_kernels import validation as checks
from dalr_kernels.eager import chunked
from dalr_kernels.eager.closed_form import BufferPool, angular_margin
from dalr_kernels.similarity import Similarity, UnitSimilarity, unit

# Merges a tensor over ranks, element by element.
Merge = Callable[[Tensor], Tensor]


def column_alignment_kl(
    rows: Tensor,
    cols: Tensor,
    teacher: Similarity,
    *,
    student_temperature: float = 0.45,
    teacher_temperature: float = 0.5,
    margin: float = 0.0,
    temperature: float = 1.0,
    col_offset: int = 0,
    merge_max: Merge | None = None,
    merge_sum: Merge | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """``mean_j KL(softmax_i(teacher_ij / t_t) || softmax_i(A_ij / t_s))``, softmaxes over all rows.

    On one rank this is `alignment_kl` of the transposed problem, ``alignment_kl(cols, rows,
    teacher transposed)``, with `cols` constant.

    Args:
        rows: Local rows ``[R, D]``, differentiable.
        cols: Global columns ``[N, D]``, constant; columns ``col_offset .. col_offset + R - 1`` are
            this rank's own.
        teacher: Constant ``[R, N]``.
        student_temperature: Softmax temperature of the student, positive.
        teacher_temperature: Softmax temperature of the teacher, positive.
        margin: Angular margin of A in radians.
        temperature: Temperature inside A, positive.
        col_offset: Column of the positive of row 0.
        merge_max: Maximum over the ranks of a tensor; None on one rank.
        merge_sum: Sum over the ranks of a tensor; None on one rank.
        workspace_bytes: Temporary memory; default 256 MiB, on CUDA 1 GiB.

    Returns:
        The mean over this rank's *own columns*, a scalar. Its gradient in the rows is that of the
        sum over *all* columns divided by R: averaging values and gradients over ranks gives the
        mean over the global batch and its gradient.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    checks.rows_and_columns(rows, cols, col_offset)
    checks.positive("student_temperature", student_temperature)
    checks.positive("teacher_temperature", teacher_temperature)
    checks.positive("temperature", temperature)
    checks.margin_angle(margin)
    checks.similarity("teacher", teacher, rows, cols.shape[0])
    dtype = checks.compute_dtype(rows, cols)
    workspace = chunked.workspace_of(rows.device, None, workspace_bytes)
    with torch.autocast(rows.device.type, enabled=False):
        rows_RD, cols_ND = unit(rows.to(dtype)), unit(cols.detach().to(dtype))
        problem = _Problem(
            cols_ND, teacher.normalized(dtype), student_temperature * temperature,
            teacher_temperature, margin, col_offset,
            chunked.rows_per_chunk(rows, len(cols), dtype, workspace),
        )  # fmt: skip
        merges = merge_max or _identity, merge_sum or _identity
        return _ColumnKl.apply(rows_RD, problem, merges, chunked.wants_gradient(rows_RD))


def _identity(values: Tensor) -> Tensor:
    return values


class _Block(NamedTuple):
    """A block ``[r, N]``; its content may be overwritten.

    Attributes:
        rows: Which local rows.
        student: Student logits.
        teacher: Teacher logits.
        inner: Derivative of the cosines after the margin by those before, or None for 1.
        free: A matrix of the same shape with any content.
    """

    rows: slice
    student: Tensor
    teacher: Tensor
    inner: Tensor | None
    free: Tensor


@dataclass(frozen=True, eq=False)
class _Problem:
    cols_ND: Tensor
    teacher: UnitSimilarity
    student_temperature: float
    teacher_temperature: float
    margin: float
    col_offset: int
    chunk_rows: int

    def blocks(self, rows_RD: Tensor, *, grads: bool) -> Iterator[_Block]:
        """All rows, some at a time, in the same few matrices."""
        buffers = BufferPool(rows_RD, min(self.chunk_rows, len(rows_RD)), len(self.cols_ND))
        for start, stop in chunked.spans(len(rows_RD), self.chunk_rows):
            with buffers.borrow(5, stop - start) as (student, teacher, cosines, inner, rest):
                self.teacher.block(start, stop, teacher).mul_(1.0 / self.teacher_temperature)
                plain = self.margin == 0.0
                torch.mm(rows_RD[start:stop], self.cols_ND.T, out=student if plain else cosines)
                if not plain:
                    angular_margin(
                        cosines, self.col_offset + start, self.margin, None, False, student,
                        inner if grads else None, buffers,
                    )  # fmt: skip
                student.mul_(1.0 / self.student_temperature)
                grad = None if plain or not grads else inner
                yield _Block(slice(start, stop), student, teacher, grad, rest)


class _ColumnKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: chunked.Context,
        rows_RD: Tensor,
        problem: _Problem,
        merges: tuple[Merge, Merge],
        wanted: bool,
    ) -> Tensor:
        log_sums, divergence_N = _statistics(rows_RD, problem, *merges)
        own = slice(problem.col_offset, problem.col_offset + len(rows_RD))
        gradient = _gradient(rows_RD, problem, log_sums) if wanted else None
        ctx.save_for_backward(gradient)
        return divergence_N[own].mean()

    @staticmethod
    def backward(ctx: chunked.Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad_outputs[0], None, None, None


def _statistics(
    rows_RD: Tensor, problem: _Problem, merge_max: Merge, merge_sum: Merge
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of student and teacher ``[2, N]`` and the divergence of every column ``[N]``."""
    num_cols = len(problem.cols_ND)
    top_2N = rows_RD.new_full((2, num_cols), -torch.inf)
    sums_2N = rows_RD.new_zeros((2, num_cols))
    gap_N = rows_RD.new_zeros(num_cols)  # sum of exp(teacher) * (teacher - student)
    for block in problem.blocks(rows_RD, grads=False):
        student, teacher = block.student, block.teacher
        higher = torch.maximum(top_2N, torch.stack([student.amax(0), teacher.amax(0)]))
        decay = (top_2N - higher).exp()
        top_2N = higher
        gap = torch.sub(teacher, student, out=block.free)
        gap.mul_(teacher.sub_(top_2N[1]).exp_())
        gap_N = gap_N * decay[1] + gap.sum(0)
        exponentials = torch.stack([student.sub_(top_2N[0]).exp_().sum(0), teacher.sum(0)])
        sums_2N = sums_2N * decay + exponentials
    highest = merge_max(top_2N.clone())
    decay = (top_2N - highest).exp()
    merged = merge_sum(torch.cat([sums_2N * decay, (gap_N * decay[1]).unsqueeze(0)]))
    log_sums = merged[:2].log() + highest
    return log_sums, merged[2] / merged[1] - log_sums[1] + log_sums[0]


def _gradient(rows_RD: Tensor, problem: _Problem, log_sums: Tensor) -> Tensor:
    """Gradient by the rows of (sum over all columns / R): (p - q) through the margin."""
    gradient = torch.empty_like(rows_RD)
    for block in problem.blocks(rows_RD, grads=True):
        grad = block.student.sub_(log_sums[0]).exp_()
        grad.sub_(block.teacher.sub_(log_sums[1]).exp_())
        if block.inner is not None:
            grad.mul_(block.inner)
        torch.mm(grad, problem.cols_ND, out=gradient[block.rows])
    return gradient.mul_(1.0 / (problem.student_temperature * len(rows_RD)))
