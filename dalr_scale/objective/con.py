"""L_con: the contrastive loss of two views of a sentence, the one term of every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dalr_kernels as kernels
from typing_extensions import override

from dalr_scale.objective.term import READ, FusedTerm, mask_ids, read_if

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dalr_scale.config.schema import ContrastiveConfig
    from dalr_scale.objective.views import LossBatch


class Contrastive(FusedTerm):
    """InfoNCE with an angular margin; its weight is 1."""

    name = "con"
    title = "L_con"
    weight_keys = ()

    @override
    def kernel_term(self, objective: ContrastiveConfig, batch: LossBatch) -> kernels.InfoNCE:
        """InfoNCE of z1 against z2, positives on the diagonal."""
        with_margin = batch.paired or objective.margin_in_text_batches
        return kernels.InfoNCE(
            objective.temperature,
            objective.margin if with_margin else 0.0,
            **mask_ids(objective, batch.rows, batch.cols),
        )

    @override
    def settings(self, objective: ContrastiveConfig) -> Mapping[str, str]:
        return {
            "temperature": READ,
            "margin": READ,
            "same_image": READ,
            "margin_in_text_batches": read_if(objective.margin > 0, "objective.margin is 0"),
        }
