"""First kernel of mode "stream": the sums of every row, over a split of the columns.

A sweep over the columns makes one student tile after the other and adds it to the sums of its rows.
Blocks of the teachers come from library products.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Inside @triton.jit functions pyright sees Python, not the language that Triton compiles.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from dalr_kernels.fused.arguments import Expectations, PerSoftmax, Sums
from dalr_kernels.fused.elementwise import (
    HARD,
    add_info_nce,
    add_kl,
    add_list_net,
    clamp,
    denominator_mask,
    load_block,
    load_labels,
    shifted,
)
from dalr_kernels.fused.tiles import cosine_tile, halves, offset_constants

if TYPE_CHECKING:
    from torch import Tensor

# Cosine of the positive and `Sums`: values per row and column split in `states`.
NUM_STATES = 1 + 2 * len(PerSoftmax._fields) + len(Expectations._fields)


class TileRows(NamedTuple):
    """What a program knows of its rows; registers, one value per row."""

    rows: Tensor
    exists: Tensor
    own_cols: Tensor
    ids: Tensor


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_own", "tiles_per_split"])
def statistics_kernel(
    student, constants, states, ids,
    num_rows, num_cols, strides, stride, first_col, last_col, first_own, tiles_per_split,
    margin, threshold, factors, offsets,
    FLAGS, TILE,
):  # fmt: skip
    """Continue the sums of `num_rows` rows over the columns `first_col` .. `last_col`.

    Program (i, j) owns the rows of tile i and split j of the columns, and its own place in
    `states`: sums need no atomics and add up in a fixed order.

    Args:
        student: `Student`, rows from the first of the block on, fp16 or fp32.
        constants: `Constants`, ``[num_rows, last_col - first_col]``, type of `student`.
        states: ``[NUM_STATES, splits, num_rows]`` fp32: the cosine of the positive, then `Sums`.
        ids: `Ids`, rows from the first of the block on.
        num_rows: Rows of the block.
        num_cols: Columns that exist; those beyond are padding.
        strides: `Strides` of the unit vectors.
        stride: Elements from one row of a constant block to the next.
        first_col: First column of the block.
        last_col: Column after its last.
        first_own: Positive column of row 0.
        tiles_per_split: Tiles of a split.
        margin: `Margin`.
        threshold: Scores above it mask a negative.
        factors: `PerSoftmax`, turn similarities into base-2 logits.
        offsets: `PerSoftmax`, fixed offsets of the exponents.
        FLAGS: `Flags`.
        TILE: `TileShape`.
    """
    # Stage 1. Registers: rows, their ids and sums, one value per row of the tile. Rows beyond the
    # end repeat the last one; `exists` leaves them out.
    rows = tl.program_id(0) * TILE.BM + tl.arange(0, TILE.BM)
    split = tl.program_id(1)
    exists = rows < num_rows
    safe_rows = tl.where(exists, rows, num_rows - 1)
    row_id = rows
    if FLAGS.ids:
        row_id = tl.load(ids.rows + safe_rows)
    lines = TileRows(rows, exists, first_own + rows, row_id)
    place = states + split.to(tl.int64) * num_rows + rows
    step = tl.num_programs(1).to(tl.int64) * num_rows
    positive, sums = load_sums(place, step, exists, offsets, FLAGS)

    # Stage 2. One tile after the other: unit vectors through shared memory, products in registers.
    begin = first_col + split * tiles_per_split * TILE.BN
    end = tl.minimum(begin + tiles_per_split * TILE.BN, last_col)
    for start in range(begin, end, TILE.BN):
        cols = start + tl.arange(0, TILE.BN)
        safe_cols = tl.where(cols < last_col, cols, last_col - 1)
        tile = cosine_tile(student, safe_rows, safe_cols, strides, TILE)
        # Stage 3. Registers: a column slice at a time; constant blocks from global memory.
        limit = tl.minimum(num_cols, last_col)
        positive, sums = add_tile(
            tile, start, positive, sums, lines, constants, ids.cols, limit, stride, first_col,
            margin, threshold, factors, FLAGS, TILE.SLICES,
        )  # fmt: skip

    # Stage 4. Global memory: the sums of this split.
    store_sums(place, step, exists, positive, sums, FLAGS)


@triton.jit
def add_tile(
    tile, start, positive, sums, lines, constants, id_cols, limit, stride, first_col,
    margin, threshold, factors, FLAGS, SLICES: tl.constexpr,
):  # fmt: skip
    """Add a tile to the sums of its rows, halved until it is one slice."""
    if SLICES == 1:
        cols = start + tl.arange(0, tile.shape[1])
        positive, sums = add_slice(
            tile, cols, positive, sums, lines, constants, id_cols, limit, stride, first_col,
            margin, threshold, factors, FLAGS,
        )  # fmt: skip
    else:
        left, right = halves(tile)
        positive, sums = add_tile(
            left, start, positive, sums, lines, constants, id_cols, limit, stride, first_col,
            margin, threshold, factors, FLAGS, SLICES // 2,
        )  # fmt: skip
        positive, sums = add_tile(
            right, start + tile.shape[1] // 2, positive, sums, lines, constants, id_cols, limit,
            stride, first_col, margin, threshold, factors, FLAGS, SLICES // 2,
        )  # fmt: skip
    return positive, sums


@triton.jit
def add_slice(
    tile, cols, positive, sums, lines, constants, id_cols, limit, stride, first_col,
    margin, threshold, factors, FLAGS,
):  # fmt: skip
    """Add a slice of a tile to the sums of its rows; columns from `limit` on do not count."""
    c = clamp(tile, -1.0, 1.0)
    rows = lines.rows
    valid = lines.exists[:, None] & (cols < limit)[None, :]
    own = lines.own_cols[:, None] == cols[None, :]
    first_row = tl.program_id(0) * rows.shape[0]
    blocks = offset_constants(constants, first_row.to(tl.int64) * stride)
    element = (rows - first_row)[:, None] * stride + (cols - first_col)[None, :]
    kl_teacher = 0.0
    if FLAGS.kl:
        kl_teacher = load_block(blocks.kl_teacher, element, valid)
    labels = load_labels(blocks, kl_teacher, element, valid, FLAGS)
    soft, _, hard, _ = shifted(c, own, labels, margin, FLAGS)
    if FLAGS.nce:
        col_ids = cols
        scores = 0.0
        if FLAGS.ids:
            col_ids = tl.load(id_cols + cols, mask=cols < limit, other=-1)
        if FLAGS.mask:
            scores = load_block(blocks.scores, element, valid)
        row_ids = lines.ids[:, None]
        mask = denominator_mask(valid, own, row_ids, col_ids[None, :], scores, threshold, FLAGS)
        positive += tl.sum(tl.where(own & valid, c, 0.0), axis=1)
        sums = add_info_nce(sums, soft, mask, factors, FLAGS, True)
    if FLAGS.kl:
        g = hard if FLAGS.kl_shift == HARD else c
        sums = add_kl(sums, g, kl_teacher, valid, factors, FLAGS, True)
    if FLAGS.list_net:
        others = valid & (own == 0)
        g = hard if FLAGS.list_net_shift == HARD else c
        teacher = kl_teacher if FLAGS.one_teacher else blocks.list_net_teacher
        sums = add_list_net(sums, g, teacher, element, valid, others, factors, FLAGS, True)
    return positive, sums


@triton.jit
def load_state(place, offset, exists, constant, STORED: tl.constexpr):
    """A sum as the last launch left it; one that no term needs or changes is a constant."""
    value = tl.where(exists, constant, constant)
    if STORED:
        value = tl.load(place + offset, mask=exists, other=0.0)
    return value


@triton.jit
def store_state(place, offset, exists, value, STORED: tl.constexpr):
    """The inverse of `load_state`."""
    if STORED:
        tl.store(place + offset, value, mask=exists)


@triton.jit
def load_sums(place, step, exists, offsets, FLAGS):
    """Positive and `Sums` from `states`, in the order in which `sums_of_states` reads them."""
    NCE_MAX: tl.constexpr = FLAGS.nce and FLAGS.online
    KL_MAX: tl.constexpr = FLAGS.kl and FLAGS.online
    LIST_NET_MAX: tl.constexpr = FLAGS.list_net and FLAGS.online
    positive = load_state(place, 0 * step, exists, 0.0, FLAGS.nce)
    total = PerSoftmax(
        load_state(place, 1 * step, exists, 0.0, FLAGS.nce),
        load_state(place, 2 * step, exists, 0.0, FLAGS.kl),
        load_state(place, 3 * step, exists, 0.0, FLAGS.kl),
        load_state(place, 4 * step, exists, 0.0, FLAGS.list_net),
        load_state(place, 5 * step, exists, 0.0, FLAGS.list_net),
    )
    running_max = PerSoftmax(
        load_state(place, 6 * step, exists, offsets.nce, NCE_MAX),
        load_state(place, 7 * step, exists, offsets.kl, KL_MAX),
        load_state(place, 8 * step, exists, offsets.kl_teacher, KL_MAX),
        load_state(place, 9 * step, exists, offsets.list_net, LIST_NET_MAX),
        load_state(place, 10 * step, exists, offsets.list_net_teacher, LIST_NET_MAX),
    )
    expected = Expectations(
        load_state(place, 11 * step, exists, 0.0, FLAGS.kl),
        load_state(place, 12 * step, exists, 0.0, FLAGS.kl),
        load_state(place, 13 * step, exists, 0.0, FLAGS.list_net),
    )
    return positive, Sums(total, running_max, expected)


@triton.jit
def store_sums(place, step, exists, positive, sums, FLAGS):
    """The inverse of `load_sums`."""
    NCE_MAX: tl.constexpr = FLAGS.nce and FLAGS.online
    KL_MAX: tl.constexpr = FLAGS.kl and FLAGS.online
    LIST_NET_MAX: tl.constexpr = FLAGS.list_net and FLAGS.online
    total, top, expected = sums
    store_state(place, 0 * step, exists, positive, FLAGS.nce)
    store_state(place, 1 * step, exists, total.nce, FLAGS.nce)
    store_state(place, 2 * step, exists, total.kl, FLAGS.kl)
    store_state(place, 3 * step, exists, total.kl_teacher, FLAGS.kl)
    store_state(place, 4 * step, exists, total.list_net, FLAGS.list_net)
    store_state(place, 5 * step, exists, total.list_net_teacher, FLAGS.list_net)
    store_state(place, 6 * step, exists, top.nce, NCE_MAX)
    store_state(place, 7 * step, exists, top.kl, KL_MAX)
    store_state(place, 8 * step, exists, top.kl_teacher, KL_MAX)
    store_state(place, 9 * step, exists, top.list_net, LIST_NET_MAX)
    store_state(place, 10 * step, exists, top.list_net_teacher, LIST_NET_MAX)
    store_state(place, 11 * step, exists, expected.kl_student, FLAGS.kl)
    store_state(place, 12 * step, exists, expected.kl_teacher, FLAGS.kl)
    store_state(place, 13 * step, exists, expected.list_net_student, FLAGS.list_net)


def sums_of_states(states: Tensor) -> tuple[Tensor, Sums[Tensor]]:
    """Cosines of the positives and `Sums`, ``[splits, rows]`` each, of ``[NUM_STATES, ...]``."""
    parts = states.unbind()
    sums = Sums(PerSoftmax(*parts[1:6]), PerSoftmax(*parts[6:11]), Expectations(*parts[11:14]))
    return parts[0], sums
