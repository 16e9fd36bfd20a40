"""L_cons: the auxiliary consistency task on matched and unmatched pairs of text and image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dalr_kernels as kernels
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dalr_scale.objective.term import READ, BatchTerm, Needs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dalr_scale.config.schema import ConsistencyConfig
    from dalr_scale.objective.views import LossBatch


def unmatched_rows(objective: ConsistencyConfig, rows: int, seed: int, step: int) -> np.ndarray:
    """n(i) of L_cons for the whole global batch: the row whose image row i is paired with.

    The shift is drawn from (seed, step), never from a generator with state, so that every rank
    and every resumed run draws the same one.
    """
    if objective.unmatched == "roll":
        shift = 5
    else:
        shift = int(np.random.default_rng([seed, step, 7]).integers(1, max(rows, 2)))
    return (np.arange(rows) - shift) % rows


class Consistency(BatchTerm):
    """Matched pairs closer, unmatched ones apart; the mean is over the pairs that are kept."""

    name = "cons"
    title = "L_cons"
    batches = "paired"
    weight_keys = ("cross_weight", "consistency_weight")

    @override
    def loss(self, objective: ConsistencyConfig, batch: LossBatch) -> Tensor:
        """The mean over the kept pairs of the global batch; a pair of one image is dropped."""
        rows, cols = batch.rows, batch.cols
        assert rows.aligned_text is not None and rows.aligned_image is not None
        assert rows.aligned_unmatched is not None and batch.unmatched is not None
        own_rows, all_rows = len(rows.ids), len(cols.ids)
        partner = torch.as_tensor(batch.unmatched, device=rows.ids.device)
        keep = torch.ones(all_rows, dtype=torch.bool, device=rows.ids.device)
        if objective.unmatched == "shift":
            keep = (cols.ids != cols.ids[partner]) | (cols.ids < 0)
        own = slice(batch.offset, batch.offset + own_rows)
        total, _ = kernels.consistency(
            rows.aligned_text, rows.aligned_image, rows.aligned_unmatched, keep[own]
        )
        # a mean over this rank's rows like the other terms, whose rows count N / kept pairs each
        return total * (all_rows / own_rows) / (all_rows + keep.sum())

    @override
    def needs(self, objective: ConsistencyConfig) -> Needs:
        return Needs(image=True, image_columns=True, consistency=True)

    @override
    def settings(self, objective: ConsistencyConfig) -> Mapping[str, str]:
        return {"unmatched": READ}
