"""The fused call as a torch operator: autograd, fake tensors and torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalr_kernels.fused import launch
from dalr_kernels.fused.call import Inputs
from dalr_kernels.fused.tuning import Limits, unpack

if TYPE_CHECKING:
    from dalr_kernels.eager.chunked import Context

Result = tuple[Tensor, Tensor, Tensor, Tensor]

SCHEMA = (
    "(Tensor rows, Tensor cols, Tensor[] factors, float[] numbers, int[] codes, "
    "Tensor? row_ids, Tensor? col_ids, "
    "int col_offset, int workspace_bytes, int? chunk, str mode, bool half, "
    "bool want_rows, bool want_cols) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("dalr_kernels::row_losses", mutates_args=(), schema=SCHEMA)
def row_losses(
    rows: Tensor,
    cols: Tensor,
    factors: Sequence[Tensor],
    numbers: Sequence[float],
    codes: Sequence[int],
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    col_offset: int,
    workspace_bytes: int,
    chunk: int | None,
    mode: str,
    half: bool,
    want_rows: bool,
    want_cols: bool,
) -> Result:
    """Total, mean of each term, and the total's gradients; see ``launch.run``."""
    scalars, layout, matrices = unpack(list(factors), numbers, codes)
    inputs = Inputs(rows, cols, matrices, scalars, layout, row_ids, col_ids, col_offset, half)
    return launch.run(inputs, Limits(workspace_bytes, chunk, mode), want_rows, want_cols)


@row_losses.register_fake
def _(rows: Tensor, cols: Tensor, *constants: object) -> Result:
    want_rows, want_cols = constants[-2:]
    return (
        rows.new_empty((), dtype=torch.float32),
        rows.new_empty(3, dtype=torch.float32),
        rows.new_empty(rows.shape if want_rows else (0,), dtype=torch.float32),
        cols.new_empty(cols.shape if want_cols else (0,), dtype=torch.float32),
    )


# torch passes all arguments of an operator in one tuple, and takes one gradient for each.
def _save(ctx: Context, inputs: tuple[Any, ...], output: Result) -> None:
    rows, cols, factors, *_, want_rows, want_cols = inputs
    ctx.save_for_backward(*output[2:])
    ctx.types = rows.dtype if want_rows else None, cols.dtype if want_cols else None
    ctx.num_factors = len(factors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Context, upstream: Tensor, *_: object) -> tuple[object, ...]:
    # The stored gradient carries no graph: create_graph=True would drop terms silently.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("impl='triton' has no second derivatives; use impl='reference'")
    grads = [
        None if dtype is None else scaled(grad, upstream, dtype)
        for grad, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
    ]
    return *grads, [None] * ctx.num_factors, *[None] * 11


row_losses.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "dalr_kernels::scaled",
    mutates_args=(),
    schema="(Tensor gradient, Tensor upstream, ScalarType dtype) -> Tensor",
)
def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored gradient times the upstream scalar, rounded once to the type of the input."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream, out=out)


@scaled.register_fake
def _(gradient: Tensor, _upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)
