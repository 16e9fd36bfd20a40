"""Merges over ranks, as the terms see them; who makes the collective calls hands them in."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RankMerges(Protocol):
    """Merges constants over the ranks of a batch. Padding adds nothing to any result."""

    @property
    def contributes(self) -> bool:
        """False on a rank whose only row is a copy of another rank's."""
        ...

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks; may overwrite `values`."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks; may overwrite `values`."""
        ...

    def log_sum_exp(self, partial_N: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Merges log-sum-exps and the means that their weights give.

        Args:
            partial_N: this rank's log-sum-exp for every row of the global batch, -inf where empty.
            mean_ND: the mean of something with these weights, any value where empty.

        Returns:
            Log-sum-exp [R] and weighted mean [R, D] over all ranks, for this rank's rows.
        """
        ...


class SingleRank:
    """The merges of one process: what it has is all there is."""

    contributes = True

    def maximum(self, values: Tensor) -> Tensor:
        """See `RankMerges.maximum`."""
        return values

    def sum(self, values: Tensor) -> Tensor:
        """See `RankMerges.sum`."""
        return values

    def log_sum_exp(self, partial_N: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor]:
        """See `RankMerges.log_sum_exp`."""
        return partial_N, mean_ND


SINGLE_RANK: RankMerges = SingleRank()
