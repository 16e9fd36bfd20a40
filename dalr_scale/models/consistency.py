"""The auxiliary consistency task: do this sentence and this image belong together?

Its aligners map both sides into a space whose cosines are the soft labels of the image branch.
Batch normalisation uses the statistics of the *global* batch, padding left out:
``torch.nn.SyncBatchNorm`` refuses CPU tensors in a world of several ranks, and at one rank it would
pass silently.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalr_scale.distributed.collectives import Share, all_reduce_sum


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

    def forward(self, x_BD: Tensor, share: Share | None = None) -> Tensor:
        """Normalises [b, D] by the mean and biased variance over all ranks' real rows.

        Padding, which `share` tells from real rows, is normalised alike.
        """
        share = share or Share.of(len(x_BD))
        x = x_BD if x_BD.dtype == torch.float64 else x_BD.float()
        rows = share.global_rows
        centred = x - all_reduce_sum(share.real(x).sum(0)) / rows
        variance = all_reduce_sum(share.real(centred).square().sum(0)) / rows
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

    def forward(self, x_BD: Tensor, share: Share | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Aligns [b, D]; `share` as in `GlobalBatchNorm`."""
        for layer in self:
            x_BD = layer(x_BD, share) if isinstance(layer, GlobalBatchNorm) else layer(x_BD)
        return x_BD
