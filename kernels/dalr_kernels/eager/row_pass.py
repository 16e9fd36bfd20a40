"""All terms of a shared pass on one block of cosines after the other, with their slopes.

Terms with the same margin share the matrix of cosines after it; its derivative is applied once to
the sum of their slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from dalr_kernels.eager import closed_form
from dalr_kernels.eager.closed_form import Block, Sink, Spare
from dalr_kernels.similarity import Similarity
from dalr_kernels.terms import InfoNCE, Term

# A margin and the labels that soften it.
Shift = tuple[float, Similarity | None, bool]


class RowPass:
    """The terms of one call, with everything that does not depend on the block.

    Attributes:
        weights: Factor of each term in the total.
    """

    def __init__(
        self, terms: Sequence[Term], num_rows: int, col_offset: int, dtype: torch.dtype
    ) -> None:
        self.terms = terms
        self.weights = [term.weight for term in terms]
        self._num_rows = num_rows
        self._col_offset = col_offset
        similarities = [similarity for term in terms for similarity in term.similarities()]
        self._units = {id(s): s.normalised(dtype) for s in similarities}
        self._labels: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._dtype = dtype
        self._shifts: dict[tuple[float, int, bool], tuple[Shift, list[int]]] = {}
        for index, term in enumerate(terms):
            shift = shift_of(term)
            key = shift[0], id(shift[1]), shift[2]
            self._shifts.setdefault(key, (shift, []))[1].append(index)

    def losses(self, cosines: Tensor, start: int, slope: Tensor | None, spare: Spare) -> Tensor:
        """Every term's losses ``[K, r]`` of rows `start` to ``start + r``.

        Args:
            cosines: Block of cosines ``[r, N]``.
            start: First row.
            slope: Filled with the derivative of the weighted mean over all rows, or None.
            spare: Lends matrices of the block's shape.
        """
        stop = start + len(cosines)
        losses_Kr = cosines.new_empty(len(self.terms), len(cosines))
        if slope is not None:
            slope.zero_()
        with ExitStack() as lent:
            constants: dict[int, Tensor] = {}

            def constant(similarity: Similarity) -> Tensor:
                key = id(similarity)
                if key not in constants:
                    (matrix,) = lent.enter_context(spare.lend(1, len(cosines)))
                    constants[key] = self._units[key].block(start, stop, matrix)
                return constants[key]

            block = Block(start, stop, self._col_offset + start, spare, constant, self._comparable)
            for shift, members in self._shifts.values():
                self._shifted_losses(cosines, shift, members, block, slope, losses_Kr)
        return losses_Kr

    def _shifted_losses(
        self,
        cosines: Tensor,
        shift: Shift,
        members: list[int],
        block: Block,
        slope: Tensor | None,
        losses_Kr: Tensor,
    ) -> None:
        """The losses of the terms that share a margin."""
        margin, labels, clamp = shift
        if margin == 0.0:
            self._add(cosines, members, block, slope, losses_Kr)
            return
        soft = None if labels is None else block.constant(labels)
        with block.spare.lend(3, len(cosines)) as (student, inner, part):
            if slope is None:
                inner = part = None
            else:
                part.zero_()
            closed_form.angular_margin(
                cosines, block.first_column, margin, soft, clamp, student, inner, block.spare
            )
            self._add(student, members, block, part, losses_Kr)
            if slope is not None and inner is not None and part is not None:
                slope.addcmul_(part, inner)

    def _add(
        self,
        student: Tensor,
        members: list[int],
        block: Block,
        slope: Tensor | None,
        losses_Kr: Tensor,
    ) -> None:
        for index in members:
            sink = Sink(slope, self.weights[index] / self._num_rows)
            losses_Kr[index] = self.terms[index].closed_losses(student, block, sink)

    def _comparable(self, row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
        key = id(row_ids), id(col_ids)
        if key not in self._labels:
            self._labels[key] = closed_form.comparable(row_ids, col_ids, self._dtype)
        return self._labels[key]


def shift_of(term: Term) -> Shift:
    """What becomes of the cosines before the term sees them."""
    if isinstance(term, InfoNCE) and term.margin > 0.0 and term.soft_labels is not None:
        return term.margin, term.soft_labels, term.clamp_soft_labels
    return term.margin, None, False
