"""One optimizer step's gradients from one global batch, whatever chunks it is encoded in.

Two passes (gradient caching, arXiv 2101.06983): encode all chunks without a graph, take the loss
once over the cached states of the whole global batch, then encode each chunk again with the same
dropout and push the cached gradient through it. Memory holds one chunk's activations. The last
chunk keeps its graph from the first pass, so a batch in one chunk is encoded only once.

Accumulating gradients over smaller batches would not be this: their losses see fewer negatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

import torch
import torch.distributed as dist
from torch import Tensor

from dalr_scale.distributed.collectives import several_ranks
from dalr_scale.global_batch.agreement import require_agreement
from dalr_scale.global_batch.chunks import Chunk, Place, cut
from dalr_scale.global_batch.columns import ColumnGather
from dalr_scale.global_batch.task import B, States, Task, Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from dalr_scale.engines.protocol import Engine


class GlobalBatchStep(Generic[B]):
    """Gradients of a global loss, on any engine.

    Args:
        engine: holds the module and, between the passes, its gradients.
        task: what is encoded and which loss is taken.
        chunk_rows: rows that a rank encodes at a time; 0: all of them.
        seed: of dropout.
        sort: cut chunks from the rows sorted by length, where lengths are given.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task[B],
        *,
        chunk_rows: int = 0,
        seed: int = 1,
        sort: bool = True,
    ) -> None:
        self.engine, self.task = engine, task
        self.chunk_rows, self.seed, self.sort = chunk_rows, seed, sort

    def backward(
        self,
        batch: B,
        *,
        step: int,
        global_rows: int | None = None,
        lengths: Tensor | None = None,
        agreed: bool = False,
        after_loss: Callable[[Tensor, Terms], None] | None = None,
    ) -> tuple[Tensor, Terms]:
        """Leaves the averaged gradient of the global loss on the engine.

        Args:
            batch: this rank's rows; every rank holds equally many.
            step: number of the step; keys dropout.
            global_rows: real rows of the global batch, the others being copies of its last row at
                its end; None: all of them.
            lengths: [b] int64, tokens of each row, on the CPU.
            agreed: whether the ranks have compared the `facts` of their batches already.
            after_loss: called with what is returned as soon as the device has been told to compute
                it, before the backward passes: ranks may talk about it meanwhile (`Vote`).

        Returns:
            This rank's part of the loss (the mean over its rows, weighted where some are padding)
            and its terms, detached; their means over ranks are those of the global batch.

        Raises:
            UserError: the ranks hold different kinds or sizes of batches; raised on all of them.
        """
        engine, place = self.engine, self.place(batch, step, global_rows)
        if not agreed:
            require_agreement(self.facts(batch, place), step, engine.device)
        order, chunks = cut(place, self.chunk_rows, lengths, engine.device, sort=self.sort)
        gather = self.start_gather(batch, order)
        with engine.gradients(len(chunks)):
            states, last = self.encode_all(batch, place, chunks, gather)
            gathered = gather.wait() if gather else {}
            loss, terms = engine.apply(self.task.loss, states, gathered, batch, place)
            if after_loss is not None:
                after_loss(loss.detach(), terms)
            engine.backward(loss)
            for chunk in reversed(chunks):
                piece, last = last or self.encode(self.task.take(batch, chunk), chunk), None
                engine.backward(_with_cached_gradient(piece, states, chunk))
        return loss.detach(), terms

    def place(self, batch: B, step: int, global_rows: int | None = None) -> Place:
        """Where this rank's rows stand in the global batch of a step."""
        return Place.here(step, self.seed, self.task.count(batch), global_rows)

    def facts(self, batch: B, place: Place) -> dict[str, str]:
        """What must be the same on all ranks, in words for an error message."""
        ranks = dist.get_world_size() if several_ranks() else 1
        return {
            "step": str(place.step),
            "rows": str(place.rows),
            "global rows": str(place.global_rows or ranks * place.rows),
            "chunk rows": str(self.chunk_rows or place.rows),
        } | self.task.facts(batch)

    def start_gather(self, batch: B, order: Tensor) -> ColumnGather | None:
        """Sends the columns that no encoder makes on their way; nothing to do on one rank."""
        if not several_ranks():
            return None
        gather = ColumnGather(order)
        for name, rows in self.task.constants(batch).items():
            gather.add(name, rows.to(self.engine.device))
        return gather

    def encode_all(
        self, batch: B, place: Place, chunks: list[Chunk], gather: ColumnGather | None
    ) -> tuple[States, States | None]:
        """First pass: the states of all rows as leaves, and the last chunk's own, with graph."""
        states: States = {}
        piece: States | None = None
        for chunk in chunks:
            if gather is not None and self.engine.gathers_weights:
                gather.settle()
            part = self.task.take(batch, chunk)
            piece = self.encode(part, chunk, grad=chunk is chunks[-1])
            for name, own in piece.items():
                if name not in states:
                    states[name] = own.new_empty(place.rows, *own.shape[1:])
                states[name][chunk.rows] = own.detach()
            if gather is not None:
                gather.add_chunk(self.columns(part, piece), chunk.slots)
        return {name: whole.requires_grad_() for name, whole in states.items()}, piece

    def encode(self, part: B, chunk: Chunk, *, grad: bool = True) -> States:
        """States of a chunk in one forward; the same dropout at every call.

        Two forwards before one backward would break activation checkpointing under ZeRO
        (https://github.com/deepspeedai/DeepSpeed/issues/988), so a task with several views of a row
        puts them on the batch axis.
        """
        self.task.seed(chunk)
        with torch.set_grad_enabled(grad):
            return self.engine.encode(self.task.encode, part)

    def columns(self, part: B, piece: States) -> dict[str, Tensor]:
        """What other ranks compare their rows with, for the rows of a chunk."""
        detached = {name: own.detach() for name, own in piece.items()}
        with torch.no_grad():
            return self.engine.apply(self.task.columns, detached, part)


def _with_cached_gradient(piece: States, states: States, chunk: Chunk) -> Tensor:
    """A scalar whose gradient in the chunk's states is the one that the loss has left."""
    parts = [
        (own * cached[chunk.rows]).sum()
        for name, own in piece.items()
        if (cached := states[name].grad) is not None
    ]
    return torch.stack(parts).sum()
