"""L_IMA: intra-modal alignment of the texts' similarities with those of their teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dalr_kernels as kernels
from typing_extensions import override

from dalr_scale.objective.term import READ, FusedTerm, Needs, divergence, divergence_settings
from dalr_scale.objective.text_teachers import TEACHER_KEYS, text_similarity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dalr_scale.config.schema import IntraAlignmentConfig
    from dalr_scale.objective.views import LossBatch


class IntraAlignment(FusedTerm):
    """KL divergence of the student's rows from the rows of S_TT."""

    name = "ima"
    title = "L_IMA"
    batches = "distilled"
    weight_keys = ("intra_weight", "intra_kl_weight")

    @override
    def kernel_term(self, objective: IntraAlignmentConfig, batch: LossBatch) -> kernels.AlignmentKL:
        """The divergence between z1 against z2, and S_TT."""
        return kernels.AlignmentKL(
            teacher=text_similarity(objective, batch),
            **divergence(objective, objective.intra_kl_student),
        )

    @override
    def needs(self, objective: IntraAlignmentConfig) -> Needs:
        return Needs(text=True)

    @override
    def settings(self, objective: IntraAlignmentConfig) -> Mapping[str, str]:
        own = ("intra_kl_student", "distil_text_batches")
        keys = dict.fromkeys((*own, *TEACHER_KEYS), READ)
        return keys | divergence_settings(objective.intra_kl_student)
