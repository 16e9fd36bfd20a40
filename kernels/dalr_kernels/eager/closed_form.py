"""Row losses and their gradients in closed form, on one block of cosines at a time.

The same losses as in ``reference.py``, whose definitions and autograd they are tested against.
Every function works in place on matrices that all blocks share, because memory traffic and
allocation cost more than the arithmetic. A gradient is the derivative of the weighted
mean over *all* rows by the block's elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dalr_kernels import reference
from dalr_kernels.margin import MIN_SINE_SQUARED
from dalr_kernels.similarity import Similarity

# Subtracted from the logit of an excluded element: its exponential is 0, its product with 0 is too.
EXCLUDED = 1e30
# Largest spread of a list's logits for which ListMLE sums exponentials and their inverses: N times
# exp(60) is within float32.
LARGEST_SPREAD = {torch.float32: 60.0, torch.float64: 600.0}


@dataclass
class BufferPool:
    """Matrices of a block's shape, made when first needed and used by block after block.

    Attributes:
        like: Gives type and device.
        rows: Most rows of a block.
        cols: Columns.
    """

    like: Tensor
    rows: int
    cols: int
    _free: list[Tensor] = field(default_factory=list)

    def acquire(self) -> Tensor:
        """An unused matrix ``[rows, cols]`` with any content."""
        return self._free.pop() if self._free else self.like.new_empty(self.rows, self.cols)

    def release(self, *matrices: Tensor) -> None:
        """Return what `acquire` gave."""
        self._free.extend(matrices)

    @contextmanager
    def borrow(self, count: int, rows: int) -> Iterator[list[Tensor]]:
        """`count` matrices cut to `rows` rows, for the length of a ``with``."""
        borrowed = [self.acquire() for _ in range(count)]
        try:
            yield [matrix[:rows] for matrix in borrowed]
        finally:
            self.release(*borrowed)


class Shift(NamedTuple):
    """The angular margin of a term.

    Attributes:
        margin: Radians; 0 leaves the cosines as they are.
        labels: Constant soft labels that lessen it, or None.
        clamp: Clamp the labels to [0, 1].
    """

    margin: float
    labels: Similarity | None = None
    clamp: bool = False


class GradientSink(NamedTuple):
    """Where the derivative of a block's losses goes.

    Attributes:
        grad: Matrix ``[r, N]`` to add to, or None.
        factor: Weight of a row's loss.
    """

    grad: Tensor | None
    factor: float

    def add(self, part: Tensor, scale: float) -> None:
        """Add `scale` times `part`, weighted."""
        if self.grad is not None:
            self.grad.add_(part, alpha=scale * self.factor)


@dataclass
class Block:
    """A span of rows while its losses are made.

    Attributes:
        start: First row.
        stop: The row after the last one.
        first_column: Column of the positive of the first row.
        buffers: Matrices ``[stop - start, N]``.
        constant: A constant similarity's block.
        labels: Image ids as floating-point numbers that compare alike.
    """

    start: int
    stop: int
    first_column: int
    buffers: BufferPool
    constant: Callable[[Similarity], Tensor]
    labels: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def comparable(row_ids: Tensor, col_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids as numbers that are equal where ids >= 0 are; negative ids of rows equal nothing.

    Comparing floating-point numbers into a floating-point matrix is several times faster than
    integers into booleans. Distinct ids are numbered, so that all of them are exact.
    """
    _, numbers = torch.cat([row_ids, col_ids]).unique(return_inverse=True)
    rows, cols = numbers.to(dtype).split([len(row_ids), len(col_ids)])
    return rows.masked_fill(row_ids < 0, math.nan), cols


def angular_margin(
    cosines: Tensor,
    first_column: int,
    margin: float,
    soft: Tensor | None,
    clamp: bool,
    shifted: Tensor,
    inner: Tensor | None,
    buffers: BufferPool,
) -> None:
    """Fill in the cosines after the margin and, unless it is None, their derivative `inner`.

    ``c cos a + sqrt(1 - c^2) sin a`` as in ``margin.py``, with the angle a set to 0 outside the
    gate: that gives c itself there, and a derivative of 1.

    Args:
        cosines: ``[r, N]``.
        first_column: Column of the positive of row 0.
        margin: Angle in radians.
        soft: Soft labels s with ``a = margin (1 - s)``, or None.
        clamp: Clamp the soft labels to [0, 1].
        shifted: Result ``[r, N]``.
        inner: Derivative of the result by `cosines`, or None.
        buffers: Temporary matrices.
    """
    smallest = MIN_SINE_SQUARED[cosines.dtype]
    with buffers.borrow(2, len(cosines)) as (cos_angle, sin_angle):
        # comparisons into a float matrix are vectorized, those into booleans are not
        gate = torch.lt(cosines, math.cos(margin), out=sin_angle)
        gate.diagonal(first_column).zero_()
        if soft is None:
            torch.mul(gate, math.cos(margin) - 1.0, out=cos_angle).add_(1.0)
            sin_angle.mul_(math.sin(margin))
        else:
            angle = torch.mul(soft, -margin, out=cos_angle).add_(margin)
            if clamp:
                angle.clamp_(0.0, margin)
            torch.sin(angle.mul_(gate), out=sin_angle)
            cos_angle.cos_()
        # 1 - c^2 as (1 + c) - c (1 + c), which loses nothing near c = -1
        sine = torch.add(cosines, 1.0, out=shifted).addcmul_(shifted, cosines, value=-1.0)
        if inner is not None:
            torch.gt(sine, smallest, out=inner)  # where clamped, the root is constant
        sine.clamp_min_(smallest).sqrt_()
        if inner is not None:
            inner.mul_(cosines).mul_(sin_angle).div_(sine)
            torch.sub(cos_angle, inner, out=inner)
        sine.mul_(sin_angle).addcmul_(cos_angle, cosines)


def softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Row softmax into `out`; returns the log-sum-exp of the rows ``[r]``."""
    torch.softmax(logits, dim=1, out=out)
    # The largest probability is at least 1/N, so its logarithm is exact to rounding.
    return logits.amax(dim=1) - out.amax(dim=1).log()


def info_nce(
    student: Tensor,
    first_column: int,
    temperature: float,
    excluded: Tensor | None,
    gradient_sink: GradientSink,
    buffers: BufferPool,
) -> Tensor:
    """``logsumexp_j A_ij - A_ii``; ``[r]``.

    Args:
        student: Cosines after the margin ``[r, N]``; the derivative by them goes to the sink.
        first_column: Column of the positive of row 0.
        temperature: Divides the cosines.
        excluded: Positive where an element is left out, 0 elsewhere and on the diagonal.
        sink: Takes the derivative.
        buffers: Temporary matrices.
    """
    with buffers.borrow(2, len(student)) as (logits, probabilities):
        torch.mul(student, 1.0 / temperature, out=logits)
        positives = logits.diagonal(first_column).clone()
        if excluded is not None:
            logits.add_(excluded, alpha=-EXCLUDED)
        losses = softmax(logits, probabilities) - positives
        if gradient_sink.grad is not None:
            gradient_sink.add(probabilities, 1.0 / temperature)
            gradient_sink.grad.diagonal(first_column).sub_(gradient_sink.factor / temperature)
    return losses


def alignment_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    teacher_temperature: float,
    gradient_sink: GradientSink,
    buffers: BufferPool,
) -> Tensor:
    """Divergence of the teacher's softmax from the student's; arguments as in `info_nce`."""
    with buffers.borrow(4, len(student)) as (logits, targets, probabilities, target_probabilities):
        torch.mul(student, 1.0 / temperature, out=logits)
        torch.mul(teacher, 1.0 / teacher_temperature, out=targets)
        log_sums = softmax(logits, probabilities) - softmax(targets, target_probabilities)
        losses = targets.sub_(logits).mul_(target_probabilities).sum(dim=1) + log_sums
        gradient_sink.add(probabilities, 1.0 / temperature)
        gradient_sink.add(target_probabilities, -1.0 / temperature)
    return losses


def list_net(
    student: Tensor,
    first_column: int,
    teacher: Tensor,
    temperature: float,
    teacher_temperature: float,
    gradient_sink: GradientSink,
    buffers: BufferPool,
) -> Tensor:
    """Cross-entropy of the lists without the diagonal; arguments as in `info_nce`."""
    if student.shape[1] == 1:
        return student.new_zeros(len(student))
    with buffers.borrow(3, len(student)) as (logits, probabilities, target_probabilities):
        torch.mul(teacher, 1.0 / teacher_temperature, out=logits)
        logits.diagonal(first_column).fill_(-math.inf)
        torch.softmax(logits, dim=1, out=target_probabilities)
        torch.mul(student, 1.0 / temperature, out=logits)
        logits.diagonal(first_column).fill_(-math.inf)
        log_sums = softmax(logits, probabilities)
        logits.diagonal(first_column).zero_()  # 0 * -inf is NaN
        losses = log_sums - logits.mul_(target_probabilities).sum(dim=1)
        gradient_sink.add(probabilities, 1.0 / temperature)
        gradient_sink.add(target_probabilities, -1.0 / temperature)
    return losses


def list_mle(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    eps: float,
    share: float,
    gradient_sink: GradientSink,
    buffers: BufferPool,
) -> Tensor:
    """Plackett-Luce likelihood of the teacher's order, `share` times the sum over the list.

    With s_j the sum of exp(y_k) over the list from place j on, the derivative by y_k is exp(y_k)
    times the sum of 1 / (s_j + eps) over the places up to k, less 1. The list is kept from its
    end to its head, so that s is a running sum that starts with the smallest exponentials.
    """
    if 2.0 / temperature > LARGEST_SPREAD[student.dtype]:
        return _list_mle_by_autograd(student, teacher, temperature, eps, share, gradient_sink)
    with buffers.borrow(3, len(student)) as (scores, sums, inverse):
        order = ascending_order(teacher, scores)
        top = student.amax(dim=1, keepdim=True) / -temperature
        torch.add(top, student, alpha=1.0 / temperature, out=sums)
        exponentials = torch.gather(sums, 1, order, out=scores)
        losses = exponentials.sum(dim=1).neg_()
        torch.cumsum(exponentials.exp_(), dim=1, out=sums)
        if eps > 0.0:
            sums.add_(eps)
        if gradient_sink.grad is not None:
            torch.cumsum(sums.reciprocal().flip(1), dim=1, out=inverse)
            grads = exponentials.mul_(inverse.flip(1)).sub_(1.0)
            gradient_sink.add(inverse.scatter_(1, order, grads), share / temperature)
            if eps > 0.0:
                _through_the_maximum(student, grads, share / temperature, gradient_sink, inverse)
        losses += sums.log_().sum(dim=1)
    return losses * share


def ascending_order(scores: Tensor, buffer: Tensor) -> Tensor:
    """Columns by rising score, of equal scores the last column first; ``[r, N]``, see RANK_GRID."""
    num_cols = scores.shape[1]
    ranks = torch.mul(scores, 1.0 / reference.RANK_GRID[scores.dtype], out=buffer).round_()
    if scores.dtype == torch.float64:  # too many bits to share an integer with a column
        return ranks.flip(1).argsort(dim=1, stable=True).neg_().add_(num_cols - 1)
    # Distinct integers need no stable sort, which takes half as long again.
    keys = ranks.long().mul_(2 ** (num_cols - 1).bit_length())
    keys -= torch.arange(num_cols, device=keys.device)
    return keys.argsort(dim=1)


def _through_the_maximum(
    student: Tensor, grads: Tensor, scale: float, gradient_sink: GradientSink, buffer: Tensor
) -> None:
    """With eps the loss depends on the maximum that is subtracted from the list."""
    torch.eq(student, student.amax(dim=1, keepdim=True), out=buffer)
    buffer.mul_(grads.sum(dim=1, keepdim=True) / buffer.sum(dim=1, keepdim=True))
    gradient_sink.add(buffer, -scale)


def _list_mle_by_autograd(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    eps: float,
    share: float,
    gradient_sink: GradientSink,
) -> Tensor:
    """In logarithms, where the exponentials of one list do not fit the type."""
    with torch.set_grad_enabled(gradient_sink.grad is not None):
        student = student.detach().requires_grad_(gradient_sink.grad is not None)
        losses = reference.list_mle_rows(
            student, 0, teacher, temperature=temperature, mean=False, eps=eps
        )
        if gradient_sink.grad is not None:
            (grad,) = torch.autograd.grad(losses.sum(), student)
            gradient_sink.add(grad, share)
    return losses.detach() * share
