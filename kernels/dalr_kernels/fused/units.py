"""Unit vectors and the way back through the normalisation, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import MIN_NORM
from .plan import padded

BLOCK = 1024


@triton.jit
def unit_kernel(
    vectors, out, norms, width, padded_width, row_stride, col_stride, out_stride, weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``weight * x / max(||x||, 1e-8)``, padded with zeros; `norms` receives ||x||."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        address = vectors + row * row_stride + cols.to(tl.int64) * col_stride
        x = tl.load(address, mask=cols < width, other=0.0).to(tl.float32)
        squares += x * x
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    tl.store(norms + row, norm)
    divisor = tl.where(norm < MIN_NORM, MIN_NORM, norm)
    for start in range(0, padded_width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        address = vectors + row * row_stride + cols.to(tl.int64) * col_stride
        x = tl.load(address, mask=cols < width, other=0.0).to(tl.float32)
        value = x / divisor * weight
        tl.store(
            out + row * out_stride + cols, value.to(out.dtype.element_ty), mask=cols < padded_width
        )


@triton.jit
def unit_gradient_kernel(
    vectors, norms, grads, out, width, row_stride, col_stride, grad_stride, out_stride, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by x from the one by the unit vector, times `factor`; `out` may be `grads`."""
    row = tl.program_id(0).to(tl.int64)
    norm = tl.load(norms + row)
    short = norm < MIN_NORM
    divisor = tl.where(short, MIN_NORM, norm)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        address = vectors + row * row_stride + cols.to(tl.int64) * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + row * grad_stride + cols, mask=inside, other=0.0)
        products += grad * (x / divisor)
    # Below the smallest norm the divisor is constant and nothing is projected out.
    along = tl.where(short, 0.0, tl.sum(products, axis=0))
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        address = vectors + row * row_stride + cols.to(tl.int64) * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + row * grad_stride + cols, mask=inside, other=0.0)
        value = (grad - along * (x / divisor)) / divisor * factor
        tl.store(out + row * out_stride + cols, value, mask=inside)


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
    unit_kernel[(num_rows,)](
        vectors, target, norms, width, last_col - first_col, vectors.stride(0), vectors.stride(1),
        out.stride(0), weight, BLOCK=block(width),
    )  # fmt: skip
    out[num_rows:, first_col:last_col].zero_()
    return norms


def through_units(vectors: Tensor, norms: Tensor, grads: Tensor, factor: float) -> Tensor:
    """Gradient by the vectors ``[n, D]`` from ``grads [>= n, >= D]``, in place when unpadded."""
    num_rows, width = vectors.shape
    exact = grads.shape == vectors.shape
    out = grads if exact else grads.new_empty(num_rows, width)
    unit_gradient_kernel[(num_rows,)](
        vectors, norms, grads, out, width, vectors.stride(0), vectors.stride(1),
        grads.stride(0), out.stride(0), factor, BLOCK=block(width),
    )  # fmt: skip
    return out


def block(width: int) -> int:
    """Elements per step: the padded width where one step is enough."""
    return min(BLOCK, triton.next_power_of_2(padded(width)))
