"""Step cases that worker processes and the one-process reference both run.

A case is a batch kind, a preset, an engine and a chunk size. Dropout is off and the second view is
a fixed perturbation of the first, so that results depend on nothing but the mathematics.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from dalr_scale.config import BatchConfig, Config, EngineConfig, OptimConfig, build_config
from dalr_scale.dist import gather
from dalr_scale.dist.engine import DeepSpeedEngine, Engine, build_engine
from dalr_scale.dist.gradcache import StepInputs, backward_global_batch
from dalr_scale.dist.world import World
from dalr_scale.models import consistency, dalr
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec, TeacherBatch
from dalr_scale.models.encoder import pool
from dalr_scale.optim import build_optimizer

ROWS, LENGTH, WIDTH, STEPS = 12, 7, 16, 3
PRESETS = ("simcse", "mcse", "kdmcse", "dalr-reference", "dalr")


@dataclass(frozen=True)
class Case:
    preset: str
    kind: str = "ddp"
    batch: str = "pair"
    micro: int = 0
    fault: str = ""
    dropout: float = 0.0

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.kind == "ddp" else torch.float32

    def config(self) -> Config:
        config = build_config([{"objective": {"preset": self.preset, "tail": "drop"}}])
        precision = "fp64" if self.kind == "ddp" else "fp32"
        optim = OptimConfig(lr=0.05, name="sgd", clip=1.0, steps=STEPS)
        return dataclasses.replace(
            config,
            batch=BatchConfig(ROWS, self.micro),
            engine=EngineConfig(kind=self.kind, precision=precision),
            optim=optim,
        )


class TwoViewEncoder(nn.Module):
    """A small BERT; the second half of a batch is perturbed as if by dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
        )
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.width = WIDTH

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        first, second = pool(hidden.last_hidden_state, attention_mask, "mean").chunk(2)
        wave = torch.sin(torch.arange(WIDTH, dtype=first.dtype, device=first.device))
        return torch.cat([first, second * (1 + 0.3 * wave) + 0.1 * wave.flip(0)])


def build(case: Case, world: World) -> tuple[Engine, Config]:
    config = case.config()
    torch.manual_seed(3)
    spec = LossSpec(config.objective, text_weights=(0.33, 0.67), seed=config.run.seed)
    widths = FeatureWidths(image=WIDTH, caption=WIDTH, tokens=(WIDTH,))
    model = DalrModel(TwoViewEncoder(case.dropout), config.model, spec, widths)  # type: ignore[arg-type]
    for parameter in model.parameters():  # away from zero biases and unit norms
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return build_engine(model, build_optimizer(model, config.optim), config, world)[0], config


def global_batch(case: Case, step: int) -> dict[str, Tensor]:
    """The same global batch on every rank, drawn from (case, step)."""
    rng = np.random.default_rng([step, 5])

    def floats(*shape: int) -> Tensor:
        return torch.tensor(rng.normal(size=shape)).to(case.dtype)

    lengths = torch.tensor(rng.integers(3, LENGTH + 1, ROWS))
    positions = torch.arange(LENGTH)
    batch = {
        "input_ids": torch.tensor(rng.integers(0, 40, (ROWS, LENGTH))),
        "attention_mask": (positions < lengths[:, None]).long(),
        "image": floats(ROWS, WIDTH),
        "caption": floats(ROWS, WIDTH),
        "text0": floats(ROWS, WIDTH),
        "text1": floats(ROWS, WIDTH),
        "tokens": floats(ROWS, LENGTH - 1, WIDTH),
        "token_mask": (positions[1:] < lengths[:, None]).to(case.dtype),
        "ids": torch.tensor(rng.integers(0, 6, ROWS)),
    }
    if case.batch == "text":
        batch["ids"] = torch.full((ROWS,), -1)
    return batch


def step_inputs(case: Case, config: Config, world: World, step: int) -> StepInputs:
    rows = ROWS // world.size
    own = slice(world.rank * rows, (world.rank + 1) * rows)
    batch = {name: value[own] for name, value in global_batch(case, step).items()}
    teachers = TeacherBatch(ids=batch["ids"])
    if case.batch == "pair":
        teachers = TeacherBatch(
            ids=batch["ids"],
            paired=True,
            image=batch["image"],
            caption=batch["caption"],
            text=[batch["text0"], batch["text1"]],
            tokens=[batch["tokens"]],
            token_masks=[batch["token_mask"]],
        )
    return StepInputs(
        batch["input_ids"], batch["attention_mask"], teachers, step, world.rank, 1, case.micro
    )


def run(case: Case, world: World) -> dict[str, np.ndarray]:
    """Trains a few steps; returns losses, first gradient norm and final weights (rank 0)."""
    with sabotage(case.fault):
        return _train(case, world)


def _train(case: Case, world: World) -> dict[str, np.ndarray]:
    AcceleratorState._reset_state(reset_partial_state=True)  # many engines in one process
    engine, config = build(case, world)
    losses, norms = [], []
    for step in range(STEPS):
        loss, _ = backward_global_batch(engine, step_inputs(case, config, world, step))
        losses.append(world.all_mean([float(loss)])[0])
        norms.append(engine.step(0.05).grad_norm_preclip)
    state = engine.full_state("")
    results = {f"weight.{name}": value.double().numpy() for name, value in state.items()}
    return results | {"losses": np.array(losses), "norms": np.array(norms)}


@contextlib.contextmanager
def sabotage(fault: str) -> Iterator[None]:
    """Switches one guarantee off, for the negative controls."""
    patches = {
        "": lambda: contextlib.nullcontext(),
        "columns without gradient": lambda: mock.patch.object(
            dalr, "gather_rows", lambda x, *, grad=True: gather.gather_rows(x, grad=False)
        ),
        "statistics per rank": lambda: mock.patch.object(
            consistency, "all_reduce_sum", lambda x: x * dist.get_world_size()
        ),
        "one reduction per chunk": lambda: mock.patch.object(
            DeepSpeedEngine, "gradients", lambda self: contextlib.nullcontext()
        ),
    }
    with patches[fault]():
        yield


def save(folder: Path, case: Case, results: dict[str, np.ndarray]) -> None:
    np.savez(folder / f"{case.name}.npz", **results)  # type: ignore[arg-type]


def wanted_cases(world_size: int) -> list[Case]:
    """The cases of ``make test`` at a world size; the fault cases are the negative controls."""
    if world_size == 4:
        return [Case("dalr"), Case("dalr", "zero2", micro=2), Case("dalr", "zero3")]
    exact = [Case(p, "ddp", micro=m) for p in PRESETS for m in (0, 4)]
    exact += [Case("dalr", "ddp", "text", 4), Case("mcse", "ddp", "text")]
    sharded = [Case("dalr", kind, b, 4) for kind in ZERO for b in ("pair", "text")]
    sharded += [Case("dalr", kind) for kind in ZERO] + [Case("dalr-reference", "zero2", micro=4)]
    return exact + sharded + (FAULTS if world_size == 2 else [])


ZERO = ("zero1", "zero2", "zero3")
FAULTS = [
    Case("dalr", "ddp", fault="columns without gradient"),
    Case("dalr", "ddp", fault="statistics per rank"),
    Case("dalr", "zero1", micro=4, fault="one reduction per chunk"),
    Case("dalr", "zero2", micro=4, fault="one reduction per chunk"),
]
