"""L_CMA: cross-modal alignment, in both directions between texts and images."""

from __future__ import annotations

from collections.abc import Mapping

import dalr_kernels as kernels
from dalr_kernels import Similarity
from torch import Tensor

from dalr_scale.config.schema import CrossAlignmentConfig
from dalr_scale.objective.term import READ, BatchTerm, Needs, divergence
from dalr_scale.objective.text_teachers import text_similarity
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

    def needs(self, objective: CrossAlignmentConfig) -> Needs:
        """See `Term.needs`."""
        return Needs(image=True, image_columns=True, text=True, image_rows=True)

    def settings(self, objective: CrossAlignmentConfig) -> Mapping[str, str]:
        """See `Term.settings`."""
        return dict.fromkeys(
            ("cross_kl_student", "image_projection", "kl_student_temperature",
             "kl_teacher_temperature", "teacher_mix", "teacher_similarity_dtype",
             "teacher_tokenizer"),
            READ,
        )  # fmt: skip
