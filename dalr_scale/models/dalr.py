"""The one trainable module: encoder, heads and aligners.

Everything that has gradients lives here, so that a ZeRO-3 engine shards all of it, and every use
goes through the engine's forward, so that parameters are gathered when they are needed. A step
uses it in three ways: ``encode`` turns tokens into sentence states chunk by chunk, ``columns``
turns a chunk's states into what other ranks compare their rows with, and ``loss`` turns the states
of a whole batch into the loss. Evaluation uses ``ground``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from dalr_scale.config import ModelConfig, ObjectiveConfig
from dalr_scale.distributed.collectives import Share, gather_rows, with_gradient
from dalr_scale.distributed.merging import ShareMerges
from dalr_scale.engines.protocol import RunsFunctions
from dalr_scale.errors import UserError
from dalr_scale.models.consistency import Aligner
from dalr_scale.models.heads import GroundingHead, SentenceHead, projection
from dalr_scale.objective.cons import unmatched_rows
from dalr_scale.objective.registry import needs_of
from dalr_scale.objective.term import Needs
from dalr_scale.objective.total import batch_loss
from dalr_scale.objective.views import LossBatch, Views

if TYPE_CHECKING:
    import numpy as np

    from dalr_scale.data.stream.batch import Batch
    from dalr_scale.models.encoder import SentenceEncoder

Pair: TypeAlias = Sequence[Tensor] | Tensor
"""Two tensors of the same shape, or one that stacks them."""


@dataclass(frozen=True)
class FeatureWidths:
    """Widths of the frozen features at hand; 0: not there."""

    image: int = 0
    caption: int = 0
    text: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class LossSpec:
    """What the loss needs to know besides tensors; weights are by position of the teachers."""

    objective: ObjectiveConfig
    text_weights: tuple[float, ...] = ()
    seed: int = 1
    token_weights: tuple[float, ...] = (1.0,)
    needs: Needs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", needs_of(self.objective))


class DalrModel(RunsFunctions):
    """Encoder and heads of a run. Heads that the objective does not use are not built."""

    def __init__(
        self, encoder: SentenceEncoder, model: ModelConfig, spec: LossSpec, widths: FeatureWidths
    ) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.widths = encoder, widths
        self.grounding_width = model.grounding_width
        self.consistency_width = model.consistency_width
        width, needs = encoder.width, spec.needs
        self.sentence_head = SentenceHead(width, model.head_init_std)
        if needs.grounding:
            self.text_grounding = GroundingHead(width, model.grounding_width)
            if spec.objective.image_weight > 0:
                self.image_grounding = GroundingHead(widths.image, model.grounding_width)
            if needs.caption_grounding:
                self.caption_grounding = GroundingHead(widths.caption, model.grounding_width)
        if needs.consistency:
            self.text_aligner = Aligner(width, model.consistency_width)
            self.image_aligner = Aligner(widths.image, model.consistency_width)
        if needs.image_rows and width != widths.image:
            self.image_projection = self._projection(width, widths.image, "image")
        if needs.tokens:
            self.token_projections = nn.ModuleList(
                nn.Identity() if width == w else self._projection(width, w, "token")
                for w in self.token_widths
            )

    @property
    def token_widths(self) -> tuple[int, ...]:
        """Widths that z1 is compared with in L_g2l: one where the teachers' tokens are mixed."""
        mixed = self.spec.objective.g2l_mix == "features"
        return self.widths.tokens[:1] if mixed else self.widths.tokens

    def _projection(self, width: int, target: int, what: str) -> nn.Linear:
        if getattr(self.spec.objective, f"{what}_projection") == "identity":
            raise UserError(
                f"the encoder is {width} wide and the {what} features {target}: this objective "
                f"compares them directly; set --objective.{what}_projection=learned or use equal "
                "widths"
            )
        return projection(width, target)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B,L] token ids and mask to sentence states h [B,H]."""
        return self.encoder(input_ids, attention_mask)

    def ground(self, states: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Sentence states [n,H] and image features [m,d_v] in the shared space, [n,P], [m,P]."""
        states = states.to(self.text_grounding.linear.weight.dtype)  # bf16 in a bf16 engine
        return self.text_grounding(states), self.image_grounding(_like(image, states))

    def columns(self, states: Pair, batch: Batch) -> dict[str, Tensor]:
        """What the rows of all ranks are compared with, for some rows of this rank.

        The aligned images are missing: their normalisation needs the whole global batch.

        Args:
            states: the sentence states of both views, [n, H] each.
            batch: the same rows.

        Returns:
            Columns by their name in `Views`, [n, ...] each.
        """
        rows = self._rows(states[0], states[1], batch)
        return {n: v for n in EARLY_COLUMNS if (v := getattr(rows, n)) is not None} | {
            f"z1_tokens{k}": z1 for k, z1 in enumerate(rows.z1_tokens)
        }

    def loss(
        self, states: Pair, batch: Batch, step: int, offset: int,
        gathered: Mapping[str, Tensor] | None = None, global_rows: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The total of this rank's rows against the gathered columns, and its terms.

        Args:
            states: the sentence states of both views, [b, H] each.
            batch: the same b rows, with all frozen features.
            step: optimizer step; keys the unmatched images' shift.
            offset: first row of this rank in the global batch.
            gathered: columns that have been gathered already, by name.
            global_rows: real rows of the global batch, the others being padding at its end; None:
                all of them.

        Returns:
            The scalar total (gradients into `states` and the heads) and the detached terms, both
            weighted so that their means over ranks are those over the global batch.
        """
        spec = self.spec
        share = Share.of(len(states[0]), offset, global_rows)
        rows = self._with_teachers(self._rows(states[0], states[1], batch), batch)
        cols = gather_views(rows, gathered or {}, spec.needs)
        unmatched = unmatched_rows(spec.objective, share.global_rows, spec.seed, step)
        if batch.paired and spec.needs.consistency:
            self._align(rows, cols, unmatched, share)
        if share.padded:
            rows, cols = rows.head(share.kept), cols.head(share.global_rows)
        compared = LossBatch(
            rows, cols, share.offset, batch.paired, spec.text_weights, spec.token_weights,
            unmatched, ShareMerges(share),
        )  # fmt: skip
        found = batch_loss(spec.objective, compared)
        total, values = found.total, found.terms
        if share.padded:
            total = total * share.weight
            values = {name: value * share.weight for name, value in values.items()}
        return total, values

    def _rows(self, h1: Tensor, h2: Tensor, batch: Batch) -> Views:
        """Applies the heads that work row by row and that a batch of this kind needs."""
        z1, z2 = self.sentence_head(h1), self.sentence_head(h2)
        needs = self.spec.needs
        rows = Views(z1, z2, batch.image_ids)
        if not batch.paired:
            return rows
        if needs.tokens:
            rows.z1_tokens = [head(z1) for head in self.token_projections]
        if needs.grounding:
            rows.p1, rows.p2 = self.text_grounding(h1), self.text_grounding(h2)
            if hasattr(self, "image_grounding"):
                rows.u = self.image_grounding(_like(batch.image, h1))
            if hasattr(self, "caption_grounding"):
                rows.u_caption = self.caption_grounding(_like(batch.caption, h1))
        if needs.image_rows:
            rows.z1_image = self.image_projection(z1) if hasattr(self, "image_projection") else z1
        return rows

    def _align(self, rows: Views, cols: Views, unmatched: np.ndarray, share: Share) -> None:
        """Adds what the consistency task reads; its normalisation is over the global batch.

        The unmatched images are aligned here rather than fetched: as a rearrangement of the
        global batch they have the same statistics, and nothing has to go back to their owners.
        """
        assert rows.image is not None
        rows.aligned_text = self.text_aligner(rows.z1, share)
        aligned = self.image_aligner(_like(rows.image, rows.z1), share)
        rows.aligned_image = aligned
        if self.spec.objective.consistency_weight > 0:
            assert cols.image is not None
            own = unmatched[share.places(share.first, share.rows)]
            partners = cols.image[torch.as_tensor(own, device=cols.image.device)]
            rows.aligned_unmatched = self.image_aligner(_like(partners, rows.z1), share)
        if self.spec.needs.consistency_labels:
            cols.aligned_image = gather_rows(aligned, grad=False)

    def _with_teachers(self, rows: Views, batch: Batch) -> Views:
        """Adds the frozen features that the losses compare directly."""
        needs = self.spec.needs
        rows.text = batch.text if needs.text else ()
        if batch.paired:
            rows.image = batch.image if needs.image else None
            rows.caption = batch.caption if needs.caption else None
            if needs.tokens:
                rows.tokens, rows.token_masks = batch.token_features, batch.token_masks
        return rows


# Student columns that are gathered chunk by chunk, with gradient.
EARLY_COLUMNS = ("z2", "u", "u_caption")


def teacher_columns(batch: Batch, needs: Needs) -> dict[str, Tensor]:
    """The frozen columns of this rank's rows; they can be gathered before a sentence is encoded.

    Tokens are not among them: they stay where they are (``dalr_kernels.eager.global_to_local``).
    """
    columns = {"ids": batch.image_ids}
    columns |= {f"text{k}": e for k, e in enumerate(batch.text if needs.text else ())}
    if batch.paired and needs.image_columns and batch.image is not None:
        columns["image"] = batch.image
    if batch.paired and needs.caption_columns and batch.caption is not None:
        columns["caption"] = batch.caption
    return columns


def gather_views(rows: Views, gathered: Mapping[str, Tensor], needs: Needs) -> Views:
    """The columns of the global batch: everything a row is compared with.

    Student columns carry gradient back to their owners; teachers', ids and masks do not. Only
    what a term reads as a column is sent, and only what has not been gathered before.
    """

    def column(name: str, local: Tensor | None) -> Tensor | None:
        if local is None:
            return None
        if name in gathered:
            return with_gradient(gathered[name], local)
        return gather_rows(local)

    def constant(name: str, local: Tensor | None) -> Tensor | None:
        if local is None or name in gathered:
            return gathered.get(name)
        return gather_rows(local, grad=False)

    student = {name: column(name, getattr(rows, name)) for name in EARLY_COLUMNS}
    ids = constant("ids", rows.ids)
    assert ids is not None and student["z2"] is not None
    return replace(
        rows,
        **student,
        ids=ids,
        p1=None,
        p2=None,
        z1_image=None,
        image=constant("image", rows.image if needs.image_columns else None),
        caption=constant("caption", rows.caption if needs.caption_columns else None),
        text=[constant(f"text{k}", e) for k, e in enumerate(rows.text)],
        z1_tokens=[constant(f"z1_tokens{k}", z1) for k, z1 in enumerate(rows.z1_tokens)],
        tokens=(),
        token_masks=(),
    )


def _like(features: Tensor | None, states: Tensor) -> Tensor:
    assert features is not None
    return features.to(states.dtype)
