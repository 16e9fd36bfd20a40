"""Small engines in processes of their own, with gradients that are known beforehand."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launching import fork, free_port
from torch import Tensor, nn

from dalr_scale.config import Config, build_config
from dalr_scale.distributed.world import World, leave_world, start_world
from dalr_scale.engines.build import build_engine
from dalr_scale.engines.protocol import Engine, RunsFunctions
from dalr_scale.training.optim import build_optimizer


class Small(RunsFunctions):
    """An embedding table, a matrix and vectors; the loss is linear in them."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.words = nn.Embedding(7, 3)
        self.linear = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def loss(self, step: int) -> Tensor:
        like = self.norm.weight
        generator = torch.Generator().manual_seed(step)
        words, rows, states = self.words(torch.arange(7)), torch.eye(3).to(like), torch.eye(5)
        outputs = (words, self.linear(rows), self.norm(states[:, : len(like)].to(like)))
        return sum(
            ((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs),
            torch.zeros(()),
        )


def small_engine(world: World, changes: dict[str, dict[str, Any]], width: int = 5) -> Engine:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # many engines in one process
    layers = [{"batch": {"global_size": 2 * world.size}, "engine": {"precision": "fp32"}}, changes]
    config: Config = build_config(layers)
    model = Small(width)
    return engine_of(model, config, world)


def engine_of(model: nn.Module, config: Config, world: World) -> Engine:
    """The engine that a configuration asks for."""
    optimizer = build_optimizer(model, config.optim)
    rows = config.batch.global_size // world.size
    return build_engine(
        model, optimizer, config.engine, rows=rows, clip=config.optim.clip, world=world
    )[0]


def steps(engine: Engine, numbers: range, lr: float) -> None:
    for step in numbers:
        with engine.gradients():
            engine.backward(engine.apply(Small.loss, step))
        engine.step(lr)


def in_world(ranks: int, action: Callable[..., None], directory: Path, *arguments: Any) -> str:
    """Runs ``action(world, directory, *arguments)`` on `ranks` fresh processes; their errors."""
    port, errors = free_port(), directory / "errors.txt"
    errors.write_text("")
    processes = [
        fork(_one_rank, rank, ranks, port, action, directory, arguments) for rank in range(ranks)
    ]
    for process in processes:
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            errors.write_text(errors.read_text() + "a rank hung")
    return errors.read_text()


def _one_rank(
    rank: int, ranks: int, port: int, action: Callable[..., None], directory: Path, arguments: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        action(start_world(2, threads=1), directory, *arguments)
        leave_world()
    except Exception:
        with (directory / "errors.txt").open("a") as file:
            file.write(traceback.format_exc())
    os._exit(0)
