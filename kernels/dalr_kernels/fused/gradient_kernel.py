"""Second kernel of mode "stream": the derivative by every cosine of a block.

It makes each student tile again, in the order of the first sweep, and writes the derivatives into a
block that the gradient products then read.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Inside @triton.jit functions pyright sees Python, not the language that Triton compiles.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from dalr_kernels.fused.arguments import PerSoftmax
from dalr_kernels.fused.elementwise import (
    clamp,
    cosine_grad,
    denominator_mask,
    load_block,
    load_teachers,
)
from dalr_kernels.fused.tiles import cosine_tile, halves, offset_constants

if TYPE_CHECKING:
    from torch import Tensor


class BlockRows(NamedTuple):
    """What a program knows of its block and rows; registers and pointers."""

    rows: Tensor
    exists: Tensor
    num_rows: Tensor
    num_cols: Tensor
    first_col: Tensor
    last_col: Tensor
    first_own: Tensor
    stride: Tensor
    row_sums: Tensor


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_own"])
def gradient_kernel(
    student, constants, grads, row_sums, ids,
    num_rows, num_cols, strides, stride, first_col, last_col, first_own,
    margin, threshold, factors, offsets, weights,
    FLAGS, TILE,
):  # fmt: skip
    """Derivatives of a block ``[num_rows, last_col - first_col]``, zero beyond `num_cols`.

    Args:
        student: `Student`, rows from the first of the block on, fp16 or fp32.
        constants: `Constants`, blocks of this shape, type of `student`.
        grads: The block to write, type of `student`.
        row_sums: ``[10, num_rows]`` fp32: a `PerSoftmax` of 1 / sum, and one of running maxima.
        ids: `Ids`, rows from the first of the block on.
        num_rows: Rows of the block.
        num_cols: Columns that exist; those beyond are padding.
        strides: `Strides` of the unit vectors.
        stride: Elements from one row of a block to the next.
        first_col: First column of the block.
        last_col: Column after its last.
        first_own: Positive column of row 0.
        margin: `Margin`.
        threshold: Scores above it mask a negative.
        factors: `PerSoftmax`, turn similarities into base-2 logits.
        offsets: `PerSoftmax`, fixed offsets of the exponents, unused online.
        weights: `PerTerm`, factors of the gradients.
        FLAGS: `Flags`.
        TILE: `TileShape`.
    """
    # Stage 1. Rows and columns of the tile; those beyond the end repeat the last one.
    rows = tl.program_id(0) * TILE.BM + tl.arange(0, TILE.BM)
    start = first_col + tl.program_id(1) * TILE.BN
    exists = rows < num_rows
    safe_rows = tl.where(exists, rows, num_rows - 1)
    cols = start + tl.arange(0, TILE.BN)
    safe_cols = tl.where(cols < last_col, cols, last_col - 1)

    # Stage 2. Unit vectors through shared memory, products in registers.
    tile = cosine_tile(student, safe_rows, safe_cols, strides, TILE)

    # Stage 3. Registers: a column slice at a time. Constant blocks and the sums of the rows come
    # from global memory, the derivatives go there.
    block = BlockRows(
        safe_rows, exists, num_rows, num_cols, first_col, last_col, first_own, stride, row_sums
    )
    store_tile(
        tile, start, block, grads, constants, ids,
        margin, threshold, factors, offsets, weights, FLAGS, TILE.SLICES,
    )  # fmt: skip


@triton.jit
def store_tile(
    tile, start, block, grads, constants, ids,
    margin, threshold, factors, offsets, weights, FLAGS, SLICES: tl.constexpr,
):  # fmt: skip
    """Write the derivatives of a tile, halved until it is one slice."""
    if SLICES == 1:
        store_slice(
            tile, start + tl.arange(0, tile.shape[1]), block, grads, constants, ids,
            margin, threshold, factors, offsets, weights, FLAGS,
        )  # fmt: skip
    else:
        left, right = halves(tile)
        store_tile(
            left, start, block, grads, constants, ids,
            margin, threshold, factors, offsets, weights, FLAGS, SLICES // 2,
        )  # fmt: skip
        store_tile(
            right, start + tile.shape[1] // 2, block, grads, constants, ids,
            margin, threshold, factors, offsets, weights, FLAGS, SLICES // 2,
        )  # fmt: skip


@triton.jit
def store_slice(
    tile, cols, block, grads, constants, ids,
    margin, threshold, factors, offsets, weights, FLAGS,
):  # fmt: skip
    """Write the derivatives of a slice of a tile."""
    c = clamp(tile, -1.0, 1.0)
    inside = block.exists[:, None] & (cols < block.last_col)[None, :]
    valid = inside & (cols < block.num_cols)[None, :]
    own = (block.first_own + block.rows)[:, None] == cols[None, :]
    first_row = tl.program_id(0) * block.exists.shape[0]
    base = first_row.to(tl.int64) * block.stride
    blocks = offset_constants(constants, base)
    element = (block.rows - first_row)[:, None] * block.stride + (cols - block.first_col)[None, :]
    running_max, inverse_sum = row_values(block, offsets, FLAGS)
    mask = valid
    if FLAGS.nce:
        mask = mask_of(block, blocks, ids, cols, element, valid, own, threshold, FLAGS)
    kl_teacher, list_net_teacher, labels = load_teachers(blocks, element, valid, FLAGS)
    grad = cosine_grad(
        c, own, valid, mask, labels, kl_teacher, list_net_teacher,
        running_max, inverse_sum, margin, factors, weights, FLAGS,
        grads.dtype.element_ty == tl.float16,
    )  # fmt: skip
    tl.store(grads + base + element, grad.to(grads.dtype.element_ty), mask=inside)


@triton.jit
def mask_of(block, blocks, ids, cols, element, valid, own, threshold, FLAGS):
    """Elements in the denominator of InfoNCE."""
    row_ids = block.rows
    col_ids = cols
    scores = 0.0
    if FLAGS.ids:
        row_ids = tl.load(ids.rows + block.rows)
        col_ids = tl.load(ids.cols + cols, mask=cols < block.num_cols, other=-1)
    if FLAGS.mask:
        scores = load_block(blocks.scores, element, valid)
    return denominator_mask(
        valid, own, row_ids[:, None], col_ids[None, :], scores, threshold, FLAGS
    )


@triton.jit
def row_value(block, index, absent, STORED: tl.constexpr):
    """One value per row ``[rows, 1]`` from `row_sums`, or a constant."""
    value = absent
    if STORED:
        value = tl.load(block.row_sums + block.rows + index * block.num_rows)[:, None]
    return value


@triton.jit
def row_values(block, offsets, FLAGS):
    """Running maxima (or the fixed offsets) and inverse sums of the rows."""
    inverse_sum = PerSoftmax(
        row_value(block, 0, 0.0, FLAGS.nce),
        row_value(block, 1, 0.0, FLAGS.kl),
        row_value(block, 2, 0.0, FLAGS.kl),
        row_value(block, 3, 0.0, FLAGS.list_net),
        row_value(block, 4, 0.0, FLAGS.list_net),
    )
    running_max = PerSoftmax(
        row_value(block, 5, offsets.nce, FLAGS.online),
        row_value(block, 6, offsets.kl, FLAGS.online),
        row_value(block, 7, offsets.kl_teacher, FLAGS.online),
        row_value(block, 8, offsets.list_net, FLAGS.online),
        row_value(block, 9, offsets.list_net_teacher, FLAGS.online),
    )
    return running_max, inverse_sum
