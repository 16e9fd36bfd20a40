"""One optimizer step's gradients from one global batch, whatever chunks it is encoded in.

Two passes (gradient caching, arXiv 2101.06983): encode all chunks without a graph, take the loss
once over the cached states of the whole global batch, then encode each chunk again with the same
dropout and push the cached gradient through it. Memory holds one chunk's activations. The last
chunk keeps its graph from the first pass, so a batch in one chunk is encoded only once.

Accumulating gradients over smaller batches would not be this: their contrast sets are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalr_scale.distributed.collectives import column_group, several_ranks
from dalr_scale.engines.engine import Engine
from dalr_scale.errors import UserError
from dalr_scale.global_batch.columns import ColumnGather
from dalr_scale.models.dalr import TeacherBatch, teacher_columns
from dalr_scale.models.row_dropout import RowKeys, integer_key
from dalr_scale.training.watch import signs


@dataclass(frozen=True)
class StepInputs:
    """This rank's rows of a global batch: token ids and mask [b,L], and the frozen features.

    Attributes:
        step, rank, seed: what dropout is keyed by.
        micro_rows: rows of a chunk; 0: all rows in one.
        row_keys: keys of the student's row-keyed dropout, or None for torch's own dropout.
        sort: cut chunks from the rows sorted by length, so that less padding is encoded.
        global_rows: real rows of the global batch; what the ranks hold beyond them repeats its last
            row (``dalr_scale.distributed.collectives``). None: all rows are real.
    """

    input_ids: Tensor
    attention_mask: Tensor
    teachers: TeacherBatch
    step: int
    rank: int
    seed: int
    micro_rows: int
    row_keys: RowKeys | None = None
    sort: bool = True
    global_rows: int | None = None

    @property
    def rows(self) -> int:
        return len(self.input_ids)

    @property
    def offset(self) -> int:
        """This rank's first row in the global batch."""
        return self.rank * self.rows


@dataclass(frozen=True)
class ChunkPlan:
    """The order in which a rank encodes its rows, and where it is cut.

    Attributes:
        order: [b] int64, this rank's rows.
        chunks: slices of `order`.
        lengths: tokens of the longest row of each chunk.
    """

    order: Tensor
    chunks: tuple[slice, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, inputs: StepInputs) -> ChunkPlan:
        size = inputs.micro_rows or inputs.rows
        starts = range(0, inputs.rows, size)
        chunks = tuple(slice(s, min(s + size, inputs.rows)) for s in starts)
        order = torch.arange(inputs.rows, device=inputs.input_ids.device)
        lengths = inputs.attention_mask.sum(1)
        if inputs.sort and len(chunks) > 1:
            # longest first: a chunk that does not fit the memory shows at once
            order = torch.sort(lengths, descending=True, stable=True).indices
        # all of them at once: asking a GPU for a length waits until it has caught up
        longest = torch.stack([lengths[order[chunk]].max() for chunk in chunks]).tolist()
        return cls(order, chunks, tuple(max(1, int(length)) for length in longest))

    def rows_of(self, chunk: int) -> Tensor:
        """Row numbers of a chunk within this rank's share."""
        return self.order[self.chunks[chunk]]


def backward_global_batch(engine: Engine, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Leaves the averaged gradient of the global loss on the engine.

    Returns:
        This rank's share of the loss (the mean over its rows, weighted where some are padding) and
        its terms, detached; their means over ranks are those of the global batch. Among the terms
        is what `dalr_scale.training.watch.signs` finds in the states.

    Raises:
        UserError: the ranks hold different kinds or sizes of batches; raised on all of them.
    """
    require_agreement(inputs)
    plan = ChunkPlan.of(inputs)
    gather = start_gather(engine, inputs, plan)
    with engine.gradients(len(plan.chunks)):
        states, last = encode_all(engine, inputs, plan, gather)
        loss, terms = engine.forward(
            "loss",
            states=states,
            teachers=inputs.teachers,
            step=inputs.step,
            offset=inputs.offset,
            gathered=gather.wait() if gather else None,
            global_rows=inputs.global_rows,
        )
        engine.backward(loss)
        assert states.grad is not None
        for chunk in reversed(range(len(plan.chunks))):
            piece = last if last is not None else _encode(engine, inputs, plan, chunk, grad=True)
            last = None
            engine.backward((piece * states.grad[:, plan.rows_of(chunk)]).sum())
    return loss.detach(), terms | signs(states.detach())


def start_gather(engine: Engine, inputs: StepInputs, plan: ChunkPlan) -> ColumnGather | None:
    """Sends the frozen columns on their way; nothing to do on one rank."""
    if not several_ranks():
        return None
    gather = ColumnGather(plan.order)
    model: Any = engine.module
    for name, rows in teacher_columns(inputs.teachers, model.spec.needs).items():
        gather.add(name, rows)
    return gather


def encode_all(
    engine: Engine, inputs: StepInputs, plan: ChunkPlan, gather: ColumnGather | None
) -> tuple[Tensor, Tensor]:
    """First pass: all states as one leaf [2, b, H], and the last chunk's own, with its graph."""
    states: Tensor | None = None
    piece = torch.empty(0)
    for chunk, where in enumerate(plan.chunks):
        last = chunk == len(plan.chunks) - 1
        if gather is not None and engine.gathers_weights:
            gather.settle()
        piece = _encode(engine, inputs, plan, chunk, grad=last)
        if states is None:
            states = piece.new_empty(2, inputs.rows, piece.shape[-1])
        rows = plan.rows_of(chunk)
        states[:, rows] = piece.detach()
        if gather is not None:
            with torch.no_grad():
                teachers = inputs.teachers.take(rows)
                columns = engine.forward("columns", states=piece.detach(), teachers=teachers)
            gather.add_chunk(columns, where)
    assert states is not None
    return states.requires_grad_(), piece


def _encode(
    engine: Engine, inputs: StepInputs, plan: ChunkPlan, chunk: int, *, grad: bool
) -> Tensor:
    """Both views of a chunk in one forward, [2, rows, H]; the same dropout at every call.

    Two forwards before one backward would break activation checkpointing under ZeRO
    (https://github.com/deepspeedai/DeepSpeed/issues/988), so views share the batch axis.
    """
    rows = plan.rows_of(chunk)
    length = plan.lengths[chunk]
    ids, mask = inputs.input_ids[rows, :length], inputs.attention_mask[rows, :length]
    _key_dropout(inputs, rows, chunk)
    with torch.set_grad_enabled(grad):
        states = engine.forward(
            "encode", input_ids=ids.repeat(2, 1), attention_mask=mask.repeat(2, 1)
        )
    return states.unflatten(0, (2, -1))


def _key_dropout(inputs: StepInputs, rows: Tensor, chunk: int) -> None:
    """Replays, never saves: both passes over a chunk derive the same masks from the same key."""
    if inputs.row_keys is not None:
        inputs.row_keys.set(inputs.seed, inputs.step, rows + inputs.offset, views=2)
    else:
        seed_dropout(inputs.seed, inputs.step, inputs.rank, chunk)


def seed_dropout(*key: int) -> None:
    """Seeds torch's generators from a key: no random state has to be saved or replayed."""
    torch.manual_seed(integer_key(*key))


def require_agreement(inputs: StepInputs) -> None:
    """Refuses, on every rank, a step for which the ranks hold batches that do not fit together.

    Collectives of unequal tensors would hang, or pair rows of different kinds without an error.
    """
    if not several_ranks():
        return
    facts = _facts(inputs)
    mark = torch.tensor([integer_key(*sorted(facts.items()))], device=inputs.input_ids.device)
    marks = mark.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(marks, mark, group=column_group())
    if bool((marks == marks[0]).all()):
        return
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, facts, group=column_group())
    differing = sorted({n for f in everyone for n in f if f.get(n) != everyone[0].get(n)})
    lines = "; ".join(
        f"rank {rank}: " + ", ".join(f"{n} {f.get(n, 'none')}" for n in differing)
        for rank, f in enumerate(everyone)
    )
    raise UserError(
        f"the ranks hold different batches in step {inputs.step + 1} ({lines}); every rank needs "
        "the same shards, features and settings"
    )


def _facts(inputs: StepInputs) -> dict[str, str]:
    teachers = inputs.teachers
    features = {f"text {k}": e for k, e in enumerate(teachers.text)}
    features |= {"image": teachers.image, "caption": teachers.caption}
    facts = {
        "step": str(inputs.step),
        "kind": "paired" if teachers.paired else "text",
        "rows": str(inputs.rows),
        "global rows": str(inputs.global_rows or dist.get_world_size() * inputs.rows),
        "chunk rows": str(inputs.micro_rows or inputs.rows),
        "token teachers": str(len(teachers.tokens)),
    }
    shapes = {n: f"{tuple(v.shape)} {v.dtype}" for n, v in features.items() if v is not None}
    return facts | shapes
