"""What a fused call needs before its first kernel: operands, block sizes, kernel arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from triton.language import constexpr

from dalr_kernels.fused import tuning
from dalr_kernels.fused.arguments import Constants, Flags, Ids, Margin, PerSoftmax, PerTerm
from dalr_kernels.fused.operands import StudentVectors, Teacher, student, teachers
from dalr_kernels.fused.products import add_product

if TYPE_CHECKING:
    from dalr_kernels.fused.tuning import Layout, Limits, Matrices, Scalars, Sizes


class Inputs(NamedTuple):
    """Everything that a call reads, as it came in.

    Attributes:
        rows: ``[R, D]``, any floating type up to float32.
        cols: ``[N, D]``, likewise.
        matrices: Constant similarities.
        scalars: Values of the terms.
        layout: Which terms there are and what each reads.
        row_ids: int64 ``[R]``, or None.
        col_ids: int64 ``[N]``, or None.
        col_offset: Column of the positive of row 0.
        half: Whether float32 vectors are multiplied as float16.
    """

    rows: Tensor
    cols: Tensor
    matrices: Matrices
    scalars: Scalars
    layout: Layout
    row_ids: Tensor | None
    col_ids: Tensor | None
    col_offset: int
    half: bool


class UnitGradients(NamedTuple):
    """Sums of gradients by the unit vectors, float32; None where not wanted."""

    rows: Tensor | None
    cols: Tensor | None


class KernelArguments(NamedTuple):
    """Arguments that are the same in every launch of a call."""

    margin: Margin
    threshold: float
    factors: PerSoftmax[float]
    offsets: PerSoftmax[float]
    weights: PerTerm
    flags: Flags


class PreparedCall(NamedTuple):
    """Operands, kernel arguments and results of one call.

    Attributes:
        inputs: As they came in.
        student: Unit vectors of both sides.
        teachers: Unit vectors of the constant similarities.
        sizes: Mode and block.
        arguments: Of every kernel.
        losses: ``[3, R]`` float32, filled by the kernels.
        gradients: Filled by `add_gradients`.
    """

    inputs: Inputs
    student: StudentVectors
    teachers: list[Teacher]
    sizes: Sizes
    arguments: KernelArguments
    losses: Tensor
    gradients: UnitGradients

    @property
    def wants_gradient(self) -> bool:
        """Whether either side has a gradient."""
        return self.gradients.rows is not None or self.gradients.cols is not None

    def buffers(self) -> Tensor:
        """One block for the student and each teacher, ``[1 + M, rows, cols]``, uninitialized."""
        shape = 1 + len(self.teachers), self.sizes.rows, self.sizes.cols
        return torch.empty(shape, dtype=self.student.rows.dtype, device=self.losses.device)


def prepare(
    inputs: Inputs, limits: Limits, dtype: torch.dtype, want_rows: bool, want_cols: bool
) -> PreparedCall:
    """Normalize the operands to `dtype`, choose the block sizes, allocate the results."""
    rows, cols = inputs.rows, inputs.cols
    count = len(inputs.matrices.rounded)
    sizes = tuning.sizes(len(rows), len(cols), rows.shape[1], count, dtype.itemsize, limits)
    tuning.log_choice(sizes, len(rows), len(cols), rows.shape[1], dtype)
    vectors = student(rows, cols, dtype)
    gradients = UnitGradients(
        torch.zeros_like(vectors.rows, dtype=torch.float32) if want_rows else None,
        torch.zeros_like(vectors.cols, dtype=torch.float32) if want_cols else None,
    )
    return PreparedCall(
        inputs,
        vectors,
        teachers(inputs.matrices, dtype),
        sizes,
        kernel_arguments(inputs, dtype),
        rows.new_zeros(3, len(rows), dtype=torch.float32),
        gradients,
    )


def kernel_arguments(inputs: Inputs, dtype: torch.dtype) -> KernelArguments:
    """Arguments that all kernels share, for products in `dtype`."""
    s = inputs.scalars
    powers = tuning.exponents(s, inputs.layout, inputs.matrices)
    scale = tuning.gradient_scale(s, dtype.itemsize)
    pairs = powers.nce, powers.kl, powers.kl_teacher, powers.list_net, powers.list_net_teacher
    return KernelArguments(
        Margin(s.margin, math.cos(s.margin), math.sin(s.margin)),
        s.threshold,
        PerSoftmax(*(factor for factor, _ in pairs)),
        PerSoftmax(*(offset for _, offset in pairs)),
        PerTerm(
            s.nce_weight / s.nce_temperature * scale,
            s.kl_weight / s.kl_temperature * scale,
            s.list_net_weight / s.list_net_temperature * scale,
        ),
        kernel_flags(inputs, powers.online),
    )


def kernel_flags(inputs: Inputs, online: bool) -> Flags:
    """Compile-time arguments that all kernels share."""
    has = inputs.layout
    return Flags(
        nce=constexpr(bool(has.nce)),
        kl=constexpr(bool(has.kl)),
        list_net=constexpr(bool(has.list_net)),
        nce_shift=constexpr(has.nce_shift),
        kl_shift=constexpr(has.kl_shift),
        list_net_shift=constexpr(has.list_net_shift),
        clamp=constexpr(bool(has.clamp)),
        polynomial=constexpr(tuning.polynomial(inputs.scalars, has, inputs.matrices)),
        ids=constexpr(inputs.row_ids is not None),
        mask=constexpr(has.mask_matrix >= 0),
        one_teacher=constexpr(
            bool(has.kl and has.list_net) and has.kl_matrix == has.list_net_matrix
        ),
        teacher_labels=constexpr(bool(has.kl) and has.label_matrix == has.kl_matrix),
        online=constexpr(online),
    )


def constants_of(layout: Layout, buffers: Tensor) -> Constants:
    """The buffer that each term reads; the student's where a term is absent."""
    wanted = (layout.kl_matrix, layout.list_net_matrix, layout.label_matrix, layout.mask_matrix)
    return Constants(*(buffers[1 + max(index, -1)] for index in wanted))


def ids_of(inputs: Inputs, rows: slice) -> Ids:
    """Image ids of some rows and all columns, or any tensors where there are none."""
    if inputs.row_ids is None or inputs.col_ids is None:
        return Ids(inputs.rows[rows], inputs.cols)
    return Ids(inputs.row_ids[rows], inputs.col_ids)


def add_gradients(call: PreparedCall, grads: Tensor, rows: slice, cols: slice) -> None:
    """Add the products of a block of derivatives with both sides."""
    if call.gradients.rows is not None:
        add_product(call.gradients.rows[rows], grads, call.student.cols[cols])
    if call.gradients.cols is not None:
        add_product(call.gradients.cols[cols], grads.T, call.student.rows[rows])
