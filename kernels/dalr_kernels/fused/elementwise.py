"""Element-wise mathematics shared by all kernels: margin, exponentials, slopes of one cell."""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# Smallest 1 - c^2 that enters the root, as in margin.py; below it the root is constant.
MIN_SINE_SQUARED = tl.constexpr(1e-7)
MIN_NORM = tl.constexpr(1e-8)
LARGEST_HALF = tl.constexpr(65504.0)
# Stands for -inf where differences of two of them must not be NaN.
NEVER = tl.constexpr(-1e38)
PLAIN = tl.constexpr(0)
HARD = tl.constexpr(1)
SOFT = tl.constexpr(2)


@triton.jit
def clamp(x, low, high):
    # Comparisons, not tl.clamp: a NaN must stay one.
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def rotation(labels, margin, CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Cosine and sine of the angle ``margin * (1 - label)``."""
    if CLAMP:
        labels = clamp(labels, 0.0, 1.0)
    a = margin * (1.0 - labels)
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
    slope = tl.where(flat, cosine, cosine - c * inverse * sine)
    return tl.where(gate, value, c), tl.where(gate, slope, 1.0)


@triton.jit
def students(
    c, own, labels, margin, cos_margin, sin_margin,
    NCE_SHIFT: tl.constexpr, ANY_HARD: tl.constexpr, CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr,
):  # fmt: skip
    """Similarity and slope for InfoNCE, and with the whole margin for the other terms."""
    gate = (c < cos_margin) & (own == 0)
    hard = c
    hard_slope = c * 0.0 + 1.0
    if ANY_HARD:
        hard, hard_slope = rotate(c, gate, cos_margin, sin_margin)
    soft = c
    soft_slope = c * 0.0 + 1.0
    if NCE_SHIFT == HARD:
        soft = hard
        soft_slope = hard_slope
    if NCE_SHIFT == SOFT:
        cosine, sine = rotation(labels, margin, CLAMP, POLYNOMIAL)
        soft, soft_slope = rotate(c, gate, cosine, sine)
    return soft, soft_slope, hard, hard_slope


@triton.jit
def kept(valid, own, row_id, col_ids, scores, threshold, IDS: tl.constexpr, MASK: tl.constexpr):
    """Columns in the denominator of InfoNCE; the positive always is."""
    keep = valid
    if IDS:
        keep = keep & ((row_id != col_ids) | (row_id < 0) | own)
    if MASK:
        keep = keep & (((scores > threshold) == 0) | own)
    return keep


@triton.jit
def weigh(logits, keep, peak, ONLINE: tl.constexpr):
    """``2^(logit - peak)``, the new peak and the factor for older sums; lane by lane."""
    if ONLINE:
        logits = tl.where(keep, logits, NEVER)
        top = tl.where(logits > peak, logits, peak)
        decay = tl.exp2(peak - top)
    else:
        top = peak
        decay = peak * 0.0 + 1.0
    return tl.where(keep, tl.exp2(logits - top), 0.0), top, decay


@triton.jit
def add(total, term, decay, ONLINE: tl.constexpr):
    if ONLINE:
        total = total * decay
    return total + term


@triton.jit
def slope_of(
    c, own, valid, keep, labels, kl_t, net_t,
    nce_peak, kl_peak, klt_peak, net_peak, nett_peak,
    nce_share, kl_share, klt_share, net_share, nett_share,
    margin, cos_margin, sin_margin, nce_factor, kl_factor, klt_factor, net_factor, nett_factor,
    nce_weight, kl_weight, net_weight,
    NCE: tl.constexpr, KL: tl.constexpr, NET: tl.constexpr,
    NCE_SHIFT: tl.constexpr, KL_SHIFT: tl.constexpr, NET_SHIFT: tl.constexpr,
    CLAMP: tl.constexpr, POLYNOMIAL: tl.constexpr, SATURATE: tl.constexpr,
):  # fmt: skip
    """Derivative of the weighted sum of all terms by the cosine; zero in invalid cells.

    A probability is ``2^(logit - peak) * share`` with the share ``1 / sum`` of its row: the same
    exponential as in the sum, so that a dominating term gives exactly one.
    """
    ANY_HARD: tl.constexpr = NCE_SHIFT == HARD or KL_SHIFT == HARD or NET_SHIFT == HARD
    soft, soft_slope, hard, hard_slope = students(
        c, own, labels, margin, cos_margin, sin_margin, NCE_SHIFT, ANY_HARD, CLAMP, POLYNOMIAL
    )
    slope = c * 0.0
    if NCE:
        p = tl.where(keep, tl.exp2(soft * nce_factor - nce_peak) * nce_share, 0.0)
        slope += nce_weight * soft_slope * (p - tl.where(own, 1.0, 0.0))
    if KL:
        g = hard if KL_SHIFT == HARD else c
        p = tl.exp2(g * kl_factor - kl_peak) * kl_share
        p = kl_weight * (p - tl.exp2(kl_t * klt_factor - klt_peak) * klt_share)
        slope += p * hard_slope if KL_SHIFT == HARD else p
    if NET:
        g = hard if NET_SHIFT == HARD else c
        p = tl.exp2(g * net_factor - net_peak) * net_share
        p = net_weight * (p - tl.exp2(net_t * nett_factor - nett_peak) * nett_share)
        p = tl.where(own, 0.0, p)
        slope += p * hard_slope if NET_SHIFT == HARD else p
    slope = tl.where(valid, slope, 0.0)
    if SATURATE:
        slope = clamp(slope, -LARGEST_HALF, LARGEST_HALF)
    return slope
