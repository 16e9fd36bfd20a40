"""One run over alternating batches, under every engine and with stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import history, tiny_config

from reference.compare import Bounds, Difference, compare
from reference.runs import Stop, run
from reference.trainer import train

if TYPE_CHECKING:
    from dalr_scale.config import Config

STEPS = 9
BOUNDS = Bounds(steps=1e-4, weights=1e-4, gate=3e-6, order=1.2e-7, kink=2e-6)


@dataclass(frozen=True)
class Engine:
    kind: str
    offload: bool = False

    def __str__(self) -> str:
        return self.kind + ("-offload" if self.offload else "")


ENGINES = [Engine("ddp")] + [
    Engine(f"zero{stage}", offload) for stage in (1, 2, 3) for offload in (False, True)
]


def alternating(data: Path, engine: Engine, encoder: str = "pretrained") -> Config:
    """Nine steps in which text and paired batches take turns, with every term and dropout."""
    changes = {
        "engine.kind": engine.kind,
        "engine.offload_optimizer": engine.offload,
        "engine.precision": "fp32",
        "batch.dropout_keys": "row",
        "batch.micro_size": 5,
        "optim.steps": STEPS,
        "optim.weight_decay": 0.01,
        "objective.teacher_similarity_dtype": "float64",
        "objective.caption_weight": 0.5,
        "teachers.caption": "features:cap",
        "teachers.text": ["features:t1"],
        "eval.every": 0,
        "eval.graded_dev": "",
        "save.every_steps": 0,
        "data.workers": 0,
    }
    if encoder == "pretrained":
        changes |= {
            "model.encoder": str(data / "encoders" / "roberta"),
            "model.architecture": {},
            "data.tokenizer": "",
        }
    config = tiny_config(data, changes)
    return config


def differences(data: Path, engine: Engine, ranks: int, directory: Path) -> Difference:
    """How far the run under an engine is from the reference."""
    config = alternating(data, engine)
    return compare(config, run(config, directory / "one", ranks), train(config), BOUNDS)


def stopped_after_every_step(
    config: Config, directory: Path, ranks: int, steps: tuple[int, ...] = tuple(range(1, STEPS))
) -> list[str]:
    """What a run that stops after each of some steps has otherwise than one that never stops."""
    whole = run(config, directory / "whole", ranks)
    parts = run(config, directory / "parts", ranks, [Stop(step, "STOP", ranks) for step in steps])
    found = (
        [] if history(directory / "whole/run") == history(directory / "parts/run") else ["history"]
    )
    for name, weight in whole.weights.items():
        if not torch.equal(weight, parts.weights[name]):
            found.append(name)
    return found
