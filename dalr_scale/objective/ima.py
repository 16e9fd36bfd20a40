"""L_IMA: intra-modal alignment of the texts' similarities with those of their teachers."""

from __future__ import annotations

from collections.abc import Mapping

import dalr_kernels as kernels

from dalr_scale.config.schema import IntraAlignmentConfig
from dalr_scale.objective.term import READ, FusedTerm, Needs, divergence
from dalr_scale.objective.text_teachers import text_similarity
from dalr_scale.objective.views import LossBatch


class IntraAlignment(FusedTerm):
    """KL divergence of the student's rows from the rows of S_TT."""

    name = "ima"
    title = "L_IMA"
    batches = "distilled"
    weight_keys = ("intra_weight", "intra_kl_weight")

    def kernel_term(self, objective: IntraAlignmentConfig, batch: LossBatch) -> kernels.AlignmentKL:
        """The divergence between z1 against z2, and S_TT."""
        return kernels.AlignmentKL(
            teacher=text_similarity(objective, batch),
            **divergence(objective, objective.intra_kl_student),
        )

    def needs(self, objective: IntraAlignmentConfig) -> Needs:
        """See `Term.needs`."""
        return Needs(text=True)

    def settings(self, objective: IntraAlignmentConfig) -> Mapping[str, str]:
        """See `Term.settings`."""
        return dict.fromkeys(
            ("intra_kl_student", "kl_student_temperature", "kl_teacher_temperature", "teacher_mix",
             "teacher_similarity_dtype", "teacher_tokenizer", "distil_text_batches"),
            READ,
        )  # fmt: skip
