"""One fused call without autograd: prepares it, runs it in its mode, finishes the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalr_kernels.fused import stream, tuning, workspace
from dalr_kernels.fused.call import Inputs, PreparedCall, prepare
from dalr_kernels.fused.normalize_kernels import normalize_backward
from dalr_kernels.fused.products import full_sums

if TYPE_CHECKING:
    from dalr_kernels.fused.tuning import Limits


def run(
    inputs: Inputs, limits: Limits, want_rows: bool, want_cols: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients of one call.

    Args:
        inputs: Vectors, terms and constants.
        limits: Workspace and mode.
        want_rows: Whether the rows get a gradient.
        want_cols: Whether the columns get one.

    Returns:
        The total, the mean of each term ``[3]``, and the total's gradients by rows ``[R, D]`` and
        columns ``[N, D]`` (empty if not wanted); all float32.
    """
    rows, cols = inputs.rows, inputs.cols
    dtype = operand_dtype(rows, cols, inputs.half)
    with full_sums(rows.device):
        call = prepare(inputs, limits, dtype, want_rows, want_cols)
        if call.sizes.mode == "workspace":
            workspace.run(call)
        else:
            stream.run(call)
    components = call.losses.double().mean(dim=1)
    s = inputs.scalars
    weights = (s.nce_weight, s.kl_weight, s.list_net_weight)
    total = sum(weight * components[k] for k, weight in enumerate(weights))
    assert isinstance(total, Tensor)
    grad_rows, grad_cols = input_gradients(inputs, call, dtype)
    return total.float(), components.float(), grad_rows, grad_cols


def operand_dtype(rows: Tensor, cols: Tensor, half: bool) -> torch.dtype:
    """float16 for 16-bit vectors or where the caller wants it, else float32.

    Unit vectors fit float16, whose 11 bits make cosines eight times more accurate than bfloat16.
    """
    single = rows.dtype == torch.float32 or cols.dtype == torch.float32
    return torch.float32 if single and not half else torch.float16


def input_gradients(
    inputs: Inputs, call: PreparedCall, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients by rows and columns from those by their unit vectors; empty if not wanted."""
    vectors = call.student
    factor = 1.0 / (len(inputs.rows) * tuning.gradient_scale(inputs.scalars, dtype.itemsize))
    found = [
        x.new_empty(0, dtype=torch.float32)
        if grad is None
        else normalize_backward(x, norms, grad, factor)
        for x, norms, grad in (
            (inputs.rows, vectors.row_norms, call.gradients.rows),
            (inputs.cols, vectors.col_norms, call.gradients.cols),
        )
    ]
    return found[0], found[1]
