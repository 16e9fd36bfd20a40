"""The example of a foreign model: its gradients are those of one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from engine_tools import in_world
from torch import Tensor, nn

from dalr_scale.config import EngineConfig
from dalr_scale.engines.build import build_engine
from dalr_scale.global_batch import Functions, GlobalBatchStep
from dalr_scale.global_batch import task as global_task

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import global_batch as example  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from dalr_scale.distributed.world import World

KINDS = ("ddp", "zero1", "zero2", "zero3")
LIBRARIES = ("transformers", "sentence-transformers")
ROWS, LENGTH, CHUNK, RATE = 12, 9, 4, 2.0**12


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertModel(config, add_pooling_layer=False).train()


def model_of(library: str, directory: Path) -> tuple[Any, Any]:
    """A model of a library and the function that embeds tokens with it."""
    if library == "transformers":
        return tiny_bert(), example.embed
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory / "bert")).train(), example.embed_st


def write_bert(directory: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(35))]
    (directory / "vocab.txt").write_text("\n".join(words))
    tiny_bert().save_pretrained(directory / "bert")  # type: ignore[operator]
    tokenizer = BertTokenizerFast(vocab=str(directory / "vocab.txt"), model_max_length=16)
    tokenizer.save_pretrained(directory / "bert")


def whole_batch() -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(6)

    def side() -> dict[str, Tensor]:
        lengths = torch.randint(3, LENGTH + 1, (ROWS, 1), generator=draw)
        ids = torch.randint(5, 40, (ROWS, LENGTH), generator=draw)
        return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths).long()}

    return {"query": side(), "answer": side()}


def one_process(library: str, directory: Path) -> dict[str, Tensor]:
    """Gradients by plain autograd, float64, no chunks."""
    model, embed = model_of(library, directory)
    model.double()
    states = example.encode_with(embed)(model, whole_batch())
    example.info_nce(model, states, states, 0).backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def applied(kind: str, library: str, world: World, directory: Path) -> dict[str, Tensor]:
    """What one SGD step takes from the weights, over its rate; on rank 0."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # many engines in one process
    model, embed = model_of(library, directory)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    settings = EngineConfig(kind=kind, precision="fp64" if kind == "ddp" else "fp32")  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    own = ROWS // world.size
    engine, _ = build_engine(model, optimizer, settings, rows=own, clip=0.0, world=world)
    rows = slice(world.rank * own, (world.rank + 1) * own)
    batch = {s: {n: t[rows] for n, t in side.items()} for s, side in whole_batch().items()}
    task = Functions(example.encode_with(embed), example.info_nce)
    GlobalBatchStep(engine, task, chunk_rows=CHUNK).backward(batch, step=0)
    engine.step(RATE)
    if kind == "ddp":
        after = {name: p.detach() for name, p in model.named_parameters()}
    else:
        after = engine.full_state("")
    return {name: (before[name] - value.double()) / RATE for name, value in after.items()
            if name in before}  # fmt: skip


def what_the_page_trains(world: World, directory: Path) -> dict[str, Tensor]:
    """What the code block of docs/global_batch.md adds to the weights; on rank 0."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model, _ = model_of("sentence-transformers", directory)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    page = (Path(__file__).parents[2] / "docs" / "global_batch.md").read_text(encoding="utf-8")
    own = ROWS // world.size
    rows = slice(world.rank * own, (world.rank + 1) * own)
    batch = {s: {n: t[rows] for n, t in side.items()} for s, side in whole_batch().items()}
    names: dict[str, Any] = {"model": model, "batches": [batch, batch], "rows_per_rank": own}
    exec(page.split("```python\n")[1].split("```")[0], names)
    after = names["engine"].full_state("")
    return {name: value - before[name] for name, value in after.items() if name in before}


def work(world: World, directory: Path) -> None:
    found = {}
    for library in LIBRARIES:
        for kind in KINDS:
            found[library, kind] = applied(kind, library, world, directory)
    found["page"] = what_the_page_trains(world, directory)
    with mock.patch.object(global_task, "with_gradient", lambda gathered, local: gathered):
        found["control"] = applied("ddp", "transformers", world, directory)
    if world.rank == 0:
        torch.save(found, directory / f"found-{world.size}.pt")


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor; absolute where the exact gradient is zero."""
    assert found.keys() == wanted.keys()
    gaps = {name: float((found[name] - value).norm()) for name, value in wanted.items()}
    sizes = {name: float(value.norm()) for name, value in wanted.items()}
    return max(gap / sizes[n] if sizes[n] > 1e-6 else gap for n, gap in gaps.items())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("foreign")
    write_bert(directory)
    for ranks in (1, 2):
        assert in_world(ranks, work, directory) == ""
    found = {ranks: torch.load(directory / f"found-{ranks}.pt") for ranks in (1, 2)}
    return found, {library: one_process(library, directory) for library in LIBRARIES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_foreign_model_has_the_gradients_of_one_process(
    ranks: int, library: str, kind: str, results: tuple[dict[int, Any], dict[str, Any]]
) -> None:
    found, wanted = results
    limit = 1e-9 if kind == "ddp" else 1e-5
    assert error(found[ranks][library, kind], wanted[library]) < limit


def test_control_columns_without_gradient_are_seen(
    results: tuple[dict[int, Any], dict[str, Any]],
) -> None:
    found, wanted = results
    assert error(found[2]["control"], wanted["transformers"]) > 1e-2


def test_the_page_trains_alike_on_one_and_two_ranks(
    results: tuple[dict[int, Any], dict[str, Any]],
) -> None:
    one, two = (torch.cat([v.flatten() for v in results[0][n]["page"].values()]) for n in (1, 2))
    # AdamW turns the rounding of a gradient of zero (a key's bias) into a whole step
    assert float(one.norm()) > 1e-4 and float((one - two).norm() / one.norm()) < 0.05
