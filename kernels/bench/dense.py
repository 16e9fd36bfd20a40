"""The torch baselines: eager, compiled, and row chunks with the gradient made in the forward pass.

Written the way a careful user of plain torch would: no masks of size N^2, no inverse cosine, the
positives read from the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.problems import (
    KL_STUDENT,
    KL_TEACHER,
    MARGIN,
    RANK_TEACHER,
    TEMPERATURE,
    TRIPLE,
    WEIGHTS,
    Problem,
)

MIN_SINE_SQUARED = 1e-7


def unit(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors, normalized in float32 and rounded once."""
    return normalize(vectors.float(), dim=1).to(dtype)


def terms_of(name: str) -> dict[str, float]:
    """Weight of each row loss in a problem."""
    if name == "triple":
        return dict(zip(TRIPLE, WEIGHTS, strict=True))
    return {name: 1.0}


# Dense, gradient by autograd


def shifted(cosines: Tensor, teacher: Tensor, offset: int) -> Tensor:
    """Cosines after the soft margin; sine and cosine of its small angle come from torch."""
    gate = cosines < math.cos(MARGIN)
    angle = MARGIN * (1.0 - teacher)
    sine = (1.0 - cosines * cosines).clamp_min(MIN_SINE_SQUARED).sqrt()
    moved = cosines * angle.cos() + sine * angle.sin()
    moved = torch.where(gate, moved, cosines)
    return moved.diagonal_scatter(cosines.diagonal(offset), offset)


def row_loss(name: str, cosines: Tensor, teacher: Tensor | None, offset: int) -> Tensor:
    """One row loss of dense cosines; reductions in float32 whatever the matrices are in."""
    if name == "info_nce":
        logits = cosines / TEMPERATURE
        return (logits.float().logsumexp(1) - logits.diagonal(offset).float()).mean()
    assert teacher is not None
    if name == "margin":
        logits = shifted(cosines, teacher, offset) / TEMPERATURE
        return (logits.float().logsumexp(1) - logits.diagonal(offset).float()).mean()
    if name == "alignment_kl":
        log_r = torch.log_softmax(cosines / KL_STUDENT, 1, dtype=torch.float32)
        log_q = torch.log_softmax(teacher / KL_TEACHER, 1, dtype=torch.float32)
        return (log_q.exp() * (log_q - log_r)).sum(1).mean()
    hole = torch.full_like(cosines.diagonal(offset), -torch.inf)
    log_r = (cosines / TEMPERATURE).diagonal_scatter(hole, offset)
    log_r = torch.log_softmax(log_r, 1, dtype=torch.float32)
    log_r = log_r.diagonal_scatter(torch.zeros_like(hole, dtype=torch.float32), offset)
    q = (teacher / RANK_TEACHER).diagonal_scatter(hole, offset)
    return -(torch.softmax(q, 1, dtype=torch.float32) * log_r).sum(1).mean()


def dense_loss(
    rows: Tensor, cols: Tensor, teacher: Tensor | None, name: str, offset: int, dtype: torch.dtype
) -> Tensor:
    """Weighted row losses of raw vectors; all N^2 matrices at once.

    float32 matrices are products of float32 vectors (in TF32 where torch is allowed to), 16-bit
    matrices of 16-bit vectors.
    """
    cosines = unit(rows, dtype) @ unit(cols, dtype).T
    scores = None
    if teacher is not None:
        units = unit(teacher, dtype)
        scores = units[offset : offset + rows.shape[0]] @ units.T
    return torch.stack(
        [
            weight * row_loss(term, cosines, scores, offset)
            for term, weight in terms_of(name).items()
        ]
    ).sum()


def dense(problem: Problem, dtype: torch.dtype, compile_mode: str = "") -> Callable[[], Tensor]:
    """The dense loss of a problem as a function of its current leaves."""
    function: Callable[..., Tensor] = dense_loss
    if compile_mode:
        function = torch.compile(dense_loss, mode=compile_mode, dynamic=False)
    teacher = problem.constants.get("teacher")

    def loss() -> Tensor:
        pair = problem.leaves["rows"], problem.leaves["cols"]
        return function(*pair, teacher, problem.name, problem.shape.offset, dtype)

    return loss


# Row chunks, compiled, gradient in the forward pass


class ChunkOptions(NamedTuple):
    """Static arguments of the chunked loss."""

    name: str
    offset: int
    rows_per_chunk: int
    compiled: bool


def chunk_step(
    cosines: Tensor, teacher: Tensor | None, own: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Loss of a block ``[r, N]`` and its derivative by the cosines, in closed form, in one graph.

    Args:
        cosines: 16-bit block of S.
        teacher: 16-bit block of T, or None.
        own: Column of each row's positive, ``[r]``.
        name: Problem.

    Returns:
        The sum of the row losses (float32) and the derivative of that sum (bfloat16).
    """
    c = cosines.float()
    t = None if teacher is None else teacher.float()
    diagonal = torch.arange(c.shape[1], device=c.device) == own[:, None]
    total = c.new_zeros(())
    grad = torch.zeros_like(c)
    for term, weight in terms_of(name).items():
        value, part = _term(term, c, t, diagonal, own)
        total = total + weight * value
        grad = grad + weight * part
    return total, grad.to(torch.bfloat16)


def _term(
    term: str, c: Tensor, t: Tensor | None, diagonal: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    if term in ("info_nce", "margin"):
        moved, inner = (c, None) if term == "info_nce" else _margin(c, t, diagonal)
        logits = moved / TEMPERATURE
        lse = logits.logsumexp(1, keepdim=True)
        grad = ((logits - lse).exp() - diagonal.float()) / TEMPERATURE
        positive = c.gather(1, own[:, None]) / TEMPERATURE
        return (lse - positive).sum(), grad if inner is None else grad * inner
    assert t is not None
    if term == "alignment_kl":
        log_r = torch.log_softmax(c / KL_STUDENT, 1)
        log_q = torch.log_softmax(t / KL_TEACHER, 1)
        q = log_q.exp()
        return (q * (log_q - log_r)).sum(), (log_r.exp() - q) / KL_STUDENT
    log_r = torch.log_softmax((c / TEMPERATURE).masked_fill(diagonal, -math.inf), 1)
    q = torch.softmax((t / RANK_TEACHER).masked_fill(diagonal, -math.inf), 1)
    value = -(q * log_r.masked_fill(diagonal, 0.0)).sum()
    return value, (log_r.exp() - q) / TEMPERATURE


def _margin(c: Tensor, t: Tensor | None, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    assert t is not None
    c = c.clamp(-1.0, 1.0)
    gate = (c < math.cos(MARGIN)) & ~diagonal
    angle = MARGIN * (1.0 - t)
    rest = (1.0 - c * c).clamp_min(MIN_SINE_SQUARED)
    root = rest.rsqrt()
    cosine, sine = angle.cos(), angle.sin()
    moved = torch.where(gate, c * cosine + rest * root * sine, c)
    return moved, torch.where(gate, cosine - c * sine * root, 1.0)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, cols: Tensor, teacher: Tensor | None, options: ChunkOptions
    ) -> Tensor:
        """`rows`, `cols` and `teacher` are unit vectors in float32."""
        step: Callable[..., tuple[Tensor, Tensor]] = _compiled() if options.compiled else chunk_step
        logit_rows, logit_cols = rows.half(), cols.half()
        scores = None if teacher is None else teacher.half()
        gradient_rows, gradient_cols = rows.bfloat16(), cols.bfloat16()
        wanted = rows.requires_grad or cols.requires_grad
        total = rows.new_zeros(())
        grad_rows, grad_cols = torch.empty_like(rows), torch.zeros_like(cols)
        for start in range(0, len(rows), options.rows_per_chunk):
            part = slice(start, min(start + options.rows_per_chunk, len(rows)))
            own = torch.arange(part.start, part.stop, device=rows.device) + options.offset
            first = slice(part.start + options.offset, part.stop + options.offset)
            block = None if scores is None else scores[first] @ scores.T
            cosines = logit_rows[part] @ logit_cols.T
            value, grad = step(cosines, block, own, options.name)
            total += value
            if wanted:
                grad_rows[part] = grad @ gradient_cols
                accumulate(grad_cols, grad.T, gradient_rows[part])
        ctx.save_for_backward(grad_rows, grad_cols)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (upstream,) = grad_outputs
        grad_rows, grad_cols = ctx.saved_tensors
        # 1/R here, in float32: derivatives of single cells keep their size in 16 bits
        scale = upstream / len(grad_rows)
        return grad_rows * scale, grad_cols * scale, None, None


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with a float32 sum of 16-bit factors."""
    if total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


_cache: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}


def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    if "step" not in _cache:
        _cache["step"] = torch.compile(chunk_step, dynamic=False, fullgraph=True)
    return _cache["step"]


def chunked(
    problem: Problem, rows_per_chunk: int, *, compiled: bool = True
) -> Callable[[], Tensor]:
    """Row chunks of a problem as a function of its current leaves."""
    compiled = compiled and problem.device.type == "cuda"
    options = ChunkOptions(problem.name, problem.shape.offset, rows_per_chunk, compiled)

    def loss() -> Tensor:
        rows, cols = (normalize(problem.leaves[k].float(), dim=1) for k in ("rows", "cols"))
        teacher = problem.constants.get("teacher")
        units = None if teacher is None else normalize(teacher.float(), dim=1)
        return _Chunked.apply(rows, cols, units, options)

    return loss
