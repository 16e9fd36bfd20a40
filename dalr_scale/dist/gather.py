"""Differentiable gathers, and the one rule of gradient scale.

**The rule.** Rank r owns rows r*b ... (r+1)*b - 1 of the global batch of N = W*b rows and
returns the *mean loss of its own b rows*. Columns of the similarity matrices are gathered with
gradient, whose backward pass is a reduce-scatter **sum**: a column receives what the rows of all
ranks say about it. The engine then **averages** parameter gradients over ranks. The factors 1/b
and 1/W make exactly the gradient of the mean over all N rows; no factor W stands anywhere. The
rule holds with gradient caching too, because the cached gradients come out of this same pass.

Gathering without gradient loses the columns' part, and no factor repairs its direction
(discussed at length in https://github.com/mlfoundations/open_clip/issues/616).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local: Tensor, *, grad: bool = True) -> Tensor:
    """Concatenates every rank's rows in rank order.

    Args:
        local: [b, ...], the same shape and dtype on every rank.
        grad: whether gradients flow back to the owners (reduce-scatter sum).

    Returns:
        [W * b, ...].
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local if grad else local.detach()
    if grad and torch.is_grad_enabled() and local.requires_grad:
        return _GatherRows.apply(local)  # pyright: ignore[reportReturnType]
    return _all_gather(local.detach())


def all_reduce_sum(local: Tensor) -> Tensor:
    """Sum over ranks whose backward pass sums the gradients over ranks too."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return _AllReduceSum.apply(local)  # pyright: ignore[reportReturnType]


def pad_to_common_length(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pads [b,T,...] and its mask [b,T] on the token axis to the longest T of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tokens, mask
    longest = torch.tensor([tokens.shape[1]], device=tokens.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    extra = int(longest) - tokens.shape[1]
    pad = torch.nn.functional.pad
    return pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, extra)), pad(mask, (0, extra))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _all_gather(local)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _reduce_scatter_sum(grad_outputs[0])


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total)
        return total


def _all_gather(local: Tensor) -> Tensor:
    local = local.contiguous()
    shape = (dist.get_world_size() * local.shape[0], *local.shape[1:])
    gathered = torch.empty(shape, dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(gathered, local)
    return gathered


def _reduce_scatter_sum(total: Tensor) -> Tensor:
    total = total.contiguous()
    rows = total.shape[0] // dist.get_world_size()
    own = torch.empty((rows, *total.shape[1:]), dtype=total.dtype, device=total.device)
    dist.reduce_scatter_tensor(own, total)
    return own
