"""One training step on random rows: what the benchmarks of the global batch measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import BertConfig, BertModel

from dalr_scale.config import Config, build_config
from dalr_scale.distributed.world import World
from dalr_scale.engines.build import build_engine
from dalr_scale.estimate.predict import random_batch
from dalr_scale.global_batch import GlobalBatchStep
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.encoder import pool
from dalr_scale.training.optim import build_optimizer
from dalr_scale.training.task import DalrTask

if TYPE_CHECKING:
    from dalr_scale.data.stream.batch import Batch
    from dalr_scale.engines.protocol import Engine

ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Shape:
    """Widths and lengths of a step: a BERT of `layers` layers, its heads, the frozen features."""

    width: int
    layers: int
    length: int
    heads: int
    image: int
    text: tuple[int, ...]
    tokens: tuple[int, ...]


class Encoder(torch.nn.Module):
    """A BERT of one or more layers with mean pooling, without a tokenizer."""

    def __init__(self, shape: Shape, dropout: float = 0.1) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=1000,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=2,
            intermediate_size=4 * shape.width,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.width, self.row_keys = shape.width, None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        return pool(hidden.last_hidden_state, attention_mask, "mean")


def build(
    objective: dict[str, Any], size: int, micro: int, shape: Shape, *, world: World = ALONE,
    engine: str = "ddp", precision: str = "fp32",
) -> tuple[Engine, Batch, Config]:  # fmt: skip
    """An engine with a fresh model, and this rank's share of a random batch of `size` rows."""
    features = {"image": "features:i", "text": [f"features:t{k}" for k in range(len(shape.text))]}
    config = build_config(
        [
            {
                "objective": {"preset": "dalr", **objective},
                "batch": {"global_size": size, "micro_size": micro},
                "engine": {"kind": engine, "precision": precision},
                "model": {"grounding_width": shape.heads, "consistency_width": shape.heads},
                "data": {"pairs": ["random"], "max_length": shape.length},
                "teachers": features,
            }
        ]
    )
    torch.manual_seed(0)
    encoder: Any = Encoder(shape)
    widths = FeatureWidths(shape.image, shape.image, shape.text, shape.tokens)
    weights = (1 / len(shape.text),) * len(shape.text)
    model = DalrModel(encoder, config.model, LossSpec(config.objective, weights), widths)
    optimizer = build_optimizer(model, config.optim)
    own, _ = build_engine(
        model,
        optimizer,
        config.engine,
        rows=size // world.size,
        clip=config.optim.clip,
        world=world,
    )
    return own, random_rows(model, shape, size, world), config


def random_rows(model: DalrModel, shape: Shape, size: int, world: World = ALONE) -> Batch:
    """This rank's rows of a paired batch of `size` rows: token ids and features by chance."""
    torch.manual_seed(1 + world.rank)
    rows, length = size // world.size, shape.length
    lengths = torch.randint(length // 4, length + 1, (rows, 1))
    mask = (torch.arange(length) < lengths).long()
    widths = shape.tokens if model.spec.needs.tokens else ()
    batch = random_batch(model, rows, paired=True)
    batch.token_features = [torch.randn(rows, length - 1, width) for width in widths]
    batch.token_masks = [mask[:, 1:].bool() for _ in widths]
    batch.input_ids, batch.attention_mask = torch.randint(0, 1000, (rows, length)), mask
    return batch


def backward(engine: Engine, batch: Batch, micro: int, *, sort: bool = True) -> None:
    """Leaves the gradient of the whole batch on the engine."""
    model: Any = engine.module
    task = DalrTask(model.spec.needs, model.encoder.row_keys)
    step = GlobalBatchStep(engine, task, chunk_rows=micro, sort=sort)
    step.backward(batch, step=0, lengths=batch.attention_mask.sum(1))
