"""L_CMA: cross-modal alignment, in both directions between texts and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dalr_kernels as kernels
from dalr_kernels import Similarity
from typing_extensions import override

from dalr_scale.objective.term import READ, BatchTerm, Needs, divergence, divergence_settings
from dalr_scale.objective.text_teachers import TEACHER_KEYS, text_similarity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dalr_scale.config.schema import CrossAlignmentConfig
    from dalr_scale.objective.views import LossBatch


class CrossAlignment(BatchTerm):
    """Half the sum of both directions.

    Images against texts follow S_VV, a softmax over a column whose rows are on all ranks; texts
    against images follow S_TT, a softmax over a row.
    """

    name = "cma"
    title = "L_CMA"
    batches = "paired"
    weight_keys = ("cross_weight", "cross_kl_weight")

    @override
    def loss(self, objective: CrossAlignmentConfig, batch: LossBatch) -> Tensor:
        """The mean over this rank's texts and images."""
        rows, cols, ranks = batch.rows, batch.cols, batch.ranks
        assert rows.image is not None and cols.image is not None and rows.z1_image is not None
        arguments = divergence(objective, objective.cross_kl_student)
        images = Similarity(((1.0, rows.image, cols.image),))
        texts = text_similarity(objective, batch)
        # a copy of another rank's row has nothing to learn from the columns
        own = rows.z1_image if ranks.contributes else rows.z1_image.detach()
        by_image = kernels.column_alignment_kl(
            own, cols.image, images, col_offset=batch.offset, merge_max=ranks.maximum,
            merge_sum=ranks.sum, **arguments,
        )  # fmt: skip
        by_text = kernels.alignment_kl(
            rows.z1_image, cols.image, texts, col_offset=batch.offset, check_finite=False,
            **arguments, **batch.options,
        )  # fmt: skip
        return (by_image + by_text) / 2

    @override
    def needs(self, objective: CrossAlignmentConfig) -> Needs:
        return Needs(image=True, image_columns=True, text=True, image_rows=True)

    @override
    def settings(self, objective: CrossAlignmentConfig) -> Mapping[str, str]:
        own = ("cross_kl_student", "image_projection")
        keys = dict.fromkeys((*own, *TEACHER_KEYS), READ)
        return keys | divergence_settings(objective.cross_kl_student)
