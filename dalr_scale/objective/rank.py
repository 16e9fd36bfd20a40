"""L_rank: ranking distillation, by ListMLE or ListNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dalr_kernels as kernels
from typing_extensions import override

from dalr_scale.objective.term import READ, FusedTerm, Needs, read_if
from dalr_scale.objective.text_teachers import TEACHER_KEYS, rank_similarity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dalr_scale.config.schema import RankingConfig
    from dalr_scale.objective.views import LossBatch


class Ranking(FusedTerm):
    """The student's row ranked as the teachers' mixed cosines rank it."""

    name = "rank"
    title = "L_rank"
    batches = "distilled"
    weight_keys = ("intra_weight", "rank_weight")

    @override
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

    @override
    def needs(self, objective: RankingConfig) -> Needs:
        return Needs(text=True)

    @override
    def settings(self, objective: RankingConfig) -> Mapping[str, str]:
        list_net = objective.rank_loss == "listnet"
        with_margin = objective.rank_student == "margin"
        return {
            "temperature": READ,
            "margin": read_if(with_margin, "rank_student is cosine"),
            "rank_loss": READ,
            "rank_student": READ,
            "rank_teacher_temperature": read_if(list_net, "only ListNet reads it"),
            "listmle_reduction": read_if(not list_net, "only ListMLE reads it"),
            "listmle_eps": read_if(not list_net, "only ListMLE reads it"),
            "distil_text_batches": READ,
            **dict.fromkeys(TEACHER_KEYS, READ),
        }
