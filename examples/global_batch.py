r"""A Hugging Face or sentence-transformers model and a loss of one's own over a global batch.

Every rank encodes its rows in small chunks, and the loss compares them with the rows of all ranks;
gradients are those of one process that holds the whole batch, on DDP and ZeRO-1, 2 and 3
(``tests/distributed/test_examples.py``).

    accelerate launch --use_deepspeed --num_processes 2 examples/global_batch.py \
        MODEL_DIRECTORY pairs.tsv --engine zero2 --rows 512 --chunk 32 --output trained.pt

``pairs.tsv`` has a query, a tab and its answer on every line. With ``--sentence-transformers`` the
directory is one of that library.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from dalr_scale.config import EngineConfig
from dalr_scale.distributed.world import World, leave_world, start_world
from dalr_scale.engines.build import build_engine
from dalr_scale.global_batch import Functions, GlobalBatchStep, States

if TYPE_CHECKING:
    from dalr_scale.engines.protocol import Engine

# All that a model and a loss need: two functions, and a step.


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """A Hugging Face model's sentence vectors [n, H]: the mean of the token states."""
    states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def embed_st(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """A sentence-transformers model's sentence vectors [n, H]."""
    return normalize(model(dict(tokens))["sentence_embedding"], dim=-1)


def encode_with(embed: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> Any:
    """The states of both sides of a chunk's pairs."""
    return lambda model, rows: {name: embed(model, rows[name]) for name in ("query", "answer")}


def info_nce(model: nn.Module, rows: States, columns: States, first: int) -> Tensor:
    """The mean over this rank's queries; all ranks' answers are the negatives."""
    scores = 20 * rows["query"] @ columns["answer"].T
    return cross_entropy(scores, first + torch.arange(len(scores), device=scores.device))


def train(
    engine: Engine, batches: Iterator[dict[str, Any]], embed: Any, chunk: int, lr: float
) -> None:
    """One optimizer step for each global batch, of which every rank gives its rows."""
    step = GlobalBatchStep(engine, Functions(encode_with(embed), info_nce), chunk_rows=chunk)
    for number, batch in enumerate(batches):
        loss, _ = step.backward(batch, step=number)
        engine.step(lr)
        print(f"step {number + 1}: loss of this rank {float(loss):.4f}", flush=True)


# The rest reads files and arguments.


def read_batches(path: Path, tokenizer: Any, rows: int, world: World) -> Iterator[dict[str, Any]]:
    """This rank's rows of every full global batch: token ids and masks of both sides."""
    pairs = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    own = rows // world.size
    for start in range(world.rank * own, len(pairs) - rows + world.rank * own + 1, rows):
        sides = zip(*pairs[start : start + own], strict=True)
        yield {
            name: dict(tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt"))
            for name, texts in zip(("query", "answer"), sides, strict=True)
        }


def main() -> None:
    """Reads the arguments, trains, and writes the weights on rank 0."""
    parser = argparse.ArgumentParser(description="Contrastive training over a global batch")
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--engine", choices=("ddp", "zero1", "zero2", "zero3"), default="zero2")
    parser.add_argument("--rows", type=int, default=128, help="rows of the global batch")
    parser.add_argument("--chunk", type=int, default=16, help="rows encoded at a time")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--sentence-transformers", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="file for the weights")
    options = parser.parse_args()
    world = start_world(timeout_minutes=10)
    model: Any
    if options.sentence_transformers:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(options.model))
        tokenizer, own_embed = model.tokenizer, embed_st
    else:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(options.model, add_pooling_layer=False)
        tokenizer, own_embed = AutoTokenizer.from_pretrained(options.model), embed
    engine, _ = build_engine(
        model.train(),
        torch.optim.AdamW(model.parameters(), options.lr),
        EngineConfig(kind=options.engine),
        rows=options.rows // world.size,
        clip=1.0,
        world=world,
    )
    batches = read_batches(options.pairs, tokenizer, options.rows, world)
    train(engine, batches, own_embed, options.chunk, options.lr)
    state = engine.full_state("")  # whole weights on rank 0, whatever the engine shards
    if world.rank == 0:
        torch.save(state, options.output)
    leave_world()


if __name__ == "__main__":
    main()
