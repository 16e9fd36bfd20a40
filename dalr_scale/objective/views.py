"""What the loss terms see of a batch: this rank's rows, and the columns of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

import numpy as np
from dalr_kernels import Similarity
from torch import Tensor

from dalr_scale.objective.ranks import SINGLE_RANK, RankMerges


@dataclass
class Views:
    """The tensors of a batch; as rows (this rank's) and as columns (all ranks').

    Shapes with B rows: z1, z2 [B,H]; p1, p2, u, u_caption [B,P]; z1_image [B,d_v], z1 in the
    width of the image features; aligned_text, aligned_image [B,C], and aligned_unmatched, the
    aligned image of the row that L_cons pairs a row with; image, caption [B,d_v];
    text one [B,H_k] per sentence teacher; tokens/token_mask one [B,T,H_t] and [B,T] per token
    teacher, of this rank's rows only; z1_tokens one [B,H_t] per token teacher; ids [B], -1 for
    text-only rows.
    """

    z1: Tensor
    z2: Tensor
    ids: Tensor
    p1: Tensor | None = None
    p2: Tensor | None = None
    u: Tensor | None = None
    u_caption: Tensor | None = None
    z1_image: Tensor | None = None
    aligned_text: Tensor | None = None
    aligned_image: Tensor | None = None
    aligned_unmatched: Tensor | None = None
    image: Tensor | None = None
    caption: Tensor | None = None
    text: Sequence[Tensor] = ()
    tokens: Sequence[Tensor] = ()
    token_masks: Sequence[Tensor] = ()
    z1_tokens: Sequence[Tensor] = ()

    def part(self, start: int, stop: int) -> Views:
        """Rows ``start .. stop - 1`` of everything."""

        def cut(value: Tensor | Sequence[Tensor] | None) -> Tensor | list[Tensor] | None:
            if value is None:
                return None
            if isinstance(value, Tensor):
                return value[start:stop]
            return [tensor[start:stop] for tensor in value]

        return Views(**{f.name: cut(getattr(self, f.name)) for f in fields(self)})  # pyright: ignore[reportArgumentType]

    def head(self, count: int) -> Views:
        """The first `count` rows of everything."""
        return self.part(0, count)


class KernelOptions(TypedDict, total=False):
    """How ``dalr_kernels`` computes; see ``dalr_kernels.row_losses``. Results agree to rounding."""

    impl: str
    mode: str
    deterministic: bool
    chunk_rows: int | None
    workspace_bytes: int | None


@dataclass(frozen=True)
class LossBatch:
    """One batch as the terms read it.

    Attributes:
        rows: this rank's rows, without padding.
        cols: the columns of the global batch, without padding.
        offset: column of the positive of the first row.
        paired: whether the batch has images; one of plain sentences has not.
        text_weights: mixing weight of each sentence teacher.
        token_weights: mixing weight of each token teacher.
        unmatched: the row whose image each row of the global batch is paired with by L_cons
            (`dalr_scale.objective.cons.unmatched_rows`).
        ranks: merges constants over ranks.
        options: passed to the functions of ``dalr_kernels`` that take them.
    """

    rows: Views
    cols: Views
    offset: int = 0
    paired: bool = True
    text_weights: Sequence[float] = ()
    token_weights: Sequence[float] = (1.0,)
    unmatched: np.ndarray | None = None
    ranks: RankMerges = SINGLE_RANK
    options: KernelOptions = field(default_factory=KernelOptions)
    _similarities: dict[str, Similarity] = field(
        default_factory=dict[str, Similarity], init=False, repr=False, compare=False
    )

    def once(self, name: str, make: Callable[[], Similarity]) -> Similarity:
        """A constant matrix that several terms read: one object, so one pass computes it once."""
        if name not in self._similarities:
            self._similarities[name] = make()
        return self._similarities[name]
