"""Differentiable gathers, and the one rule of gradient scale.

**The rule.** Rank r owns rows r*b ... (r+1)*b - 1 of the global batch of N = W*b rows and
returns the *mean loss of its own b rows*. Columns of the similarity matrices are gathered with
gradient, whose backward pass is a reduce-scatter **sum**: a column receives the gradient
contributions of all ranks. The engine then **averages** parameter gradients over ranks. The factors
1/b and 1/W make exactly the gradient of the mean over all N rows; there is no factor W. The
rule holds with gradient caching too, because the cached gradients come out of this same pass.

**Padded batches.** The last batch of an epoch may have N rows that W does not divide. Every rank
then holds c = ceil(N/W) rows, so that all collectives stay equally long; the places after row N-1
repeat it. Gathered columns are cut to their first N. Rank r has v_r real rows, and the mean over
them is weighted v_r * W / N: averaged over ranks this is the mean over the N rows again (`Share`).

Gathering without gradient loses the columns' part, and no factor repairs its direction
(discussed at length in https://github.com/mlfoundations/open_clip/issues/616).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

_group: Any = None
_single_rank = False


def open_column_group(timeout: timedelta) -> None:
    """Gives the columns a process group of their own; a collective call, once per process group.

    Columns travel while encoders run. In the default group they would queue with the parameters
    that ZeRO-3 gathers for these very encoders.
    """
    global _group
    _group = dist.new_group(timeout=timeout) if dist.get_world_size() > 1 else None


def column_group() -> dist.ProcessGroup | None:
    """The columns' process group; None is torch's name for the default group."""
    return _group


def several_ranks() -> bool:
    """Whether there are other ranks to gather from."""
    return not _single_rank and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def single_rank() -> Iterator[None]:
    """Inside, this rank acts as a single process: for trials without the other ranks."""
    global _single_rank
    _single_rank = True
    try:
        yield
    finally:
        _single_rank = False


@dataclass(frozen=True)
class Share:
    """A rank's part of a global batch whose end may be padded.

    A rank without a real row keeps one copy of the last row, at its true place: it takes part in
    every collective with finite numbers, and weighs nothing.

    Attributes:
        rows: rows that every rank holds, c.
        first: place of this rank's first row in the padded batch, r * c.
        global_rows: real rows of the global batch, N.
        ranks: W.
    """

    rows: int
    first: int
    global_rows: int
    ranks: int

    @classmethod
    def of(cls, rows: int, first: int = 0, global_rows: int | None = None) -> Share:
        """The share of this rank; without `global_rows` the rows of all ranks are real."""
        ranks = dist.get_world_size() if several_ranks() else 1
        return cls(rows, first, ranks * rows if global_rows is None else global_rows, ranks)

    @property
    def padded(self) -> bool:
        """Whether some rank holds padding; the same on every rank."""
        return self.global_rows < self.ranks * self.rows

    @property
    def valid(self) -> int:
        """This rank's real rows, v: its first ones."""
        return min(max(self.global_rows - self.first, 0), self.rows)

    @property
    def kept(self) -> int:
        """Rows that the losses see: the real ones, or one copy of the last row."""
        return max(self.valid, 1)

    @property
    def offset(self) -> int:
        """Place of the first kept row in the global batch."""
        return min(self.first, self.global_rows - 1)

    @property
    def weight(self) -> float:
        """What the mean over this rank's rows counts before ranks are averaged."""
        return self.valid * self.ranks / self.global_rows

    def places(self, first: int, count: int) -> np.ndarray:
        """Rows of the global batch at `count` places of the padded one, int64."""
        return np.minimum(np.arange(first, first + count), self.global_rows - 1)

    def real(self, local: Tensor) -> Tensor:
        """The real ones of this rank's rows [c, ...], perhaps none."""
        return local[: self.valid] if self.padded else local


def gather_rows(local: Tensor, *, grad: bool = True) -> Tensor:
    """Concatenates every rank's rows in rank order.

    Args:
        local: [b, ...], the same shape and dtype on every rank.
        grad: whether gradients flow back to the owners (reduce-scatter sum).

    Returns:
        [W * b, ...].
    """
    if not several_ranks():
        return local if grad else local.detach()
    gathered = _all_gather(local.detach())
    return with_gradient(gathered, local) if grad else gathered


def with_gradient(gathered: Tensor, local: Tensor) -> Tensor:
    """Columns that are already here, as a differentiable function of this rank's rows.

    Half-precision columns come out in float32 (exactly), so that the gradient contributions of
    all ranks are summed in float32 in backward.

    Args:
        gathered: [W * b, ...], the rows of all ranks.
        local: [b, ...], this rank's rows, with graph.

    Returns:
        [W * b, ...], float32 or float64.
    """
    gathered = gathered if gathered.dtype == torch.float64 else gathered.float()
    if torch.is_grad_enabled() and local.requires_grad:
        return _WithGradient.apply(local, gathered)  # pyright: ignore[reportReturnType]
    return gathered


def merge_log_sum_exp(partial_N: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Merges every rank's log-sum-exps and weighted means; each rank keeps its own rows.

    Args:
        partial_N: this rank's log-sum-exp for every row of the global batch, -inf where empty.
        mean_ND: the mean of something with these weights, any value where empty.

    Returns:
        Log-sum-exp [b] and weighted mean [b, D] over all ranks, for this rank's rows.
    """
    if not several_ranks():
        return partial_N, mean_ND
    top_N = merge_max(partial_N.clone())
    top_N.masked_fill_(top_N == -torch.inf, 0.0)
    weight_N1 = (partial_N - top_N).exp().unsqueeze(1)
    total = _reduce_scatter_sum(torch.cat([mean_ND * weight_N1, weight_N1], dim=1))
    weight_R1 = total[:, -1:]
    rows = len(total)
    own_top = top_N[dist.get_rank() * rows :][:rows]
    mean_RD = total[:, :-1] / weight_R1.masked_fill(weight_R1 == 0.0, 1.0)
    return own_top + weight_R1.squeeze(1).log(), mean_RD


def merge_sum(values: Tensor) -> Tensor:
    """Sum over ranks of a constant, in place."""
    if several_ranks():
        dist.all_reduce(values, group=_group)
    return values


def merge_max(values: Tensor) -> Tensor:
    """Maximum over ranks of a constant, in place."""
    if several_ranks():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=_group)
    return values


def all_reduce_sum(local: Tensor) -> Tensor:
    """Sum over ranks whose backward pass sums the gradients over ranks too."""
    if not several_ranks():
        return local
    return _AllReduceSum.apply(local)  # pyright: ignore[reportReturnType]


def pad_to_common_length(tokens: Tensor, mask: Tensor, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pads [b,T,...] by `fill` and its mask [b,T] by 0, to the longest T of all ranks."""
    if not several_ranks():
        return tokens, mask
    longest = torch.tensor([tokens.shape[1]], device=tokens.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=_group)
    extra = int(longest) - tokens.shape[1]
    pad = torch.nn.functional.pad
    widths = (0, 0) * (tokens.ndim - 2) + (0, extra)
    return pad(tokens, widths, value=fill), pad(mask, (0, extra))


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, gathered: Tensor) -> Tensor:
        ctx.dtype = local.dtype
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _reduce_scatter_sum(grad_outputs[0]).to(ctx.dtype), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total, group=_group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total, group=_group)
        return total


def _all_gather(local: Tensor) -> Tensor:
    local = local.contiguous()
    shape = (dist.get_world_size() * local.shape[0], *local.shape[1:])
    gathered = torch.empty(shape, dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(gathered, local, group=_group)
    return gathered


def _reduce_scatter_sum(total: Tensor) -> Tensor:
    total = total.contiguous()
    rows = total.shape[0] // dist.get_world_size()
    own = torch.empty((rows, *total.shape[1:]), dtype=total.dtype, device=total.device)
    dist.reduce_scatter_tensor(own, total, group=_group)
    return own
