"""Kernel of mode "workspace": whole rows of every matrix exist, one program serves one row.

The first sweep over the row collects the sums of all terms; the second writes the derivative of
their weighted sum by each cosine over the cosine itself. The row stays in the L2 cache in between.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Inside @triton.jit functions pyright sees Python, not the language that Triton compiles.

from __future__ import annotations

import triton
import triton.language as tl

from dalr_kernels.fused.arguments import Constants, Expectations, PerSoftmax, Sums
from dalr_kernels.fused.elementwise import (
    HARD,
    MASKED_LOGIT,
    add_info_nce,
    add_kl,
    add_list_net,
    clamp,
    cosine_grad,
    denominator_mask,
    load_block,
    load_labels,
    load_teachers,
    shifted,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_row", "first_own"])
def row_kernel(
    student, constants, grads, losses, ids,
    num_rows, num_cols, first_row, first_own, padded_cols, stride,
    margin, threshold, factors, offsets, weights,
    FLAGS, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one row, and in GRADIENT the derivative of their weighted sum by each cosine.

    Args:
        student: Cosines of a chunk, ``[rows of the chunk, padded_cols]``, fp16 or fp32.
        constants: `Constants`, matrices of the same shape, type and stride.
        grads: Written in GRADIENT; shape and type of `student`, and may be `student`.
        losses: ``[3, num_rows]`` for the rows of all chunks, fp32; written.
        ids: `Ids`, ``[num_rows]`` and ``[num_cols]``.
        num_rows: Rows of all chunks.
        num_cols: Columns that exist; those up to `padded_cols` are padding.
        first_row: Row 0 of the chunk among all rows.
        first_own: Its positive column.
        padded_cols: Columns of the matrices.
        stride: Elements from one of their rows to the next.
        margin: `Margin`.
        threshold: Scores above it mask a negative.
        factors: `PerSoftmax`, turn similarities into base-2 logits.
        offsets: `PerSoftmax`, fixed offsets of the exponents, unused online.
        weights: `PerTerm`, factors of the gradients.
        FLAGS: `Flags`.
        GRADIENT: Whether a gradient is wanted.
        BLOCK: Columns of a step.
    """
    # Stage 1. Global memory: the image id and the positive of the row, one scalar each.
    row = tl.program_id(0)
    base = row.to(tl.int64) * stride
    own_col = first_own + row
    row_id = tl.load(ids.rows + first_row + row) if FLAGS.ids else 0
    positive = clamp(tl.load(student + base + own_col).to(tl.float32), -1.0, 1.0)
    blocks = Constants(
        constants.kl_teacher + base, constants.list_net_teacher + base,
        constants.labels + base, constants.scores + base,
    )  # fmt: skip

    # Stage 2. Registers: every lane keeps the sums of its own columns, BLOCK lanes in all. The
    # matrices are read from global memory for the first time and remain in the L2 cache.
    sums = empty_sums(offsets, FLAGS, BLOCK)
    for start in range(0, padded_cols, BLOCK):
        sums = add_block(
            sums, student + base, blocks, ids.cols, start, padded_cols, num_cols, own_col, row_id,
            margin, threshold, factors, FLAGS, BLOCK,
        )  # fmt: skip

    # Stage 3. Shared memory: the lanes merge. Global memory: one loss per term is written.
    running_max, inverse_sum = store_losses(
        sums, positive, losses + first_row + row, num_rows, num_cols, factors, offsets, FLAGS
    )

    # Stage 4. The matrices are read again (L2 cache), the gradient is written to global memory.
    if GRADIENT:
        for start in range(0, padded_cols, BLOCK):
            store_grads(
                grads + base, student + base, blocks, ids.cols, start, padded_cols, num_cols,
                own_col, row_id, running_max, inverse_sum,
                margin, threshold, factors, weights, FLAGS, BLOCK,
            )  # fmt: skip


@triton.jit
def empty_sums(offsets, FLAGS, BLOCK: tl.constexpr):
    """`Sums` of nothing, one per lane: fixed offsets or an unreachable maximum."""
    zero = tl.zeros([BLOCK], tl.float32)
    if FLAGS.online:
        low = zero + MASKED_LOGIT
        running_max = PerSoftmax(low, low, low, low, low)
    else:
        running_max = PerSoftmax(
            zero + offsets.nce, zero + offsets.kl, zero + offsets.kl_teacher,
            zero + offsets.list_net, zero + offsets.list_net_teacher,
        )  # fmt: skip
    return Sums(
        PerSoftmax(zero, zero, zero, zero, zero), running_max, Expectations(zero, zero, zero)
    )


@triton.jit
def add_block(
    sums, student, blocks, id_cols, start, padded_cols, num_cols, own_col, row_id,
    margin, threshold, factors, FLAGS, BLOCK: tl.constexpr,
):  # fmt: skip
    """Continue the sums of a row over BLOCK columns."""
    cols = start + tl.arange(0, BLOCK)
    inside = cols < padded_cols
    valid = cols < num_cols
    own = cols == own_col
    c = clamp(load_block(student, cols, inside), -1.0, 1.0)
    kl_teacher = 0.0
    if FLAGS.kl:
        kl_teacher = load_block(blocks.kl_teacher, cols, inside)
    labels = load_labels(blocks, kl_teacher, cols, inside, FLAGS)
    soft, _, hard, _ = shifted(c, own, labels, margin, FLAGS)
    if FLAGS.nce:
        mask = mask_of(blocks, id_cols, cols, inside, valid, own, row_id, threshold, FLAGS)
        sums = add_info_nce(sums, soft, mask, factors, FLAGS, False)
    if FLAGS.kl:
        g = hard if FLAGS.kl_shift == HARD else c
        sums = add_kl(sums, g, kl_teacher, valid, factors, FLAGS, False)
    if FLAGS.list_net:
        teacher = kl_teacher if FLAGS.one_teacher else blocks.list_net_teacher
        g = hard if FLAGS.list_net_shift == HARD else c
        others = valid & (own == 0)
        sums = add_list_net(sums, g, teacher, cols, inside, others, factors, FLAGS, False)
    return sums


@triton.jit
def mask_of(blocks, id_cols, cols, inside, valid, own, row_id, threshold, FLAGS):
    """Columns in the denominator of InfoNCE."""
    col_ids = cols
    scores = 0.0
    if FLAGS.ids:
        col_ids = tl.load(id_cols + cols, mask=valid, other=-1)
    if FLAGS.mask:
        scores = load_block(blocks.scores, cols, inside)
    return denominator_mask(valid, own, row_id, col_ids, scores, threshold, FLAGS)


@triton.jit
def sum_lanes(total, lane_max, row_max, ONLINE: tl.constexpr):
    """Sum of all lanes, each brought to the maximum of the row."""
    if ONLINE:
        total = total * tl.exp2(lane_max - row_max)
    return tl.sum(total, axis=0)


@triton.jit
def merge_max(lanes, offsets, ONLINE: tl.constexpr):
    """Maxima of the row: of its lanes, or the fixed offsets."""
    if ONLINE:
        merged = PerSoftmax(
            tl.max(lanes.nce, axis=0), tl.max(lanes.kl, axis=0), tl.max(lanes.kl_teacher, axis=0),
            tl.max(lanes.list_net, axis=0), tl.max(lanes.list_net_teacher, axis=0),
        )  # fmt: skip
    else:
        merged = PerSoftmax(
            offsets.nce, offsets.kl, offsets.kl_teacher, offsets.list_net, offsets.list_net_teacher
        )
    return merged


@triton.jit
def store_losses(sums, positive, out, num_rows, num_cols, factors, offsets, FLAGS):
    """Write one loss per term; the maxima and inverse sums of the row's softmaxes."""
    total, lanes, expected = sums
    top = merge_max(lanes, offsets, FLAGS.online)
    nce = 0.0
    kl = 0.0
    kl_teacher = 0.0
    list_net = 0.0
    list_net_teacher = 0.0
    if FLAGS.nce:
        total_nce = sum_lanes(total.nce, lanes.nce, top.nce, FLAGS.online)
        nce = 1.0 / total_nce
        tl.store(out, (tl.log2(total_nce) - (positive * factors.nce - top.nce)) * LN2)
    if FLAGS.kl:
        loss, kl, kl_teacher = kl_loss(total, lanes, top, expected, factors, FLAGS.online)
        tl.store(out + num_rows, loss)
    if FLAGS.list_net:
        loss, list_net, list_net_teacher = list_net_loss(
            total, lanes, top, expected, num_cols, factors, FLAGS.online
        )
        tl.store(out + 2 * num_rows, loss)
    return top, PerSoftmax(nce, kl, kl_teacher, list_net, list_net_teacher)


@triton.jit
def kl_loss(total, lanes, top, expected, factors, ONLINE: tl.constexpr):
    """Alignment KL of a row, and the inverse sums of student and teacher."""
    student_sum = sum_lanes(total.kl, lanes.kl, top.kl, ONLINE)
    inverse = 1.0 / student_sum
    teacher_sum = sum_lanes(total.kl_teacher, lanes.kl_teacher, top.kl_teacher, ONLINE)
    teacher_inverse = 1.0 / teacher_sum
    student = sum_lanes(expected.kl_student, lanes.kl_teacher, top.kl_teacher, ONLINE)
    student_mean = student * teacher_inverse
    teacher = sum_lanes(expected.kl_teacher, lanes.kl_teacher, top.kl_teacher, ONLINE)
    teacher_mean = teacher * teacher_inverse
    log_q = (teacher_mean * factors.kl_teacher - top.kl_teacher) - tl.log2(teacher_sum)
    log_r = (student_mean * factors.kl - top.kl) - tl.log2(student_sum)
    return (log_q - log_r) * LN2, inverse, teacher_inverse


@triton.jit
def list_net_loss(total, lanes, top, expected, num_cols, factors, ONLINE: tl.constexpr):
    """ListNet of a row, and the inverse sums of student and teacher."""
    # A list of one column is empty without its diagonal: no loss, no gradient.
    empty = num_cols == 1
    lane_max, row_max = lanes.list_net_teacher, top.list_net_teacher
    student_sum = sum_lanes(total.list_net, lanes.list_net, top.list_net, ONLINE)
    student_sum = tl.where(empty, 1.0, student_sum)
    teacher_sum = sum_lanes(total.list_net_teacher, lane_max, row_max, ONLINE)
    teacher_sum = tl.where(empty, 1.0, teacher_sum)
    teacher_inverse = 1.0 / teacher_sum
    student_mean = sum_lanes(expected.list_net_student, lane_max, row_max, ONLINE) * teacher_inverse
    log_r = (student_mean * factors.list_net - top.list_net) - tl.log2(student_sum)
    return tl.where(empty, 0.0, -log_r * LN2), 1.0 / student_sum, teacher_inverse


@triton.jit
def store_grads(
    grads, student, blocks, id_cols, start, padded_cols, num_cols, own_col, row_id,
    running_max, inverse_sum, margin, threshold, factors, weights, FLAGS, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the derivatives by BLOCK cosines of a row, zero beyond `num_cols`."""
    cols = start + tl.arange(0, BLOCK)
    inside = cols < padded_cols
    valid = cols < num_cols
    own = cols == own_col
    c = clamp(load_block(student, cols, inside), -1.0, 1.0)
    mask = valid
    if FLAGS.nce:
        mask = mask_of(blocks, id_cols, cols, inside, valid, own, row_id, threshold, FLAGS)
    kl_teacher, list_net_teacher, labels = load_teachers(blocks, cols, inside, FLAGS)
    grad = cosine_grad(
        c, own, valid, mask, labels, kl_teacher, list_net_teacher,
        running_max, inverse_sum, margin, factors, weights, FLAGS,
        grads.dtype.element_ty == tl.float16,
    )  # fmt: skip
    tl.store(grads + cols, grad.to(grads.dtype.element_ty), mask=inside)
