"""Element-wise mathematics shared by all kernels: margin, exponentials, gradient of one element."""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Inside @triton.jit functions pyright sees Python, not the language that Triton compiles.

from __future__ import annotations

import triton
import triton.language as tl

from dalr_kernels.fused.arguments import Expectations, PerSoftmax, Sums

# Smallest 1 - c^2 that enters the root, as in margin.py; below it the root is constant.
MIN_SINE_SQUARED = tl.constexpr(1e-7)
MIN_NORM = tl.constexpr(1e-8)
LARGEST_HALF = tl.constexpr(65504.0)
# Used as -inf where differences of two of them must not be NaN.
MASKED_LOGIT = tl.constexpr(-1e38)
PLAIN = tl.constexpr(0)
HARD = tl.constexpr(1)
SOFT = tl.constexpr(2)


@triton.jit
def clamp(x, low, high):
    """Limit to low .. high. Comparisons, not tl.clamp: a NaN must stay one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def load_block(matrix, offsets, mask):
    """Elements of a 16-bit or float32 matrix in float32, zero where masked."""
    return tl.load(matrix + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_labels(blocks, kl_teacher, offsets, mask, FLAGS):
    """Soft labels of InfoNCE, read once where they are the KL teacher's matrix."""
    labels = 0.0
    if FLAGS.nce_shift == SOFT:
        labels = kl_teacher if FLAGS.teacher_labels else load_block(blocks.labels, offsets, mask)
    return labels


@triton.jit
def load_teachers(blocks, offsets, mask, FLAGS):
    """Similarities of the KL teacher and the ListNet teacher, and the soft labels."""
    kl_teacher = 0.0
    list_net_teacher = 0.0
    if FLAGS.kl:
        kl_teacher = load_block(blocks.kl_teacher, offsets, mask)
    if FLAGS.list_net:
        list_net_teacher = (
            kl_teacher if FLAGS.one_teacher else load_block(blocks.list_net_teacher, offsets, mask)
        )
    return kl_teacher, list_net_teacher, load_labels(blocks, kl_teacher, offsets, mask, FLAGS)


@triton.jit
def rotation(labels, angle, CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Cosine and sine of the angle ``angle * (1 - label)``."""
    if CLAMP:
        labels = clamp(labels, 0.0, 1.0)
    a = angle * (1.0 - labels)
    if POLYNOMIAL:
        square = a * a
        cosine = 1.0 + square * (-0.5 + square * (1.0 / 24 - square * (1.0 / 720)))
        sine = a * (1.0 + square * (-1.0 / 6 + square * (1.0 / 120 - square * (1.0 / 5040))))
    else:
        cosine = tl.cos(a)
        sine = tl.sin(a)
    return cosine, sine


@triton.jit
def rotate(c, gate, cosine, sine):
    """``cos(acos(c) - a)`` where gated, and its derivative by c; c and 1 elsewhere."""
    square = (1.0 - c) * (1.0 + c)
    flat = square < MIN_SINE_SQUARED
    square = tl.where(flat, MIN_SINE_SQUARED, square)
    inverse = tl.rsqrt(square)
    value = c * cosine + square * inverse * sine
    derivative = tl.where(flat, cosine, cosine - c * inverse * sine)
    return tl.where(gate, value, c), tl.where(gate, derivative, 1.0)


@triton.jit
def shifted(c, own, labels, margin, FLAGS):
    """Similarities after the margin, and their derivatives by the cosine.

    Returns:
        Similarity and derivative of InfoNCE, then both with the whole margin (KL, ListNet).
    """
    ANY_HARD: tl.constexpr = (
        FLAGS.nce_shift == HARD or FLAGS.kl_shift == HARD or FLAGS.list_net_shift == HARD
    )
    gate = (c < margin.cosine) & (own == 0)
    hard = c
    hard_grad = c * 0.0 + 1.0
    if ANY_HARD:
        hard, hard_grad = rotate(c, gate, margin.cosine, margin.sine)
    soft = c
    soft_grad = c * 0.0 + 1.0
    if FLAGS.nce_shift == HARD:
        soft = hard
        soft_grad = hard_grad
    if FLAGS.nce_shift == SOFT:
        cosine, sine = rotation(labels, margin.angle, FLAGS.clamp, FLAGS.polynomial)
        soft, soft_grad = rotate(c, gate, cosine, sine)
    return soft, soft_grad, hard, hard_grad


@triton.jit
def denominator_mask(valid, own, row_id, col_ids, scores, threshold, FLAGS):
    """Columns in the denominator of InfoNCE; the positive always is."""
    mask = valid
    if FLAGS.ids:
        mask = mask & ((row_id != col_ids) | (row_id < 0) | own)
    if FLAGS.mask:
        mask = mask & (((scores > threshold) == 0) | own)
    return mask


@triton.jit
def masked_exp(logits, mask, running_max, ONLINE: tl.constexpr, TILED: tl.constexpr):
    """``2^(logit - max)``, the new running maximum and the factor for older sums.

    Args:
        logits: Base-2 logits: lanes of one row, or in TILED a tile.
        mask: Elements that count.
        running_max: A value per lane, or in TILED per row of the tile.
        ONLINE: Without it the maximum is a fixed offset and the factor one.
        TILED: See above.
    """
    if ONLINE:
        logits = tl.where(mask, logits, MASKED_LOGIT)
        highest = logits
        if TILED:
            highest = tl.max(logits, axis=1)
        new_max = tl.where(highest > running_max, highest, running_max)
        decay = tl.exp2(running_max - new_max)
    else:
        new_max = running_max
        decay = running_max * 0.0 + 1.0
    subtrahend = new_max
    if TILED:
        subtrahend = new_max[:, None]
    return tl.where(mask, tl.exp2(logits - subtrahend), 0.0), new_max, decay


@triton.jit
def add(total, values, decay, ONLINE: tl.constexpr, TILED: tl.constexpr):
    """Continue a sum: lane by lane, or in TILED by the sum of each row of the tile."""
    term = values
    if TILED:
        term = tl.sum(values, axis=1)
    if ONLINE:
        total = total * decay
    return total + term


@triton.jit
def add_info_nce(sums, soft, mask, factors, FLAGS, TILED: tl.constexpr):
    """Add the elements of a block to the sum of InfoNCE's softmax."""
    total, top, expected = sums
    e, nce_max, decay = masked_exp(soft * factors.nce, mask, top.nce, FLAGS.online, TILED)
    nce_sum = add(total.nce, e, decay, FLAGS.online, TILED)
    return Sums(
        PerSoftmax(
            nce_sum, total.kl, total.kl_teacher, total.list_net, total.list_net_teacher
        ),
        PerSoftmax(nce_max, top.kl, top.kl_teacher, top.list_net, top.list_net_teacher),
        expected,
    )  # fmt: skip


@triton.jit
def add_kl(sums, similarity, teacher, valid, factors, FLAGS, TILED: tl.constexpr):
    """Add the elements of a block to the sums of the alignment KL."""
    total, top, expected = sums
    e, kl_max, decay = masked_exp(similarity * factors.kl, valid, top.kl, FLAGS.online, TILED)
    kl_sum = add(total.kl, e, decay, FLAGS.online, TILED)
    e, teacher_max, decay = masked_exp(
        teacher * factors.kl_teacher, valid, top.kl_teacher, FLAGS.online, TILED
    )
    teacher_sum = add(total.kl_teacher, e, decay, FLAGS.online, TILED)
    kl_student = add(expected.kl_student, e * similarity, decay, FLAGS.online, TILED)
    kl_teacher = add(expected.kl_teacher, e * teacher, decay, FLAGS.online, TILED)
    return Sums(
        PerSoftmax(total.nce, kl_sum, teacher_sum, total.list_net, total.list_net_teacher),
        PerSoftmax(top.nce, kl_max, teacher_max, top.list_net, top.list_net_teacher),
        Expectations(kl_student, kl_teacher, expected.list_net_student),
    )


@triton.jit
def add_list_net(
    sums, similarity, teacher, offsets, inside, others, factors, FLAGS, TILED: tl.constexpr
):
    """Add the elements of a block to the sums of ListNet.

    `teacher` is the block where KL has loaded the same matrix, else a pointer: loading it here
    keeps it out of registers while the sums of the other terms are made.
    """
    total, top, expected = sums
    e, student_max, decay = masked_exp(
        similarity * factors.list_net, others, top.list_net, FLAGS.online, TILED
    )
    student_sum = add(total.list_net, e, decay, FLAGS.online, TILED)
    values = teacher if FLAGS.one_teacher else load_block(teacher, offsets, inside)
    e, teacher_max, decay = masked_exp(
        values * factors.list_net_teacher, others, top.list_net_teacher, FLAGS.online, TILED
    )
    teacher_sum = add(total.list_net_teacher, e, decay, FLAGS.online, TILED)
    mean = add(expected.list_net_student, e * similarity, decay, FLAGS.online, TILED)
    return Sums(
        PerSoftmax(total.nce, total.kl, total.kl_teacher, student_sum, teacher_sum),
        PerSoftmax(top.nce, top.kl, top.kl_teacher, student_max, teacher_max),
        Expectations(expected.kl_student, expected.kl_teacher, mean),
    )


@triton.jit
def cosine_grad(
    c, own, valid, mask, labels, kl_teacher, list_net_teacher,
    running_max, inverse_sum, margin, factors, weights, FLAGS, SATURATE: tl.constexpr,
):  # fmt: skip
    """Derivative of the weighted sum of all terms by the cosine; zero in invalid elements.

    A probability is ``2^(logit - running_max) * inverse_sum`` with both of its row: the same
    exponential as in the sum, so that a dominating term gives exactly one.
    """
    soft, soft_grad, hard, hard_grad = shifted(c, own, labels, margin, FLAGS)
    grad = c * 0.0
    if FLAGS.nce:
        p = tl.where(mask, tl.exp2(soft * factors.nce - running_max.nce) * inverse_sum.nce, 0.0)
        grad += weights.nce * soft_grad * (p - tl.where(own, 1.0, 0.0))
    if FLAGS.kl:
        g = hard if FLAGS.kl_shift == HARD else c
        q = tl.exp2(kl_teacher * factors.kl_teacher - running_max.kl_teacher)
        p = tl.exp2(g * factors.kl - running_max.kl) * inverse_sum.kl
        p = weights.kl * (p - q * inverse_sum.kl_teacher)
        grad += p * hard_grad if FLAGS.kl_shift == HARD else p
    if FLAGS.list_net:
        g = hard if FLAGS.list_net_shift == HARD else c
        q = tl.exp2(list_net_teacher * factors.list_net_teacher - running_max.list_net_teacher)
        p = tl.exp2(g * factors.list_net - running_max.list_net) * inverse_sum.list_net
        p = weights.list_net * (p - q * inverse_sum.list_net_teacher)
        p = tl.where(own, 0.0, p)
        grad += p * hard_grad if FLAGS.list_net_shift == HARD else p
    grad = tl.where(valid, grad, 0.0)
    if SATURATE:
        grad = clamp(grad, -LARGEST_HALF, LARGEST_HALF)
    return grad
