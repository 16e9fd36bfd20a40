"""What the loss terms merge over ranks, with padding left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalr_scale.distributed.collectives import Share, merge_log_sum_exp, merge_max, merge_sum


@dataclass(frozen=True)
class ShareMerges:
    """``dalr_scale.objective.ranks.RankMerges`` over the ranks of a batch.

    Attributes:
        share: this rank's part of the global batch.
    """

    share: Share

    @property
    def contributes(self) -> bool:
        """Whether this rank has a real row."""
        return self.share.valid > 0

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks, in place."""
        return merge_max(values if self.contributes else values.fill_(-torch.inf))

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, in place."""
        return merge_sum(values if self.contributes else values.zero_())

    def log_sum_exp(self, partial_N: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Merged log-sum-exps and means of this rank's kept rows; see `merge_log_sum_exp`.

        Ranks exchange equally many rows, so padding is sent as copies of the last row.
        """
        share = self.share
        if not share.padded:
            return merge_log_sum_exp(partial_N, mean_ND)
        if not self.contributes:  # its one sentence is a copy of another rank's
            partial_N = torch.full_like(partial_N, -torch.inf)
        every = torch.as_tensor(share.places(0, share.ranks * share.rows), device=mean_ND.device)
        partial_C, mean_CD = merge_log_sum_exp(partial_N[every], mean_ND[every])
        return partial_C[: share.kept], mean_CD[: share.kept]
