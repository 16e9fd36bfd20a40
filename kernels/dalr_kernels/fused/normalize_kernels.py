"""Unit vectors and the backward of the normalization, one program per row."""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

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
def normalize_kernel(
    vectors, out, norms, num_rows, width, padded_width, row_stride, col_stride, out_stride, weight,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``weight * x / max(||x||, 1e-8)``, padded with zeros.

    Args:
        vectors: ``[num_rows, width]``, fp32, fp16 or bf16, any strides.
        out: ``[num_rows, padded_width]``, fp16 or fp32; written.
        norms: ``[num_rows]`` fp32, receives ||x||.
        num_rows: Rows.
        width: Elements of a vector.
        padded_width: Elements of a vector in `out`.
        row_stride: Elements from one vector to the next.
        col_stride: Elements from one entry of a vector to the next.
        out_stride: Elements from one row of `out` to the next.
        weight: Factor of the unit vectors.
        ROWS: Rows of a program.
        BLOCK: Elements of a row that are read at a time.
    """
    # Stage 1. Registers: squares of a block of every row, one sum per row.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (cols < width)[None, :]
        address = vectors + rows[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    # Stage 2. The vectors are read again (L1 or L2 cache), unit vectors go to global memory.
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
def normalize_gradient_kernel(
    vectors, norms, unit_grads, vector_grads, num_rows, width,
    row_stride, col_stride, grad_stride, out_stride, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by x from the one by the unit vector, times `factor`.

    Args:
        vectors: x, ``[num_rows, width]``, fp32, fp16 or bf16, any strides.
        norms: ||x||, ``[num_rows]`` fp32.
        unit_grads: Gradient by the unit vectors, ``[num_rows, >= width]`` fp32.
        vector_grads: Gradient by x, ``[num_rows, width]`` fp32; written, may be `unit_grads`.
        num_rows: Rows.
        width: Elements of a vector.
        row_stride: Elements from one vector to the next.
        col_stride: Elements from one entry of a vector to the next.
        grad_stride: Elements from one row of `unit_grads` to the next.
        out_stride: Elements from one row of `vector_grads` to the next.
        factor: Factor of the gradient.
        ROWS: Rows of a program.
        BLOCK: Elements of a row that are read at a time.
    """
    # Stage 1. Registers: the part of the gradient along x, one sum per row.
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
        address = unit_grads + rows[:, None] * grad_stride + cols[None, :]
        grad = tl.load(address, mask=inside, other=0.0)
        products += tl.sum(grad * (x / divisor[:, None]), axis=1)
    # Stage 2. Both are read again, the gradient across x goes to global memory.
    # Below the smallest norm the divisor is constant and nothing is projected out.
    along = tl.where(short, 0.0, products)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (cols < width)[None, :]
        address = vectors + rows[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        address = unit_grads + rows[:, None] * grad_stride + cols[None, :]
        grad = tl.load(address, mask=inside, other=0.0)
        value = (grad - along[:, None] * (x / divisor[:, None])) / divisor[:, None] * factor
        tl.store(vector_grads + rows[:, None] * out_stride + cols[None, :], value, mask=inside)


def normalize_rows(
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
    normalize_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        vectors, target, norms, num_rows, width, last_col - first_col, vectors.stride(0),
        vectors.stride(1), out.stride(0), weight, **tile,
    )  # fmt: skip
    out[num_rows:, first_col:last_col].zero_()
    return norms


def normalize_backward(vectors: Tensor, norms: Tensor, grads: Tensor, factor: float) -> Tensor:
    """Gradient by the vectors ``[n, D]`` from ``grads [>= n, >= D]``, in place when unpadded."""
    num_rows, width = vectors.shape
    exact = grads.shape == vectors.shape
    out = grads if exact else grads.new_empty(num_rows, width)
    tile = tile_of(width)
    normalize_gradient_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        vectors, norms, grads, out, num_rows, width, vectors.stride(0), vectors.stride(1),
        grads.stride(0), out.stride(0), factor, **tile,
    )  # fmt: skip
    return out


def tile_of(width: int) -> dict[str, int]:
    """Rows and columns of a program: whole rows where they are short."""
    block = min(LONGEST, triton.next_power_of_2(padded(width)))
    return {"ROWS": TILE // block, "BLOCK": block}
