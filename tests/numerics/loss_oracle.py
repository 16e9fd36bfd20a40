"""The losses written as loops over scalars, from the equations alone.

Uses inverse cosines, explicit sums and Python floats, and nothing of the package, so agreement is
not agreement of one mistake with itself. Values only, no gradients, small inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Matrix = np.ndarray


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / (max(np.linalg.norm(x), 1e-8) * max(np.linalg.norm(y), 1e-8)))


def cosines(rows: Matrix, cols: Matrix) -> Matrix:
    return np.array([[cosine(x, y) for y in cols] for x in rows])


def margin_similarity(
    c: Matrix, offset: int, margin: float, temperature: float, soft: Matrix | None = None
) -> Matrix:
    """A(x, y; m, tau, s): the angle of gated negatives is lowered by m (1 - s)."""
    out = np.empty_like(c)
    for i, j in np.ndindex(*c.shape):
        angle = math.acos(min(1.0, max(-1.0, c[i, j])))
        weight = 1.0 if soft is None else 1.0 - soft[i, j]
        gated = j != i + offset and angle > margin
        out[i, j] = math.cos(angle - margin * weight) if gated else c[i, j]
    return out / temperature


def logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def log_softmax(values: Sequence[float]) -> list[float]:
    total = logsumexp(values)
    return [v - total for v in values]


def info_nce(a: Matrix, offset: int, dropped: Matrix | None = None) -> float:
    """Mean over rows of logsumexp over the remaining columns less the diagonal."""
    rows = []
    for i, row in enumerate(a):
        own = i + offset
        kept = [v for j, v in enumerate(row) if j == own or dropped is None or not dropped[i, j]]
        rows.append(logsumexp(kept) - row[own])
    return math.fsum(rows) / len(a)


def alignment_kl(a: Matrix, teacher: Matrix, student_t: float, teacher_t: float) -> float:
    total = 0.0
    for x, y in zip(a, teacher, strict=True):
        log_r, log_q = log_softmax(list(x / student_t)), log_softmax(list(y / teacher_t))
        total += math.fsum(math.exp(q) * (q - r) for q, r in zip(log_q, log_r, strict=True))
    return total / len(a)


def list_net(a: Matrix, teacher: Matrix, teacher_t: float, offset: int) -> float:
    total = 0.0
    for i, (x, y) in enumerate(zip(a, teacher, strict=True)):
        others = [j for j in range(len(x)) if j != i + offset]
        if not others:
            continue
        log_r = log_softmax([x[j] for j in others])
        log_q = log_softmax([y[j] / teacher_t for j in others])
        total -= math.fsum(math.exp(q) * r for q, r in zip(log_q, log_r, strict=True))
    return total / len(a)


def list_mle(a: Matrix, teacher: Matrix, *, mean: bool, eps: float) -> float:
    """Descending teacher order, equal scores by lowest column."""
    total = 0.0
    for x, scores in zip(a, teacher, strict=True):
        order = sorted(range(len(x)), key=lambda j: (-scores[j], j))
        y = [x[j] - max(x) for j in order]
        terms = [
            math.log(math.fsum(math.exp(v) for v in y[k:]) + eps) - y[k] for k in range(len(y))
        ]
        total += math.fsum(terms) / (len(terms) if mean else 1)
    return total / len(a)


def global_to_local(
    rows: Matrix, tokens: Matrix, mask: Matrix, temperature: float, offset: int, ids: Sequence[int]
) -> float:
    """Unit tokens and rows; sentences with the row's id are no negatives, -1 equals nothing."""
    total = 0.0
    for i, row in enumerate(rows):
        own = i + offset
        others = [
            j for j in range(len(tokens)) if j != own and not (ids[j] == ids[own] and ids[j] >= 0)
        ]
        g = cosines(tokens.reshape(-1, tokens.shape[2]), row[None]).reshape(mask.shape)
        g = g / temperature
        negatives = [g[j, t] for j in others for t in np.flatnonzero(mask[j])]
        positives = [g[own, t] for t in np.flatnonzero(mask[own])]
        if negatives and positives:
            gap = [logsumexp(negatives) - p for p in positives]
            total += math.fsum(logsumexp([0.0, x]) for x in gap) / len(gap)
    return total / len(rows)
