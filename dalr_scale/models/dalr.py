"""The one trainable module: encoder, heads and aligners, behind one ``forward``.

Everything that has gradients lives here, so that a ZeRO-3 engine shards all of it, and every use
goes through the engine's forward, so that parameters are gathered when they are needed. A step
calls it in two ways: ``task="encode"`` turns tokens into sentence states chunk by chunk, and
``task="loss"`` turns the states of a whole batch into the loss. Evaluation uses ``"ground"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from dalr_scale.config import ModelConfig, ObjectiveConfig
from dalr_scale.dist.gather import gather_rows
from dalr_scale.errors import UserError
from dalr_scale.models.consistency import Aligner
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.models.heads import GroundingHead, SentenceHead, projection
from dalr_scale.objective import (
    Needs,
    Views,
    cross_terms,
    needs_of,
    text_terms,
    token_terms,
    total_loss,
    unmatched_rows,
)


@dataclass(frozen=True)
class FeatureWidths:
    """Widths of the frozen features at hand; 0: not there."""

    image: int = 0
    caption: int = 0
    text: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass
class TeacherBatch:
    """Frozen features of this rank's rows.

    Shapes: ids [b]; image, caption [b,d_v] where the objective reads them; text: one [b,H_k] per
    teacher; tokens: one [b,T,H_t] per token teacher with masks [b,T] of 0/1. `paired` tells a
    batch of captions from one of plain sentences, whatever features the objective reads.
    """

    ids: Tensor
    paired: bool = False
    image: Tensor | None = None
    caption: Tensor | None = None
    text: Sequence[Tensor] = ()
    tokens: Sequence[Tensor] = ()
    token_masks: Sequence[Tensor] = ()


@dataclass(frozen=True)
class LossSpec:
    """What the loss needs to know besides tensors."""

    objective: ObjectiveConfig
    text_weights: tuple[float, ...] = ()
    seed: int = 1
    needs: Needs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", needs_of(self.objective))


class DalrModel(nn.Module):
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
                for w in widths.tokens
            )

    def _projection(self, width: int, target: int, what: str) -> nn.Linear:
        if getattr(self.spec.objective, f"{what}_projection") == "identity":
            raise UserError(
                f"the encoder is {width} wide and the {what} features {target}: this objective "
                f"compares them directly; set --objective.{what}_projection=learned or use equal "
                "widths"
            )
        return projection(width, target)

    def forward(self, task: str, **inputs):
        """``task`` names the method: ``encode``, ``loss`` or ``ground``."""
        return {"encode": self.encode, "loss": self.loss, "ground": self.ground}[task](**inputs)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B,L] token ids and mask to sentence states h [B,H]."""
        return self.encoder(input_ids, attention_mask)

    def ground(self, states: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Sentence states [n,H] and picture features [m,d_v] in the shared space, [n,P], [m,P]."""
        states = states.to(self.text_grounding.linear.weight.dtype)  # bf16 in a bf16 engine
        return self.text_grounding(states), self.image_grounding(_like(image, states))

    def loss(
        self, states: Tensor, teachers: TeacherBatch, step: int, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total of this rank's rows against the gathered columns, and its terms.

        Args:
            states: [2, b, H], the sentence states of both views.
            teachers: frozen features of the same b rows.
            step: optimizer step; keys the unmatched pictures' shift.
            offset: first row of this rank in the global batch.

        Returns:
            The scalar total (gradients into `states` and the heads) and the detached terms.
        """
        spec = self.spec
        rows = self._rows(states[0], states[1], teachers)
        cols = gather_views(rows)
        objective, weights = spec.objective, spec.text_weights
        distil = teachers.paired or objective.distil_text_batches
        text = text_terms(
            rows, cols, objective, weights, offset, paired=teachers.paired, distil=distil
        )
        others: dict[str, Tensor] = {}
        if teachers.paired and objective.cross_weight > 0:
            unmatched = unmatched_rows(objective, len(cols.ids), spec.seed, step)
            others |= cross_terms(rows, cols, objective, weights, offset, unmatched)
        if distil and objective.intra_weight > 0:
            others |= token_terms(rows, cols, objective, weights, offset)
        detached = {name: value.detach() for name, value in others.items()}
        return total_loss(text, others, objective), text.values | detached

    def _rows(self, h1: Tensor, h2: Tensor, teachers: TeacherBatch) -> Views:
        """Applies the heads that a batch of this kind needs."""
        z1, z2 = self.sentence_head(h1), self.sentence_head(h2)
        needs = self.spec.needs
        rows = Views(z1, z2, teachers.ids, text=teachers.text if needs.text else ())
        if teachers.paired and needs.tokens:
            rows.tokens, rows.token_masks = teachers.tokens, teachers.token_masks
            rows.z1_tokens = [head(z1) for head in self.token_projections]
        if not teachers.paired:
            return rows
        rows.image, rows.caption = teachers.image, teachers.caption
        if needs.grounding:
            rows.p1, rows.p2 = self.text_grounding(h1), self.text_grounding(h2)
            if hasattr(self, "image_grounding"):
                rows.u = self.image_grounding(_like(teachers.image, h1))
            if hasattr(self, "caption_grounding"):
                rows.u_caption = self.caption_grounding(_like(teachers.caption, h1))
        if needs.consistency:
            rows.aligned_text = self.text_aligner(z1)
            rows.aligned_image = self.image_aligner(_like(teachers.image, h1))
        if needs.image_rows:
            rows.z1_image = self.image_projection(z1) if hasattr(self, "image_projection") else z1
        return rows


def gather_views(rows: Views) -> Views:
    """The columns of the global batch: everything a row is compared with.

    Student columns carry gradient back to their owners; teachers', ids and masks do not. Only
    what a term reads as a column is sent.
    """
    return replace(
        rows,
        z1=rows.z1,
        z2=gather_rows(rows.z2),
        ids=gather_rows(rows.ids, grad=False),
        p1=None,
        p2=None,
        u=_gather(rows.u),
        u_caption=_gather(rows.u_caption),
        z1_image=_gather(rows.z1_image),
        aligned_text=None,
        aligned_image=_gather(rows.aligned_image),
        image=_gather(rows.image, grad=False),
        caption=_gather(rows.caption, grad=False),
        text=[gather_rows(e, grad=False) for e in rows.text],
        tokens=[gather_rows(t, grad=False) for t in rows.tokens],
        token_masks=[gather_rows(m, grad=False) for m in rows.token_masks],
        z1_tokens=(),
    )


def _gather(rows: Tensor | None, *, grad: bool = True) -> Tensor | None:
    return None if rows is None else gather_rows(rows, grad=grad)


def _like(features: Tensor | None, states: Tensor) -> Tensor:
    assert features is not None
    return features.to(states.dtype)
