"""One optimizer step's gradients from one global batch, whatever chunks it is encoded in.

Two passes (gradient caching, arXiv 2101.06983): encode all chunks without a graph, take the loss
once over the cached states of the whole global batch, then encode each chunk again with the same
dropout and push the cached gradient through it. Memory holds one chunk's activations. The last
chunk keeps its graph from the first pass, so a batch in one chunk is encoded only once.

Accumulating gradients over smaller batches would not be this: their contrast sets are smaller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dalr_scale.dist.engine import Engine
from dalr_scale.models.dalr import TeacherBatch


@dataclass(frozen=True)
class StepInputs:
    """This rank's rows of a global batch: token ids and mask [b,L], and the frozen features."""

    input_ids: Tensor
    attention_mask: Tensor
    teachers: TeacherBatch
    step: int
    rank: int
    seed: int
    micro_rows: int


def backward_global_batch(engine: Engine, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Leaves the averaged gradient of the global loss on the engine.

    Returns:
        This rank's share of the loss (the mean over its rows) and its terms, detached.
    """
    chunks = list(_chunks(len(inputs.input_ids), inputs.micro_rows))
    with engine.gradients():
        pieces = [
            _encode(engine, inputs, i, c, grad=i == len(chunks) - 1) for i, c in enumerate(chunks)
        ]
        states = torch.cat([p.detach() for p in pieces], dim=1).requires_grad_()
        offset = inputs.rank * len(inputs.input_ids)
        loss, terms = engine.forward(
            "loss", states=states, teachers=inputs.teachers, step=inputs.step, offset=offset
        )
        engine.backward(loss)
        assert states.grad is not None
        for index, chunk in reversed(list(enumerate(chunks))):
            last = index == len(chunks) - 1
            piece = pieces[index] if last else _encode(engine, inputs, index, chunk, grad=True)
            engine.backward((piece * states.grad[:, chunk]).sum())
    return loss.detach(), terms


def _chunks(rows: int, micro_rows: int) -> Iterator[slice]:
    size = micro_rows or rows
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _encode(engine: Engine, inputs: StepInputs, index: int, chunk: slice, *, grad: bool) -> Tensor:
    """Both views of a chunk in one forward, [2, rows, H]; the same dropout at every call.

    Two forwards before one backward would break activation checkpointing under ZeRO
    (https://github.com/deepspeedai/DeepSpeed/issues/988), so views share the batch axis.
    """
    mask = inputs.attention_mask[chunk]
    length = int(mask.sum(1).max())
    ids, mask = inputs.input_ids[chunk, :length], mask[:, :length]
    seed_dropout(inputs.seed, inputs.step, inputs.rank, index)
    with torch.set_grad_enabled(grad):
        states = engine.forward(
            "encode", input_ids=ids.repeat(2, 1), attention_mask=mask.repeat(2, 1)
        )
    return states.unflatten(0, (2, -1))


def seed_dropout(*key: int) -> None:
    """Seeds torch's generators from a key: no random state has to be saved or replayed."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
