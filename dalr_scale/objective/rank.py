"""L_rank: ranking distillation, by ListMLE or ListNet."""

from __future__ import annotations

from collections.abc import Mapping

import dalr_kernels as kernels

from dalr_scale.config.schema import RankingConfig
from dalr_scale.objective.term import READ, FusedTerm, Needs, read_if
from dalr_scale.objective.text_teachers import rank_similarity
from dalr_scale.objective.views import LossBatch


class Ranking(FusedTerm):
    """The student's row ranked as the teachers' mixed cosines rank it."""

    name = "rank"
    title = "L_rank"
    batches = "distilled"
    weight_keys = ("intra_weight", "rank_weight")

    def kernel_term(
        self, objective: RankingConfig, batch: LossBatch
    ) -> kernels.ListNet | kernels.ListMLE:
        """The list of z1 against z2, in the order or the distribution of R."""
        teacher = rank_similarity(objective, batch)
        # both student matrices carry 1/tau here: the plain cosine too (only its margin goes)
        margin = objective.margin if objective.rank_student == "margin" else 0.0
        if objective.rank_loss == "listnet":
            return kernels.ListNet(
                objective.temperature, objective.rank_teacher_temperature, margin, teacher=teacher
            )
        return kernels.ListMLE(
            objective.temperature,
            margin,
            objective.listmle_reduction,
            objective.listmle_eps,
            teacher=teacher,
        )

    def needs(self, objective: RankingConfig) -> Needs:
        """See `Term.needs`."""
        return Needs(text=True)

    def settings(self, objective: RankingConfig) -> Mapping[str, str]:
        """See `Term.settings`; `teacher_mix` decides which teachers' features may be stored."""
        list_net = objective.rank_loss == "listnet"
        return {
            "rank_loss": READ,
            "rank_student": READ,
            "rank_teacher_temperature": read_if(list_net, "only ListNet reads it"),
            "listmle_reduction": read_if(not list_net, "only ListMLE reads it"),
            "listmle_eps": read_if(not list_net, "only ListMLE reads it"),
            "teacher_mix": READ,
            "teacher_similarity_dtype": READ,
            "teacher_tokenizer": READ,
            "distil_text_batches": READ,
        }
