"""Mode "stream": student tiles are made in registers and never stored.

A sweep over the columns gathers the sums of every row, a second one makes each tile again and
writes its slopes into a block that the gradient products then read. Teacher blocks come from
library products. The epilogue works on column slices of a tile, which keeps it in registers.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dalr_kernels.fused.elementwise import HARD, NEVER, SOFT, add, clamp, kept, slope_of, students

# Sums kept per row and column split, in the order of `states`.
STATES: tuple[str, ...] = (
    "positive", "nce_sum", "nce_peak", "kl_sum", "kl_peak", "klt_sum", "klt_peak", "klt_student",
    "klt_teacher", "net_sum", "net_peak", "nett_sum", "nett_peak", "nett_student",
)  # fmt: skip


@triton.jit
def cosine_tile(
    student_rows, student_cols, rows, cols, width, row_stride, col_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Products of BM rows and BN columns; both sweeps add them up in the same order."""
    depth = tl.arange(0, BK)
    left = student_rows + rows.to(tl.int64)[:, None] * row_stride + depth[None, :]
    right = student_cols + cols.to(tl.int64)[None, :] * col_stride + depth[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width, BK):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(start + depth)[None, :] < width, other=0.0)
            b = tl.load(right, mask=(start + depth)[:, None] < width, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BK
        right += BK
    return total


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def weigh_tile(logits, keep, peak, ONLINE: tl.constexpr):
    """As `cells.weigh`, with one peak per row of the tile."""
    if ONLINE:
        logits = tl.where(keep, logits, NEVER)
        highest = tl.max(logits, axis=1)
        top = tl.where(highest > peak, highest, peak)
        decay = tl.exp2(peak - top)
    else:
        top = peak
        decay = peak * 0.0 + 1.0
    return tl.where(keep, tl.exp2(logits - top[:, None]), 0.0), top, decay


@triton.jit
def gather(
    tile, rows, cols, exists, first_col, own_cols, row_id, state,
    kl_teacher, net_teacher, labels, scores, col_ids, num_cols, stride,
    margin, cos_margin, sin_margin, threshold,
    nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
    NCE: tl.constexpr, KL: tl.constexpr, NET: tl.constexpr,
    NCE_SHIFT: tl.constexpr, KL_SHIFT: tl.constexpr, NET_SHIFT: tl.constexpr,
    CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr,
    ONE_TEACHER: tl.constexpr, TAUGHT_LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
):  # fmt: skip
    """Add a slice of a tile to the sums of its rows."""
    (
        positive, nce_sum, nce_peak, kl_sum, kl_peak, klt_sum, klt_peak, klt_student,
        klt_teacher, net_sum, net_peak, nett_sum, nett_peak, nett_student,
    ) = state  # fmt: skip
    ANY_HARD: tl.constexpr = NCE_SHIFT == HARD or KL_SHIFT == HARD or NET_SHIFT == HARD
    c = clamp(tile, -1.0, 1.0)
    valid = exists[:, None] & (cols < num_cols)[None, :]
    own = own_cols[:, None] == cols[None, :]
    # The tile begins at a 64-bit address; offsets inside it fit 32 bits.
    base = (tl.program_id(0) * rows.shape[0]).to(tl.int64) * stride
    cell = (rows - tl.program_id(0) * rows.shape[0])[:, None] * stride + (cols - first_col)[None, :]
    label = 0.0
    kl_t = 0.0
    if KL:
        kl_t = tl.load(kl_teacher + base + cell, mask=valid, other=0.0).to(tl.float32)
    if NCE_SHIFT == SOFT:
        if TAUGHT_LABELS:
            label = kl_t
        else:
            label = tl.load(labels + base + cell, mask=valid, other=0.0).to(tl.float32)
    soft, _, hard, _ = students(
        c, own, label, margin, cos_margin, sin_margin, NCE_SHIFT, ANY_HARD, CLAMP, POLYNOMIAL
    )
    if NCE:
        ids = cols
        score = 0.0
        if IDS:
            ids = tl.load(col_ids + cols, mask=cols < num_cols, other=-1)
        if MASK:
            score = tl.load(scores + base + cell, mask=valid, other=0.0).to(tl.float32)
        keep = kept(valid, own, row_id[:, None], ids[None, :], score, threshold, IDS, MASK)
        positive += tl.sum(tl.where(own & valid, c, 0.0), axis=1)
        e, nce_peak, decay = weigh_tile(soft * nce_factor, keep, nce_peak, ONLINE)
        nce_sum = add(nce_sum, tl.sum(e, axis=1), decay, ONLINE)
    if KL:
        g = hard if KL_SHIFT == HARD else c
        e, kl_peak, decay = weigh_tile(g * kl_factor, valid, kl_peak, ONLINE)
        kl_sum = add(kl_sum, tl.sum(e, axis=1), decay, ONLINE)
        e, klt_peak, decay = weigh_tile(kl_t * klt_factor, valid, klt_peak, ONLINE)
        klt_sum = add(klt_sum, tl.sum(e, axis=1), decay, ONLINE)
        klt_student = add(klt_student, tl.sum(e * g, axis=1), decay, ONLINE)
        klt_teacher = add(klt_teacher, tl.sum(e * kl_t, axis=1), decay, ONLINE)
    if NET:
        others = valid & (own == 0)
        g = hard if NET_SHIFT == HARD else c
        e, net_peak, decay = weigh_tile(g * net_factor, others, net_peak, ONLINE)
        net_sum = add(net_sum, tl.sum(e, axis=1), decay, ONLINE)
        t = kl_t
        if not ONE_TEACHER:
            t = tl.load(net_teacher + base + cell, mask=valid, other=0.0).to(tl.float32)
        e, nett_peak, decay = weigh_tile(t * nett_factor, others, nett_peak, ONLINE)
        nett_sum = add(nett_sum, tl.sum(e, axis=1), decay, ONLINE)
        nett_student = add(nett_student, tl.sum(e * g, axis=1), decay, ONLINE)
    return (
        positive, nce_sum, nce_peak, kl_sum, kl_peak, klt_sum, klt_peak, klt_student,
        klt_teacher, net_sum, net_peak, nett_sum, nett_peak, nett_student,
    )  # fmt: skip


@triton.jit
def resume(place, offset, exists, constant, STORED: tl.constexpr):
    """A sum as the last launch left it; what no term needs or changes is a constant."""
    value = tl.where(exists, constant, constant)
    if STORED:
        value = tl.load(place + offset, mask=exists, other=0.0)
    return value


@triton.jit
def suspend(place, offset, exists, value, STORED: tl.constexpr):
    if STORED:
        tl.store(place + offset, value, mask=exists)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_own", "tiles_per_split"])
def statistics_kernel(
    student_rows, student_cols, kl_teacher, net_teacher, labels, scores, states, row_ids, col_ids,
    num_rows, num_cols, width, row_stride, col_stride, stride, first_col, last_col, first_own,
    tiles_per_split,
    margin, cos_margin, sin_margin, threshold,
    nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
    net_factor, net_offset, nett_factor, nett_offset,
    NCE: tl.constexpr, KL: tl.constexpr, NET: tl.constexpr,
    NCE_SHIFT: tl.constexpr, KL_SHIFT: tl.constexpr, NET_SHIFT: tl.constexpr,
    CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr,
    ONE_TEACHER: tl.constexpr, TAUGHT_LABELS: tl.constexpr,
    ONLINE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Continue the sums of `num_rows` rows over the columns `first_col` .. `last_col`.

    Program (i, j) owns the rows of tile i and the share j of the columns, and its own place in
    `states` [len(STATES), splits, num_rows]: sums need no atomics and add up in a fixed order.
    Teacher blocks are [num_rows, last_col - first_col] with row stride `stride`; `row_ids` and
    `student_rows` begin at the first row, `first_own` is its positive column.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    exists = rows < num_rows
    # Rows and columns beyond the end repeat the last one; `exists` and num_cols leave them out.
    safe_rows = tl.where(exists, rows, num_rows - 1)
    row_id = rows
    if IDS:
        row_id = tl.load(row_ids + safe_rows)
    own_cols = first_own + rows
    place = states + split.to(tl.int64) * num_rows + rows
    step = tl.num_programs(1).to(tl.int64) * num_rows
    state = (
        resume(place, 0 * step, exists, 0.0, NCE),
        resume(place, 1 * step, exists, 0.0, NCE),
        resume(place, 2 * step, exists, nce_offset, NCE and ONLINE),
        resume(place, 3 * step, exists, 0.0, KL),
        resume(place, 4 * step, exists, kl_offset, KL and ONLINE),
        resume(place, 5 * step, exists, 0.0, KL),
        resume(place, 6 * step, exists, klt_offset, KL and ONLINE),
        resume(place, 7 * step, exists, 0.0, KL),
        resume(place, 8 * step, exists, 0.0, KL),
        resume(place, 9 * step, exists, 0.0, NET),
        resume(place, 10 * step, exists, net_offset, NET and ONLINE),
        resume(place, 11 * step, exists, 0.0, NET),
        resume(place, 12 * step, exists, nett_offset, NET and ONLINE),
        resume(place, 13 * step, exists, 0.0, NET),
    )
    begin = first_col + split * tiles_per_split * BN
    end = tl.minimum(begin + tiles_per_split * BN, last_col)
    for start in range(begin, end, BN):
        cols = start + tl.arange(0, BN)
        safe_cols = tl.where(cols < last_col, cols, last_col - 1)
        tile = cosine_tile(
            student_rows, student_cols, safe_rows, safe_cols, width, row_stride, col_stride,
            BM, BN, BK, EVEN,
        )  # fmt: skip
        limit = tl.minimum(num_cols, last_col)
        if SLICES == 1:
            state = gather(
                tile, rows, cols, exists, first_col, own_cols, row_id, state,
                kl_teacher, net_teacher, labels, scores, col_ids, limit, stride,
                margin, cos_margin, sin_margin, threshold,
                nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
                NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL, IDS, MASK,
                ONE_TEACHER, TAUGHT_LABELS, ONLINE,
            )  # fmt: skip
        else:
            left, right = halves(tile, BM, BN)
            for half in tl.static_range(2):
                part = left if half == 0 else right
                if SLICES == 2:
                    state = gather(
                        part, rows, start + half * (BN // 2) + tl.arange(0, BN // 2), exists,
                        first_col, own_cols, row_id, state,
                        kl_teacher, net_teacher, labels, scores, col_ids, limit, stride,
                        margin, cos_margin, sin_margin, threshold,
                        nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
                        NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL, IDS, MASK,
                        ONE_TEACHER, TAUGHT_LABELS, ONLINE,
                    )  # fmt: skip
                else:
                    low, high = halves(part, BM, BN // 2)
                    for quarter in tl.static_range(2):
                        piece = low if quarter == 0 else high
                        offset = half * (BN // 2) + quarter * (BN // 4)
                        state = gather(
                            piece, rows, start + offset + tl.arange(0, BN // 4), exists,
                            first_col, own_cols, row_id, state,
                            kl_teacher, net_teacher, labels, scores, col_ids, limit, stride,
                            margin, cos_margin, sin_margin, threshold,
                            nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
                            NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL, IDS,
                            MASK, ONE_TEACHER, TAUGHT_LABELS, ONLINE,
                        )  # fmt: skip
    suspend(place, 0 * step, exists, state[0], NCE)
    suspend(place, 1 * step, exists, state[1], NCE)
    suspend(place, 2 * step, exists, state[2], NCE and ONLINE)
    suspend(place, 3 * step, exists, state[3], KL)
    suspend(place, 4 * step, exists, state[4], KL and ONLINE)
    suspend(place, 5 * step, exists, state[5], KL)
    suspend(place, 6 * step, exists, state[6], KL and ONLINE)
    suspend(place, 7 * step, exists, state[7], KL)
    suspend(place, 8 * step, exists, state[8], KL)
    suspend(place, 9 * step, exists, state[9], NET)
    suspend(place, 10 * step, exists, state[10], NET and ONLINE)
    suspend(place, 11 * step, exists, state[11], NET)
    suspend(place, 12 * step, exists, state[12], NET and ONLINE)
    suspend(place, 13 * step, exists, state[13], NET)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_own"])
def slopes_kernel(
    student_rows, student_cols, kl_teacher, net_teacher, labels, scores, slopes, row_sums,
    row_ids, col_ids,
    num_rows, num_cols, width, row_stride, col_stride, stride, first_col, last_col, first_own,
    margin, cos_margin, sin_margin, threshold,
    nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
    net_factor, net_offset, nett_factor, nett_offset,
    nce_weight, kl_weight, net_weight,
    NCE: tl.constexpr, KL: tl.constexpr, NET: tl.constexpr,
    NCE_SHIFT: tl.constexpr, KL_SHIFT: tl.constexpr, NET_SHIFT: tl.constexpr,
    CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr,
    ONE_TEACHER: tl.constexpr, TAUGHT_LABELS: tl.constexpr, ONLINE: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Slopes of a block [num_rows, last_col - first_col], zero beyond `num_cols`.

    `row_sums` [10, num_rows] holds the shares 1 / sum of InfoNCE, KL student and teacher, ListNet
    student and teacher, then their peaks. Other arguments as in `statistics_kernel`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    start = first_col + tl.program_id(1) * BN
    exists = rows < num_rows
    safe_rows = tl.where(exists, rows, num_rows - 1)
    cols = start + tl.arange(0, BN)
    safe_cols = tl.where(cols < last_col, cols, last_col - 1)
    tile = cosine_tile(
        student_rows, student_cols, safe_rows, safe_cols, width, row_stride, col_stride,
        BM, BN, BK, EVEN,
    )  # fmt: skip
    if SLICES == 1:
        store_slopes(
            tile, cols, safe_rows, exists,
            kl_teacher, net_teacher, labels, scores, slopes, row_sums, row_ids, col_ids,
            num_rows, num_cols, stride, first_col, last_col, first_own,
            margin, cos_margin, sin_margin, threshold,
            nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
            net_factor, net_offset, nett_factor, nett_offset,
            nce_weight, kl_weight, net_weight,
            NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL, IDS, MASK,
            ONE_TEACHER, TAUGHT_LABELS, ONLINE,
        )  # fmt: skip
    else:
        left, right = halves(tile, BM, BN)
        for half in tl.static_range(2):
            part = left if half == 0 else right
            if SLICES == 2:
                store_slopes(
                    part, start + half * (BN // 2) + tl.arange(0, BN // 2), safe_rows, exists,
                    kl_teacher, net_teacher, labels, scores, slopes, row_sums, row_ids, col_ids,
                    num_rows, num_cols, stride, first_col, last_col, first_own,
                    margin, cos_margin, sin_margin, threshold,
                    nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
                    net_factor, net_offset, nett_factor, nett_offset,
                    nce_weight, kl_weight, net_weight,
                    NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL, IDS, MASK,
                    ONE_TEACHER, TAUGHT_LABELS, ONLINE,
                )  # fmt: skip
            else:
                low, high = halves(part, BM, BN // 2)
                for quarter in tl.static_range(2):
                    piece = low if quarter == 0 else high
                    offset = half * (BN // 2) + quarter * (BN // 4)
                    store_slopes(
                        piece, start + offset + tl.arange(0, BN // 4), safe_rows, exists,
                        kl_teacher, net_teacher, labels, scores, slopes, row_sums, row_ids, col_ids,
                        num_rows, num_cols, stride, first_col, last_col, first_own,
                        margin, cos_margin, sin_margin, threshold,
                        nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
                        net_factor, net_offset, nett_factor, nett_offset,
                        nce_weight, kl_weight, net_weight,
                        NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL, IDS, MASK,
                        ONE_TEACHER, TAUGHT_LABELS, ONLINE,
                    )  # fmt: skip


@triton.jit
def store_slopes(
    tile, cols, safe_rows, exists,
    kl_teacher, net_teacher, labels, scores, slopes, row_sums, row_ids, col_ids,
    num_rows, num_cols, stride, first_col, last_col, first_own,
    margin, cos_margin, sin_margin, threshold,
    nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
    net_factor, net_offset, nett_factor, nett_offset,
    nce_weight, kl_weight, net_weight,
    NCE: tl.constexpr, KL: tl.constexpr, NET: tl.constexpr,
    NCE_SHIFT: tl.constexpr, KL_SHIFT: tl.constexpr, NET_SHIFT: tl.constexpr,
    CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr,
    ONE_TEACHER: tl.constexpr, TAUGHT_LABELS: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Slopes of a slice of a tile."""
    c = clamp(tile, -1.0, 1.0)
    inside = exists[:, None] & (cols < last_col)[None, :]
    valid = inside & (cols < num_cols)[None, :]
    own = (first_own + safe_rows)[:, None] == cols[None, :]
    first_row = tl.program_id(0) * exists.shape[0]
    base = first_row.to(tl.int64) * stride
    cell = (safe_rows - first_row)[:, None] * stride + (cols - first_col)[None, :]
    label = 0.0
    kl_t = 0.0
    net_t = 0.0
    keep = valid
    sums = row_sums + safe_rows
    nce_share = 0.0
    kl_share = 0.0
    klt_share = 0.0
    net_share = 0.0
    nett_share = 0.0
    nce_peak = nce_offset
    kl_peak = kl_offset
    klt_peak = klt_offset
    net_peak = net_offset
    nett_peak = nett_offset
    if ONLINE:
        nce_peak = tl.load(sums + 5 * num_rows)[:, None]
        kl_peak = tl.load(sums + 6 * num_rows)[:, None]
        klt_peak = tl.load(sums + 7 * num_rows)[:, None]
        net_peak = tl.load(sums + 8 * num_rows)[:, None]
        nett_peak = tl.load(sums + 9 * num_rows)[:, None]
    if NCE:
        nce_share = tl.load(sums)[:, None]
        row_id = safe_rows
        ids = cols
        score = 0.0
        if IDS:
            row_id = tl.load(row_ids + safe_rows)
            ids = tl.load(col_ids + cols, mask=cols < num_cols, other=-1)
        if MASK:
            score = tl.load(scores + base + cell, mask=valid, other=0.0).to(tl.float32)
        keep = kept(valid, own, row_id[:, None], ids[None, :], score, threshold, IDS, MASK)
    if KL:
        kl_share = tl.load(sums + num_rows)[:, None]
        klt_share = tl.load(sums + 2 * num_rows)[:, None]
        kl_t = tl.load(kl_teacher + base + cell, mask=valid, other=0.0).to(tl.float32)
    if NET:
        net_share = tl.load(sums + 3 * num_rows)[:, None]
        nett_share = tl.load(sums + 4 * num_rows)[:, None]
        net_t = kl_t
        if not ONE_TEACHER:
            net_t = tl.load(net_teacher + base + cell, mask=valid, other=0.0).to(tl.float32)
    if NCE_SHIFT == SOFT:
        label = kl_t
        if not TAUGHT_LABELS:
            label = tl.load(labels + base + cell, mask=valid, other=0.0).to(tl.float32)
    slope = slope_of(
        c, own, valid, keep, label, kl_t, net_t,
        nce_peak, kl_peak, klt_peak, net_peak, nett_peak,
        nce_share, kl_share, klt_share, net_share, nett_share,
        margin, cos_margin, sin_margin, nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
        nce_weight, kl_weight, net_weight,
        NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL,
        slopes.dtype.element_ty == tl.float16,
    )  # fmt: skip
    tl.store(slopes + base + cell, slope.to(slopes.dtype.element_ty), mask=inside)
