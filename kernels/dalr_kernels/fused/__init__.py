"""Fused Triton kernels for the row losses: entry points that need no Triton to be imported.

| kernel | file | work |
|---|---|---|
| `normalize_kernel`, `normalize_gradient_kernel` | normalize_kernels.py | unit vectors and back |
| `row_kernel` | row_kernel.py | mode "workspace": losses and gradient of a row |
| `statistics_kernel` | statistics_kernel.py | mode "stream": sums of the rows |
| `gradient_kernel` | gradient_kernel.py | mode "stream": gradient of a block |

A call goes through operator.py (autograd), launch.py (one call), call.py (what all its kernels
need), and workspace.py or stream.py (the launches of one mode).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dalr_kernels.fused.tuning import Limits, describe, flatten, groups, pack
from dalr_kernels.precision import multiplies_in_half
from dalr_kernels.terms import InfoNCE, Term

__all__ = ["Limits", "groups", "unavailable", "weighted_mean"]

# Here, not in the function: torch.compile of torch 2.11 cannot trace the search.
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(rows: Tensor, cols: Tensor) -> str | None:
    """Why the kernels cannot run on these tensors, or None."""
    if not HAS_TRITON:
        return "needs the package triton"
    for name, tensor in (("rows", rows), ("cols", cols)):
        if tensor.dtype not in DTYPES:
            return f"computes in float32, {name} are {tensor.dtype}"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if not rows.is_cuda and not interpreted:
        return f"needs CUDA tensors, rows are on {rows.device} (TRITON_INTERPRET=1 emulates)"
    return None


def weighted_mean(
    rows: Tensor, cols: Tensor, terms: Sequence[Term], col_offset: int, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the terms of one group (see `groups`) and the mean of each, ``[K]``."""
    from dalr_kernels.fused.operator import row_losses

    scalars, layout, similarities = describe(terms)
    matrices = flatten(similarities)
    ids = [(t.row_ids, t.col_ids) for t in terms if isinstance(t, InfoNCE)]
    row_ids, col_ids = ids[0] if ids else (None, None)
    grad = torch.is_grad_enabled()
    total, means, _, _ = row_losses(
        rows,
        cols,
        *pack(scalars, layout, matrices),
        None if row_ids is None else row_ids.long().contiguous(),
        None if col_ids is None else col_ids.long().contiguous(),
        col_offset,
        limits.workspace_bytes,
        limits.chunk,
        limits.mode,
        multiplies_in_half(),
        grad and rows.requires_grad,
        grad and cols.requires_grad,
    )
    order = {"InfoNCE": 0, "AlignmentKL": 1, "ListNet": 2}
    return total, torch.stack([means[order[type(term).__name__]] for term in terms])
