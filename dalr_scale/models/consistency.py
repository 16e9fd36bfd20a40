"""The auxiliary consistency task: do this sentence and this picture belong together?

Its aligners map both sides into a space whose cosines are the soft labels of the picture branch.
Batch normalisation uses the statistics of the *global* batch: ``torch.nn.SyncBatchNorm`` refuses
CPU tensors in a world of several ranks, and at one rank it would pass silently.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalr_scale.dist.gather import all_reduce_sum, several_ranks


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the rows of all ranks, always with batch statistics.

    There are no running statistics: the module works in training only and is not exported.
    Statistics are taken in float32 at least, in two passes (mean, then centred squares).
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalises [b, D] by the mean and biased variance over all ranks' rows."""
        x = x_BD if x_BD.dtype == torch.float64 else x_BD.float()
        ranks = dist.get_world_size() if several_ranks() else 1
        rows = x.shape[0] * ranks
        centred = x - all_reduce_sum(x.sum(0)) / rows
        variance = all_reduce_sum(centred.square().sum(0)) / rows
        normal = centred * torch.rsqrt(variance + self.eps)
        return (normal * self.weight + self.bias).to(x_BD.dtype)


class Aligner(nn.Sequential):
    """Linear-BN-ReLU-Linear-BN-ReLU; outputs are non-negative, hence cosines in [0, 1]."""

    def __init__(self, width: int, output_width: int) -> None:
        super().__init__(
            nn.Linear(width, width),
            GlobalBatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, output_width),
            GlobalBatchNorm(output_width),
            nn.ReLU(),
        )
