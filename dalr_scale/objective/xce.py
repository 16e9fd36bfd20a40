"""L_xce: InfoNCE of texts against images, and KDMCSE's branch against CLIP captions."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import dalr_kernels as kernels
from dalr_kernels import Similarity
from typing_extensions import override

from dalr_scale.objective.term import READ, BatchTerm, Needs, mask_ids, read_if

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dalr_scale.config.schema import BranchConfig
    from dalr_scale.objective.views import LossBatch


class Branch(BatchTerm):
    """Half the sum over both views of the InfoNCE with text rows and the branch's columns."""

    batches = "paired"
    labels_key: str

    @abstractmethod
    def columns(self, batch: LossBatch) -> Tensor | None:
        """The grounded columns ``[N, P]``."""

    @abstractmethod
    def threshold_pair(self, batch: LossBatch) -> tuple[Tensor | None, Tensor | None]:
        """Row and column features whose cosine KDMCSE's threshold reads."""

    def labels(self, objective: BranchConfig) -> str:
        """What softens the margin of this branch."""
        return getattr(objective, self.labels_key)

    @override
    def loss(self, objective: BranchConfig, batch: LossBatch) -> Tensor:
        """The mean over this rank's rows."""
        rows, columns = batch.rows, self.columns(batch)
        assert columns is not None and rows.p1 is not None and rows.p2 is not None
        labels = _soft_labels(self.labels(objective), batch)
        above = self._false_negatives(objective, batch)
        losses = [
            kernels.info_nce(
                p, columns, temperature=objective.vl_temperature, margin=objective.vl_margin,
                soft_labels=labels, clamp_soft_labels=objective.clamp_soft_labels,
                mask_above=above, col_offset=batch.offset, check_finite=False,
                **mask_ids(objective, rows, batch.cols), **batch.options,
            )
            for p in (rows.p1, rows.p2)
        ]  # fmt: skip
        return (losses[0] + losses[1]) / 2

    def _false_negatives(
        self, objective: BranchConfig, batch: LossBatch
    ) -> tuple[Similarity, float] | None:
        if objective.false_negative_threshold <= 0:
            return None
        rows, cols = self.threshold_pair(batch)
        assert rows is not None and cols is not None
        return Similarity(((1.0, rows, cols),)), objective.false_negative_threshold

    def needs(self, objective: BranchConfig) -> Needs:
        """What the labels need; a branch adds its own."""
        labels = self.labels(objective)
        consistency = labels == "consistency"
        return Needs(
            image=labels in ("image", "consistency"),
            caption=labels == "caption",
            image_columns=labels == "image",
            caption_columns=labels == "caption",
            grounding=True,
            consistency=consistency,
            consistency_labels=consistency,
        )

    @override
    def settings(self, objective: BranchConfig) -> Mapping[str, str]:
        soft = read_if(objective.vl_margin > 0, "vl_margin is 0: nothing to soften")
        labelled = read_if(self.labels(objective) != "none", "no soft labels")
        return {
            "vl_temperature": READ,
            "vl_margin": READ,
            "false_negative_threshold": READ,
            "same_image": READ,
            self.labels_key: soft,
            "clamp_soft_labels": soft or labelled,
        }


class ImageBranch(Branch):
    """Texts against images."""

    name = "xce"
    title = "L_xce of images"
    weight_keys = ("cross_weight", "image_weight")
    labels_key = "soft_labels"

    @override
    def columns(self, batch: LossBatch) -> Tensor | None:
        return batch.cols.u

    def threshold_pair(self, batch: LossBatch) -> tuple[Tensor | None, Tensor | None]:
        """Caption i against image j."""
        return batch.rows.caption, batch.cols.image

    @override
    def needs(self, objective: BranchConfig) -> Needs:
        threshold = objective.false_negative_threshold > 0
        own = Needs(image=True, image_columns=threshold, caption=threshold)
        return super().needs(objective) | own


class CaptionBranch(Branch):
    """Texts against their captions as CLIP encodes them (KDMCSE)."""

    name = "xce_caption"
    title = "L_xce of captions"
    weight_keys = ("cross_weight", "caption_weight")
    labels_key = "caption_soft_labels"

    @override
    def columns(self, batch: LossBatch) -> Tensor | None:
        return batch.cols.u_caption

    def threshold_pair(self, batch: LossBatch) -> tuple[Tensor | None, Tensor | None]:
        """Image i against caption j."""
        return batch.rows.image, batch.cols.caption

    @override
    def needs(self, objective: BranchConfig) -> Needs:
        threshold = objective.false_negative_threshold > 0
        own = Needs(
            caption=True, caption_grounding=True, caption_columns=threshold, image=threshold
        )
        return super().needs(objective) | own


def _soft_labels(source: str, batch: LossBatch) -> Similarity | None:
    if source == "none":
        return None
    if source == "consistency":
        rows, cols = batch.rows.aligned_text, batch.cols.aligned_image
    else:
        rows, cols = getattr(batch.rows, source), getattr(batch.cols, source)
    assert rows is not None and cols is not None
    return Similarity(((1.0, rows.detach(), cols.detach()),))
