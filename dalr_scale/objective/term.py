"""What a loss term consists of: name, weight, needs, settings, and one of three formulas.

* `FusedTerm`: a loss on the similarities of z1 and z2 that ``dalr_kernels`` has; all of them
  share one pass, in the fused kernels where these run.
* `RowTerm`: any formula that gives a loss per row; it runs in row chunks of plain PyTorch.
* `BatchTerm`: a mean over the rows that calls ``dalr_kernels`` itself.

Every term is a mean over this rank's rows (``dalr_scale.distributed.collectives`` says why that is
the right scale). Methods take the configuration of the group that they read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import dalr_kernels as kernels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dalr_scale.config import ObjectiveConfig
    from dalr_scale.config.schema import DivergenceConfig, NegativesConfig
    from dalr_scale.objective.views import LossBatch, Views

KernelTerm = kernels.InfoNCE | kernels.AlignmentKL | kernels.ListNet | kernels.ListMLE

# In `Term.settings`: the key has an effect.
READ = ""


def read_if(condition: bool, otherwise: str) -> str:
    """`READ` where the condition holds, else the reason why the key has no effect."""
    return READ if condition else otherwise


@dataclass(frozen=True)
class Needs:
    """Which heads, features and teachers are used; what no term needs is neither built nor read.

    Attributes:
        image, caption: the features of a rank's own rows.
        image_columns, caption_columns: also those of all other rows, which are then gathered.
        text: the features of the sentence teachers, rows and columns.
        tokens: the tokens of the token teachers, and z1 in their width.
        grounding: texts and images in the shared space (p1, p2, u).
        caption_grounding: CLIP captions in the shared space (u_caption).
        image_rows: z1 in the width of the image features (z1_image).
        consistency: the aligners of the consistency module (aligned_text, aligned_image).
        consistency_labels: the aligned images as columns.
    """

    image: bool = False
    caption: bool = False
    image_columns: bool = False
    caption_columns: bool = False
    text: bool = False
    tokens: bool = False
    grounding: bool = False
    caption_grounding: bool = False
    image_rows: bool = False
    consistency: bool = False
    consistency_labels: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What one or the other needs."""
        names = [f.name for f in fields(self)]
        return Needs(**{n: getattr(self, n) or getattr(other, n) for n in names})


class Term(ABC):
    """A loss term; one object without state.

    Attributes:
        name: in logs, metrics and ``[objective.terms]``.
        title: in messages.
        batches: "all"; "distilled": paired ones, and text-only ones with ``distil_text_batches``;
            "paired".
        weight_keys: keys of ``[objective]`` whose product is the weight. None: the weight is
            ``objective.terms.NAME``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    batches: ClassVar[Literal["all", "distilled", "paired"]] = "all"
    weight_keys: ClassVar[tuple[str, ...] | None] = None

    def factors(self, objective: ObjectiveConfig) -> list[float]:
        """The factors of the weight."""
        if self.weight_keys is None:
            return [objective.terms.get(self.name, 0.0)]
        return [getattr(objective, key) for key in self.weight_keys]

    def weight(self, objective: ObjectiveConfig) -> float:
        """The term's factor in the total."""
        return math.prod(self.factors(objective), start=1.0)

    def active(self, objective: ObjectiveConfig) -> bool:
        """Whether the term has a weight."""
        return all(factor > 0 for factor in self.factors(objective))

    def runs(self, objective: ObjectiveConfig, *, paired: bool) -> bool:
        """Whether an active term is computed in a batch of this kind."""
        distilled = self.batches == "distilled" and objective.distil_text_batches
        return paired or distilled or self.batches == "all"

    def needs(self, objective: ObjectiveConfig) -> Needs:
        """What the active term reads beside z1, z2 and ids."""
        del objective
        return Needs()

    def settings(self, objective: ObjectiveConfig) -> Mapping[str, str]:
        """The keys of ``[objective]`` that the active term may read, beside its weights.

        Returns:
            For each key `READ`, or why it has no effect with the other settings as they are.
        """
        del objective
        return {}


class FusedTerm(Term):
    """A loss on the similarities of z1 and z2 that the shared pass computes."""

    @abstractmethod
    def kernel_term(self, objective: ObjectiveConfig, batch: LossBatch) -> KernelTerm:
        """The term as ``dalr_kernels`` knows it; its weight is filled in by the caller."""


class RowTerm(Term):
    """A loss per row without a fused form.

    It runs in row chunks and is computed a second time in the backward pass, so that memory stays
    linear in the batch. The formula must therefore give the same numbers each time.
    """

    @abstractmethod
    def rows_loss(self, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
        """One loss per row, ``[r]``, of a batch whose rows are a few of this rank's.

        The positive of row i is column ``batch.offset + i``.
        """


class BatchTerm(Term):
    """A mean over the rows that is no sum of row losses on z1 and z2."""

    @abstractmethod
    def loss(self, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
        """The mean over this rank's rows, a differentiable scalar."""


class ImageIds(TypedDict):
    """Arguments that leave captions of the same image out of the negatives."""

    row_ids: Tensor | None
    col_ids: Tensor | None


def mask_ids(objective: NegativesConfig, rows: Views, cols: Views) -> ImageIds:
    """The image ids, or None where captions of the same image stay negatives."""
    if objective.same_image == "keep":
        return {"row_ids": None, "col_ids": None}
    return {"row_ids": rows.ids, "col_ids": cols.ids}


class Divergence(TypedDict):
    """Arguments of the alignment losses of ``dalr_kernels``."""

    margin: float
    temperature: float
    student_temperature: float
    teacher_temperature: float


def divergence(objective: DivergenceConfig, student: str) -> Divergence:
    """Both temperatures, and the student matrix: the margin matrix over tau, or plain cosines."""
    with_margin = student == "margin"
    return {
        "margin": objective.margin if with_margin else 0.0,
        "temperature": objective.temperature if with_margin else 1.0,
        "student_temperature": objective.kl_student_temperature,
        "teacher_temperature": objective.kl_teacher_temperature,
    }


def divergence_settings(student: str) -> dict[str, str]:
    """The keys that `divergence` reads, as in `Term.settings`."""
    matrix = read_if(student == "margin", "the student matrix is the cosine")
    return {
        "margin": matrix,
        "temperature": matrix,
        "kl_student_temperature": READ,
        "kl_teacher_temperature": READ,
    }
