"""A task of two plain functions: which rows a chunk has, and what the loss is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dalr_scale.distributed.world import World
from dalr_scale.engines.ddp import DDPEngine
from dalr_scale.global_batch import Chunk, Functions, GlobalBatchStep, Place
from dalr_scale.global_batch.chunks import cut

CPU = torch.device("cpu")
PLACE = Place(step=0, rank=0, seed=1, rows=4)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
BATCH = {
    "query": {"input_ids": torch.arange(20).view(4, 5), "attention_mask": MASK},
    "label": torch.tensor([3, 1, 2, 0]),
}


def never(*_: Any) -> Any:
    raise AssertionError


def chunk(*rows: int) -> Chunk:
    return Chunk(0, torch.tensor(rows), slice(0, len(rows)), None, PLACE)


def test_a_chunk_has_its_rows_and_no_padding_behind_the_longest() -> None:
    task = Functions(never, never)
    assert task.count(BATCH) == 4
    part = task.take(BATCH, chunk(2, 1))
    assert part["label"].tolist() == [2, 1]
    assert part["query"]["input_ids"].tolist() == [[10, 11], [5, 6]]
    assert part["query"]["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_padding_on_the_left_stays() -> None:
    sides = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[0, 0, 1], [0, 1, 1]])}
    part = Functions(never, never).take(sides, chunk(0, 1))
    assert part["attention_mask"].shape == (2, 3)


def test_rows_are_cut_from_the_longest_down() -> None:
    lengths = MASK.sum(1)
    order, chunks = cut(PLACE, 3, lengths, CPU, sort=True)
    assert order.tolist() == [3, 0, 1, 2]
    assert [(c.rows.tolist(), c.length) for c in chunks] == [([3, 0, 1], 4), ([2], 1)]
    order, chunks = cut(PLACE, 3, None, CPU, sort=True)
    assert order.tolist() == [0, 1, 2, 3] and chunks[0].length is None
    assert len({c.key for c in chunks}) == 2


def test_chunks_with_dropout_and_constants_have_the_gradient_of_one_graph() -> None:
    """All chunks alive in one graph, against two passes; a constant is compared too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)).train()
    batch = {"x": torch.randn(6, 3), "label": torch.tensor([0, 1, 0, 1, 2, 2])}

    def encode(model: nn.Module, rows: Any) -> dict[str, torch.Tensor]:
        return {"h": model(rows["x"])}

    def loss(model: nn.Module, rows: Any, columns: Any, first: int) -> torch.Tensor:
        assert first == 0
        same = rows["label"][:, None] == columns["label"]
        return (rows["h"] @ columns["h"].T)[same].mean()

    def gradient(chunk_rows: int) -> torch.Tensor:
        engine = DDPEngine(model, torch.optim.SGD(model.parameters(), 1.0), World(0, 1, CPU))
        step = GlobalBatchStep(engine, Functions(encode, loss, ("label",)), chunk_rows=chunk_rows)
        if chunk_rows:
            step.backward(batch, step=0)
        else:
            _, chunks = cut(step.place(batch, 0), 2, None, CPU, sort=False)
            parts = [step.encode(step.task.take(batch, c), c)["h"] for c in chunks]
            with engine.gradients():
                states = {"h": torch.cat(parts)}
                total, _ = step.task.loss(model, states, {}, batch, step.place(batch, 0))
                engine.backward(total)
        weight = model[0].weight
        assert isinstance(weight, nn.Parameter) and weight.grad is not None
        return weight.grad.clone()

    whole = gradient(0)
    assert torch.allclose(gradient(2), whole, atol=1e-6)
    assert not torch.allclose(gradient(3), whole, atol=1e-3)  # control: other chunks, other masks
