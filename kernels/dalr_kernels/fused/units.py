"""Unit vectors and the way back through the normalisation, one program per row."""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalr_kernels.fused.elementwise import MIN_NORM
from dalr_kernels.fused.tuning import padded

# Elements of a program's tile, and the longest step along a row.
TILE = 4096
LONGEST = 1024


@triton.jit(do_not_specialize=["num_rows"])
def unit_kernel(
    vectors, out, norms, num_rows, width, padded_width, row_stride, col_stride, out_stride, weight,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``weight * x / max(||x||, 1e-8)``, padded with zeros; `norms` receives ||x||."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (cols < width)[None, :]
        address = vectors + rows[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    norm = tl.sqrt_rn(squares)
    tl.store(norms + rows, norm, mask=exists)
    divisor = tl.where(norm < MIN_NORM, MIN_NORM, norm)
    for start in range(0, padded_width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (cols < width)[None, :]
        address = vectors + rows[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        value = (x / divisor[:, None] * weight).to(out.dtype.element_ty)
        target = out + rows[:, None] * out_stride + cols[None, :]
        tl.store(target, value, mask=exists[:, None] & (cols < padded_width)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def unit_gradient_kernel(
    vectors, norms, grads, out, num_rows, width, row_stride, col_stride, grad_stride, out_stride,
    factor, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by x from the one by the unit vector, times `factor`; `out` may be `grads`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    norm = tl.load(norms + rows, mask=exists, other=1.0)
    short = norm < MIN_NORM
    divisor = tl.where(short, MIN_NORM, norm)
    products = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (cols < width)[None, :]
        address = vectors + rows[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + rows[:, None] * grad_stride + cols[None, :], mask=inside, other=0.0)
        products += tl.sum(grad * (x / divisor[:, None]), axis=1)
    # Below the smallest norm the divisor is constant and nothing is projected out.
    along = tl.where(short, 0.0, products)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (cols < width)[None, :]
        address = vectors + rows[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + rows[:, None] * grad_stride + cols[None, :], mask=inside, other=0.0)
        value = (grad - along[:, None] * (x / divisor[:, None])) / divisor[:, None] * factor
        tl.store(out + rows[:, None] * out_stride + cols[None, :], value, mask=inside)


def unit_rows(
    vectors: Tensor, out: Tensor, weight: float = 1.0, *, first_col: int = 0, last_col: int
) -> Tensor:
    """Write unit vectors into ``out[:, first_col:last_col]``, zero beyond width and rows.

    Args:
        vectors: ``[n, D]`` in any floating type up to float32, any strides.
        out: ``[at least n, ...]``, float16 or float32, row-major.
        weight: Multiplies the unit vectors.
        first_col: First column to write.
        last_col: Columns up to here beyond D are set to zero.

    Returns:
        The norms ``[n]`` in float32.
    """
    num_rows, width = vectors.shape
    norms = torch.empty(num_rows, dtype=torch.float32, device=vectors.device)
    target = out[:, first_col:last_col]
    tile = tile_of(width)
    unit_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        vectors, target, norms, num_rows, width, last_col - first_col, vectors.stride(0),
        vectors.stride(1), out.stride(0), weight, **tile,
    )  # fmt: skip
    out[num_rows:, first_col:last_col].zero_()
    return norms


def through_units(vectors: Tensor, norms: Tensor, grads: Tensor, factor: float) -> Tensor:
    """Gradient by the vectors ``[n, D]`` from ``grads [>= n, >= D]``, in place when unpadded."""
    num_rows, width = vectors.shape
    exact = grads.shape == vectors.shape
    out = grads if exact else grads.new_empty(num_rows, width)
    tile = tile_of(width)
    unit_gradient_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        vectors, norms, grads, out, num_rows, width, vectors.stride(0), vectors.stride(1),
        grads.stride(0), out.stride(0), factor, **tile,
    )  # fmt: skip
    return out


def tile_of(width: int) -> dict[str, Any]:
    """Rows and columns of a program: whole rows where they are short."""
    block = min(LONGEST, triton.next_power_of_2(padded(width)))
    return {"ROWS": TILE // block, "BLOCK": block}
