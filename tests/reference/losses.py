"""The terms of the objective as dense float64 matrices, one function a term.

B rows, H student width, P grounding width, d_v image width. A matrix [B, B] has texts or first
views as rows i and keys as columns j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INFINITY = float("inf")


@dataclass
class Discontinuities:
    """How close a step came to a jump of the loss; rounding may decide which side it is on.

    Attributes:
        gate: smallest distance of an off-diagonal cosine to the cosine of its margin.
        order: how far rounding would have to move a teacher's score to change the order of a list,
            in units of the cosine; scores that are far apart do not count.
        kink: smallest distance of a rectifier's input to 0, where its derivative jumps.
    """

    gate: float = INFINITY
    order: float = INFINITY
    kink: float = INFINITY

    def see_kink(self, x: Tensor) -> None:
        self.kink = min(self.kink, float(x.detach().abs().min()))

    def see_gate(self, c: Tensor, margin: float) -> None:
        if margin > 0:
            off = ~torch.eye(len(c), dtype=torch.bool)
            self.gate = min(self.gate, float((c[off] - math.cos(margin)).abs().min()))

    def see_order(self, ranking: Tensor, grid: float) -> None:
        cells = ranking.sort(dim=1).values / grid
        to_edge = (cells - cells.floor() - 0.5).abs() * grid
        close = cells.round().diff(dim=1) <= 1
        edges = torch.minimum(to_edge[:, 1:], to_edge[:, :-1])[close]
        if len(edges):
            self.order = min(self.order, float(edges.min()))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return unit(x) @ unit(y).T


def with_margin(
    c: Tensor, margin: float, soft: Tensor | None = None, seen: Discontinuities | None = None
) -> Tensor:
    """cos(theta - m w) for the negatives whose angle exceeds m, the cosine itself elsewhere.

    Args:
        c: [B, B] cosines.
        margin: m, radians.
        soft: [B, B] soft labels s; the margin of a cell is m (1 - s). None: w = 1.
    """
    if seen is not None:
        seen.see_gate(c.detach(), margin)
    diagonal = torch.eye(len(c), dtype=torch.bool)
    gate = ~diagonal & (c < math.cos(margin)) if margin > 0 else torch.zeros_like(diagonal)
    w = torch.ones_like(c) if soft is None else 1 - soft
    sine = (1 - torch.where(gate, c, 0.0) ** 2).clamp(min=1e-14).sqrt()
    moved = c * torch.cos(margin * w) + sine * torch.sin(margin * w)
    return torch.where(gate, moved, c)


def cross_entropy(x: Tensor, masked: Tensor | None = None) -> Tensor:
    """Row cross-entropy with the diagonal as target; `masked` cells leave the denominators."""
    logits = x if masked is None else x.masked_fill(masked, -INFINITY)
    return (logits.logsumexp(1) - x.diagonal()).mean()


def row_kl(teacher: Tensor, student: Tensor, tau_t: float, tau_s: float) -> Tensor:
    log_q = (teacher / tau_t).log_softmax(1)
    log_r = (student / tau_s).log_softmax(1)
    return (log_q.exp() * (log_q - log_r)).sum(1).mean()


def consistency(text: Tensor, image: Tensor, unmatched: Tensor, kept: Tensor) -> Tensor:
    """1 - cos of matched pairs and max(0, cos - 0.2) of unmatched ones, mean over all kept pairs.

    Args:
        text: [B, D] aligned sentences.
        image: [B, D] aligned images.
        unmatched: int64 [B], image that row i is paired with as its unmatched one.
        kept: bool [B], unmatched pairs that count.
    """
    matched = 1 - (unit(text) * unit(image)).sum(1)
    other = ((unit(text) * unit(image[unmatched])).sum(1) - 0.2).clamp(min=0)
    return (matched.sum() + other[kept].sum()) / (len(text) + kept.sum())


def listmle(student: Tensor, ranking: Tensor, *, mean: bool, eps: float, grid: float) -> Tensor:
    """Negative log-likelihood of the teacher's order; ties go by the lowest column.

    grid: scores that round to the same multiple of it are ties, because a matrix product may
    round equal scores differently.
    """
    cells = (ranking / grid).round()
    order = cells.sort(dim=1, descending=True, stable=True).indices
    y = student.gather(1, order)
    y = y - y.max(dim=1, keepdim=True).values
    total = torch.zeros((), dtype=student.dtype)
    for j in range(y.shape[1]):
        rest = y[:, j:]
        log_sum = torch.log(rest.exp().sum(1) + eps) if eps else rest.logsumexp(1)
        total = total + (log_sum - y[:, j]).mean()
    return total / y.shape[1] if mean else total


def listnet(student: Tensor, ranking: Tensor) -> Tensor:
    """Cross-entropy of the two softmax rows, both without their diagonal."""
    diagonal = torch.eye(len(student), dtype=torch.bool)
    q = ranking.masked_fill(diagonal, -INFINITY).softmax(1)
    log_r = student.masked_fill(diagonal, -INFINITY).log_softmax(1)
    return -(q * log_r.masked_fill(diagonal, 0.0)).sum(1).mean()


def global_to_local(
    sentence: Tensor,
    tokens: Tensor,
    mask: Tensor,
    tau: float,
    *,
    axis_norm: bool,
    unit_rows: bool,
    excluded: Tensor,
) -> Tensor:
    """Each real token of the own sentence against all real tokens of the other sentences.

    Args:
        sentence: [B, D] student vectors.
        tokens: [B, T, D] teacher's token states, without CLS.
        mask: bool [B, T] real tokens.
        axis_norm: norm of each feature over the T tokens of a sentence, not of each token.
        excluded: bool [B, B], sentences j that are no negatives of i besides i itself.
    """
    norm = (tokens**2).sum(1 if axis_norm else 2, keepdim=True).sqrt()
    scaled = tokens / norm.clamp(min=1e-8)
    rows = unit(sentence) if unit_rows else sentence
    g = torch.einsum("jtd,id->ijt", scaled, rows) / tau
    diagonal = torch.eye(len(rows), dtype=torch.bool)
    negative = ~(diagonal | excluded).unsqueeze(2) & mask.unsqueeze(0)
    n = g.masked_fill(~negative, -INFINITY).flatten(1).logsumexp(1)
    own = g[torch.arange(len(rows)), torch.arange(len(rows))]
    each = F.softplus(n.unsqueeze(1) - own, threshold=1e9)
    return ((each * mask).sum(1) / mask.sum(1)).mean()
