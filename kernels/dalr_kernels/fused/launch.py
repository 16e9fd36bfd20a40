"""The passes themselves: products, kernels and gradients of one call, without autograd."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalr_kernels.eager.chunked import spans
from dalr_kernels.fused import tuning as plan
from dalr_kernels.fused.operands import Student, Teacher, student, teachers
from dalr_kernels.fused.products import add_product, full_sums, scores
from dalr_kernels.fused.rows import row_kernel
from dalr_kernels.fused.tuning import Layout, Limits, Matrices, Scalars, Sizes
from dalr_kernels.fused.units import through_units


class Inputs(NamedTuple):
    """Everything that a pass reads, as it came in."""

    rows: Tensor
    cols: Tensor
    matrices: Matrices
    scalars: Scalars
    layout: Layout
    row_ids: Tensor | None
    col_ids: Tensor | None
    col_offset: int
    half: bool


class Gradients(NamedTuple):
    """Sums of slopes by the unit vectors, float32; None where not wanted."""

    rows: Tensor | None
    cols: Tensor | None


class Pass(NamedTuple):
    """A prepared call: operands, kernel arguments, results."""

    inputs: Inputs
    student: Student
    teachers: list[Teacher]
    sizes: Sizes
    values: dict[str, float]
    switches: dict[str, Any]
    losses: Tensor
    gradients: Gradients


def run(
    inputs: Inputs, limits: Limits, want_rows: bool, want_cols: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, mean of each term ``[3]``, and the gradients by rows and columns (empty if not)."""
    from dalr_kernels.fused import stream  # which needs `Pass`

    rows, cols = inputs.rows, inputs.cols
    dtype = operand_dtype(rows, cols, inputs.half)
    with full_sums(rows.device):
        task = prepare(inputs, limits, dtype, want_rows, want_cols)
        if task.sizes.mode == "workspace":
            whole_rows(task)
        else:
            stream.blocks(task)
    components = task.losses.double().mean(dim=1)
    weights = [inputs.scalars.nce_weight, inputs.scalars.kl_weight, inputs.scalars.net_weight]
    total = sum(weight * components[k] for k, weight in enumerate(weights))
    assert isinstance(total, Tensor)
    factor = 1.0 / (len(rows) * plan.gradient_scale(inputs.scalars, dtype.itemsize))
    pairs = (
        (rows, task.student.row_norms, task.gradients.rows),
        (cols, task.student.col_norms, task.gradients.cols),
    )
    grads = [
        vectors.new_empty(0, dtype=torch.float32)
        if grad is None
        else through_units(vectors, norms, grad, factor)
        for vectors, norms, grad in pairs
    ]
    return total.float(), components.float(), grads[0], grads[1]


def operand_dtype(rows: Tensor, cols: Tensor, half: bool) -> torch.dtype:
    """float16 for 16-bit towers or where the caller wants it, else float32.

    Unit vectors fit float16, whose 11 bits make cosines eight times more accurate than bfloat16.
    """
    wide = rows.dtype == torch.float32 or cols.dtype == torch.float32
    return torch.float32 if wide and not half else torch.float16


def prepare(
    inputs: Inputs, limits: Limits, dtype: torch.dtype, want_rows: bool, want_cols: bool
) -> Pass:
    """Normalise the operands, choose the block sizes, allocate the results."""
    rows, cols = inputs.rows, inputs.cols
    count = len(inputs.matrices.rounded)
    sizes = plan.sizes(len(rows), len(cols), rows.shape[1], count, dtype.itemsize, limits)
    plan.log_choice(sizes, len(rows), len(cols), rows.shape[1], dtype)
    sides = student(rows, cols, dtype)
    gradients = Gradients(
        torch.zeros_like(sides.rows, dtype=torch.float32) if want_rows else None,
        torch.zeros_like(sides.cols, dtype=torch.float32) if want_cols else None,
    )
    return Pass(
        inputs,
        sides,
        teachers(inputs.matrices, dtype),
        sizes,
        kernel_values(inputs, dtype),
        kernel_switches(inputs),
        rows.new_zeros(3, len(rows), dtype=torch.float32),
        gradients,
    )


def kernel_values(inputs: Inputs, dtype: torch.dtype) -> dict[str, float]:
    """Scalar arguments common to all kernels, by the names of their parameters."""
    s = inputs.scalars
    powers = plan.exponents(s, inputs.layout, inputs.matrices)
    scale = plan.gradient_scale(s, dtype.itemsize)
    return {
        "margin": s.margin,
        "cos_margin": math.cos(s.margin),
        "sin_margin": math.sin(s.margin),
        "threshold": s.threshold,
        "nce_factor": powers.nce[0],
        "nce_offset": powers.nce[1],
        "kl_factor": powers.kl[0],
        "kl_offset": powers.kl[1],
        "klt_factor": powers.kl_teacher[0],
        "klt_offset": powers.kl_teacher[1],
        "net_factor": powers.net[0],
        "net_offset": powers.net[1],
        "nett_factor": powers.net_teacher[0],
        "nett_offset": powers.net_teacher[1],
        "nce_weight": s.nce_weight / s.nce_temperature * scale,
        "kl_weight": s.kl_weight / s.kl_temperature * scale,
        "net_weight": s.net_weight / s.net_temperature * scale,
    }


def kernel_switches(inputs: Inputs) -> dict[str, Any]:
    """Compile-time arguments common to all kernels."""
    has = inputs.layout
    return {
        "NCE": bool(has.nce),
        "KL": bool(has.kl),
        "NET": bool(has.net),
        "NCE_SHIFT": has.nce_shift,
        "KL_SHIFT": has.kl_shift,
        "NET_SHIFT": has.net_shift,
        "CLAMP": bool(has.clamp),
        "POLYNOMIAL": plan.polynomial(inputs.scalars, has, inputs.matrices),
        "IDS": inputs.row_ids is not None,
        "MASK": has.mask_matrix >= 0,
        "ONE_TEACHER": bool(has.kl and has.net) and has.kl_matrix == has.net_matrix,
        "TAUGHT_LABELS": bool(has.kl) and has.label_matrix == has.kl_matrix,
        "ONLINE": plan.exponents(inputs.scalars, has, inputs.matrices).online,
    }


def whole_rows(task: Pass) -> None:
    """Mode "workspace": a chunk of rows at a time, every product and matrix once."""
    inputs, sizes = task.inputs, task.sizes
    num_rows, num_cols = len(inputs.rows), len(inputs.cols)
    everything = slice(None)
    shape = 1 + len(task.teachers), sizes.rows, sizes.cols
    buffers = torch.empty(shape, dtype=task.student.rows.dtype, device=inputs.rows.device)
    cosines, constants = buffers[0], buffers[1:]
    want = task.gradients.rows is not None or task.gradients.cols is not None
    kernel: Any = row_kernel
    for start, stop in spans(num_rows, sizes.rows):
        rows = slice(start, stop)
        part = cosines[: stop - start]
        scores(task.student.rows[rows], task.student.cols, part)
        for teacher, out in zip(task.teachers, constants, strict=True):
            teacher.block(rows, everything, out[: stop - start])
        kernel[(stop - start,)](
            part, *read_by_terms(inputs.layout, cosines, constants), part, task.losses,
            *ids_of(inputs), num_rows, num_cols, sizes.cols, sizes.cols,
            start, inputs.col_offset + start,
            **task.values, **task.switches, GRADIENT=want,
            **row_launch(sizes.cols),
        )  # fmt: skip
        if want:
            add_gradients(task, part, rows, everything)


def row_launch(num_cols: int) -> dict[str, int]:
    """Columns per step and warps of the row kernel."""
    size = 128
    while size < 2048 and size < num_cols:
        size *= 2
    return {"BLOCK": size, "num_warps": max(1, min(8, size // 256))}


def read_by_terms(layout: Layout, cosines: Tensor, constants: Tensor) -> list[Tensor]:
    """Matrices for the KL teacher, ListNet teacher, labels, mask; any where a term is absent."""
    wanted = (layout.kl_matrix, layout.net_matrix, layout.label_matrix, layout.mask_matrix)
    return [cosines if index < 0 else constants[index] for index in wanted]


def ids_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Image ids, or any tensors where there are none."""
    if inputs.row_ids is None or inputs.col_ids is None:
        return inputs.rows, inputs.cols
    return inputs.row_ids, inputs.col_ids


def add_gradients(task: Pass, slopes: Tensor, rows: slice, cols: slice) -> None:
    """Add the products of a block of slopes with both sides."""
    if task.gradients.rows is not None:
        add_product(task.gradients.rows[rows], slopes, task.student.cols[cols])
    if task.gradients.cols is not None:
        add_product(task.gradients.cols[cols], slopes.T, task.student.rows[rows])
