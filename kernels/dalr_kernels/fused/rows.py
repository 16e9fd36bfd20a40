"""Mode "workspace": whole rows of every matrix exist, one program serves one row.

The first loop over the row gathers the sums of all terms, the second writes the slope of their
weighted sum by the cosine over the cosine itself. The row stays in the L2 cache in between.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dalr_kernels.fused.elementwise import HARD, SOFT, add, clamp, kept, slope_of, students, weigh

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def lanes_sum(total, peak, top, ONLINE: tl.constexpr):
    if ONLINE:
        total = total * tl.exp2(peak - top)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "first_row", "first_own"])
def row_kernel(
    student, kl_teacher, net_teacher, labels, scores, slopes, losses, row_ids, col_ids,
    num_rows, num_cols, padded_cols, stride, first_row, first_own,
    margin, cos_margin, sin_margin, threshold,
    nce_factor, nce_offset, kl_factor, kl_offset, klt_factor, klt_offset,
    net_factor, net_offset, nett_factor, nett_offset,
    nce_weight, kl_weight, net_weight,
    NCE: tl.constexpr, KL: tl.constexpr, NET: tl.constexpr,
    NCE_SHIFT: tl.constexpr, KL_SHIFT: tl.constexpr, NET_SHIFT: tl.constexpr,
    CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr, IDS: tl.constexpr, MASK: tl.constexpr,
    ONE_TEACHER: tl.constexpr, TAUGHT_LABELS: tl.constexpr,
    ONLINE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one row, and in GRADIENT the slopes of their weighted sum.

    Matrices are [rows of the chunk, padded_cols] with one `stride`; `slopes` may be `student`.
    `losses` is [3, num_rows] for the rows of all chunks; row 0 of the chunk is `first_row`, its
    positive column `first_own`. Factors turn similarities into base-2 logits.
    """
    ANY_HARD: tl.constexpr = NCE_SHIFT == HARD or KL_SHIFT == HARD or NET_SHIFT == HARD
    row = tl.program_id(0)
    base = row.to(tl.int64) * stride
    own_col = first_own + row
    row_id = tl.load(row_ids + first_row + row) if IDS else 0
    positive = clamp(tl.load(student + base + own_col).to(tl.float32), -1.0, 1.0)

    zero = tl.zeros([BLOCK], tl.float32)
    nce_sum = zero
    kl_sum = zero
    klt_sum = zero
    klt_student = zero
    klt_teacher = zero
    net_sum = zero
    nett_sum = zero
    nett_student = zero
    nce_peak = zero + nce_offset
    kl_peak = zero + kl_offset
    klt_peak = zero + klt_offset
    net_peak = zero + net_offset
    nett_peak = zero + nett_offset
    if ONLINE:
        nce_peak = zero - 1e38
        kl_peak = nce_peak
        klt_peak = nce_peak
        net_peak = nce_peak
        nett_peak = nce_peak

    for start in range(0, padded_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < padded_cols
        valid = cols < num_cols
        own = cols == own_col
        c = clamp(tl.load(student + base + cols, mask=inside, other=0.0).to(tl.float32), -1.0, 1.0)
        label = zero
        kl_t = zero
        if KL:
            kl_t = tl.load(kl_teacher + base + cols, mask=inside, other=0.0).to(tl.float32)
        if NCE_SHIFT == SOFT:
            label = kl_t
            if not TAUGHT_LABELS:
                label = tl.load(labels + base + cols, mask=inside, other=0.0).to(tl.float32)
        soft, _, hard, _ = students(
            c, own, label, margin, cos_margin, sin_margin, NCE_SHIFT, ANY_HARD, CLAMP, POLYNOMIAL
        )
        if NCE:
            ids = cols
            score = zero
            if IDS:
                ids = tl.load(col_ids + cols, mask=valid, other=-1)
            if MASK:
                score = tl.load(scores + base + cols, mask=inside, other=0.0).to(tl.float32)
            keep = kept(valid, own, row_id, ids, score, threshold, IDS, MASK)
            e, nce_peak, decay = weigh(soft * nce_factor, keep, nce_peak, ONLINE)
            nce_sum = add(nce_sum, e, decay, ONLINE)
        if KL:
            g = hard if KL_SHIFT == HARD else c
            e, kl_peak, decay = weigh(g * kl_factor, valid, kl_peak, ONLINE)
            kl_sum = add(kl_sum, e, decay, ONLINE)
            e, klt_peak, decay = weigh(kl_t * klt_factor, valid, klt_peak, ONLINE)
            klt_sum = add(klt_sum, e, decay, ONLINE)
            klt_student = add(klt_student, e * g, decay, ONLINE)
            klt_teacher = add(klt_teacher, e * kl_t, decay, ONLINE)
        if NET:
            others = valid & (own == 0)
            g = hard if NET_SHIFT == HARD else c
            e, net_peak, decay = weigh(g * net_factor, others, net_peak, ONLINE)
            net_sum = add(net_sum, e, decay, ONLINE)
            t = kl_t
            if not ONE_TEACHER:
                t = tl.load(net_teacher + base + cols, mask=inside, other=0.0).to(tl.float32)
            e, nett_peak, decay = weigh(t * nett_factor, others, nett_peak, ONLINE)
            nett_sum = add(nett_sum, e, decay, ONLINE)
            nett_student = add(nett_student, e * g, decay, ONLINE)

    out = losses + first_row + row
    nce_share = 0.0
    kl_share = 0.0
    klt_share = 0.0
    net_share = 0.0
    nett_share = 0.0
    nce_top = nce_offset
    kl_top = kl_offset
    klt_top = klt_offset
    net_top = net_offset
    nett_top = nett_offset
    if ONLINE:
        nce_top = tl.max(nce_peak, axis=0)
        kl_top = tl.max(kl_peak, axis=0)
        klt_top = tl.max(klt_peak, axis=0)
        net_top = tl.max(net_peak, axis=0)
        nett_top = tl.max(nett_peak, axis=0)
    if NCE:
        mass = lanes_sum(nce_sum, nce_peak, nce_top, ONLINE)
        nce_share = 1.0 / mass
        tl.store(out, (tl.log2(mass) - (positive * nce_factor - nce_top)) * LN2)
    if KL:
        mass = lanes_sum(kl_sum, kl_peak, kl_top, ONLINE)
        kl_share = 1.0 / mass
        teacher_mass = lanes_sum(klt_sum, klt_peak, klt_top, ONLINE)
        klt_share = 1.0 / teacher_mass
        student_mean = lanes_sum(klt_student, klt_peak, klt_top, ONLINE) * klt_share
        teacher_mean = lanes_sum(klt_teacher, klt_peak, klt_top, ONLINE) * klt_share
        log_q = (teacher_mean * klt_factor - klt_top) - tl.log2(teacher_mass)
        log_r = (student_mean * kl_factor - kl_top) - tl.log2(mass)
        tl.store(out + num_rows, (log_q - log_r) * LN2)
    if NET:
        # A list of one column is empty without its diagonal: no loss, no slope.
        empty = num_cols == 1
        mass = tl.where(empty, 1.0, lanes_sum(net_sum, net_peak, net_top, ONLINE))
        net_share = 1.0 / mass
        teacher_mass = tl.where(empty, 1.0, lanes_sum(nett_sum, nett_peak, nett_top, ONLINE))
        nett_share = 1.0 / teacher_mass
        student_mean = lanes_sum(nett_student, nett_peak, nett_top, ONLINE) * nett_share
        log_r = (student_mean * net_factor - net_top) - tl.log2(mass)
        tl.store(out + 2 * num_rows, tl.where(empty, 0.0, -log_r * LN2))

    if GRADIENT:
        for start in range(0, padded_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < padded_cols
            valid = cols < num_cols
            own = cols == own_col
            c = tl.load(student + base + cols, mask=inside, other=0.0).to(tl.float32)
            c = clamp(c, -1.0, 1.0)
            keep = valid
            if NCE:
                ids = cols
                score = zero
                if IDS:
                    ids = tl.load(col_ids + cols, mask=valid, other=-1)
                if MASK:
                    score = tl.load(scores + base + cols, mask=inside, other=0.0).to(tl.float32)
                keep = kept(valid, own, row_id, ids, score, threshold, IDS, MASK)
            kl_t = zero
            net_t = zero
            if KL:
                kl_t = tl.load(kl_teacher + base + cols, mask=inside, other=0.0).to(tl.float32)
            if NET:
                net_t = kl_t
                if not ONE_TEACHER:
                    net_t = tl.load(net_teacher + base + cols, mask=inside, other=0.0)
                    net_t = net_t.to(tl.float32)
            label = zero
            if NCE_SHIFT == SOFT:
                label = kl_t
                if not TAUGHT_LABELS:
                    label = tl.load(labels + base + cols, mask=inside, other=0.0).to(tl.float32)
            slope = slope_of(
                c, own, valid, keep, label, kl_t, net_t,
                nce_top, kl_top, klt_top, net_top, nett_top,
                nce_share, kl_share, klt_share, net_share, nett_share,
                margin, cos_margin, sin_margin,
                nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
                nce_weight, kl_weight, net_weight,
                NCE, KL, NET, NCE_SHIFT, KL_SHIFT, NET_SHIFT, CLAMP, POLYNOMIAL,
                slopes.dtype.element_ty == tl.float16,
            )  # fmt: skip
            tl.store(slopes + base + cols, slope.to(slopes.dtype.element_ty), mask=inside)
