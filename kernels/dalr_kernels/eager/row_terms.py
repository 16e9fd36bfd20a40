"""All terms of a call on one block of cosines after the other, with their gradients.

Terms with the same margin share the matrix of cosines after it; its derivative is applied once to
the sum of their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from dalr_kernels.eager import closed_form
from dalr_kernels.eager.closed_form import Block, BufferPool, GradientSink, Shift

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dalr_kernels.similarity import Similarity


class BlockTerm(Protocol):
    """A term whose losses and gradients have a closed form on a block of rows."""

    @property
    def weight(self) -> float:
        """Factor in the total."""
        ...

    def similarities(self) -> list[Similarity]:
        """Constant matrices that the term reads."""
        ...

    def shift(self) -> Shift:
        """The margin that is applied to the cosines before the term sees them."""
        ...

    def closed_losses(self, student: Tensor, block: Block, gradient_sink: GradientSink) -> Tensor:
        """Losses ``[r]`` of a block of cosines after the margin; see `terms.InfoNCE`."""
        ...


class RowTerms:
    """The terms of one call, with everything that does not depend on the block.

    Attributes:
        weights: Factor of each term in the total.
    """

    def __init__(
        self, terms: Sequence[BlockTerm], num_rows: int, col_offset: int, dtype: torch.dtype
    ) -> None:
        self.terms = terms
        self.weights = [term.weight for term in terms]
        self._num_rows = num_rows
        self._col_offset = col_offset
        similarities = [similarity for term in terms for similarity in term.similarities()]
        self._units = {id(s): s.normalized(dtype) for s in similarities}
        self._labels: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._dtype = dtype
        self._shifts: dict[tuple[float, int, bool], tuple[Shift, list[int]]] = {}
        for index, term in enumerate(terms):
            shift = term.shift()
            key = shift.margin, id(shift.labels), shift.clamp
            self._shifts.setdefault(key, (shift, []))[1].append(index)

    def losses(
        self, cosines: Tensor, start: int, grad: Tensor | None, buffers: BufferPool
    ) -> Tensor:
        """Every term's losses ``[K, r]`` of rows `start` to ``start + r``.

        Args:
            cosines: Block of cosines ``[r, N]``.
            start: First row.
            grad: Filled with the derivative of the weighted mean over all rows, or None.
            buffers: Temporary matrices of the block's shape.
        """
        stop = start + len(cosines)
        losses_Kr = cosines.new_empty(len(self.terms), len(cosines))
        if grad is not None:
            grad.zero_()
        with ExitStack() as borrowed:
            constants: dict[int, Tensor] = {}

            def constant(similarity: Similarity) -> Tensor:
                key = id(similarity)
                if key not in constants:
                    (matrix,) = borrowed.enter_context(buffers.borrow(1, len(cosines)))
                    constants[key] = self._units[key].block(start, stop, matrix)
                return constants[key]

            block = Block(
                start, stop, self._col_offset + start, buffers, constant, self._comparable
            )
            for shift, members in self._shifts.values():
                self._shifted_losses(cosines, shift, members, block, grad, losses_Kr)
        return losses_Kr

    def _shifted_losses(
        self,
        cosines: Tensor,
        shift: Shift,
        members: list[int],
        block: Block,
        grad: Tensor | None,
        losses_Kr: Tensor,
    ) -> None:
        """The losses of the terms that share a margin."""
        margin, labels, clamp = shift
        if margin == 0.0:
            self._add(cosines, members, block, grad, losses_Kr)
            return
        soft = None if labels is None else block.constant(labels)
        with block.buffers.borrow(3, len(cosines)) as (student, inner, part):
            if grad is None:
                inner = part = None
            else:
                part.zero_()
            closed_form.angular_margin(
                cosines, block.first_column, margin, soft, clamp, student, inner, block.buffers
            )
            self._add(student, members, block, part, losses_Kr)
            if grad is not None and inner is not None and part is not None:
                grad.addcmul_(part, inner)

    def _add(
        self,
        student: Tensor,
        members: list[int],
        block: Block,
        grad: Tensor | None,
        losses_Kr: Tensor,
    ) -> None:
        for index in members:
            gradient_sink = GradientSink(grad, self.weights[index] / self._num_rows)
            losses_Kr[index] = self.terms[index].closed_losses(student, block, gradient_sink)

    def _comparable(self, row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
        key = id(row_ids), id(col_ids)
        if key not in self._labels:
            self._labels[key] = closed_form.comparable(row_ids, col_ids, self._dtype)
        return self._labels[key]
