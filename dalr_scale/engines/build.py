"""An engine from the settings of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalr_scale.engines.ddp import DDPEngine
from dalr_scale.engines.deepspeed import DeepSpeedEngine
from dalr_scale.engines.ds_config import DeepSpeedSettings, ds_config
from dalr_scale.engines.precision import resolve_precision

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dalr_scale.config import EngineConfig
    from dalr_scale.distributed.world import World
    from dalr_scale.engines.protocol import Engine


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: EngineConfig,
    *,
    rows: int,
    clip: float,
    world: World,
) -> tuple[Engine, DeepSpeedSettings | None]:
    """Wraps a trainable module; returns the engine and the DeepSpeed dict it was built from.

    Args:
        model: a module of functions (`RunsFunctions`), or any other, which DeepSpeed then gets
            inside of one: its checkpoints name parameters ``module.NAME``.
        optimizer: over the module's parameters.
        settings: the section ``engine`` of a configuration.
        rows: rows of the global batch on each rank.
        clip: global gradient norm above which gradients are scaled down; 0: never.
        world: the ranks, from ``start_world``.

    Raises:
        UserError: the DeepSpeed file of the settings contradicts them.
    """
    precision = resolve_precision(settings)
    if settings.kind == "ddp":
        return DDPEngine(model, optimizer, world, precision=precision, clip=clip), None
    filled = ds_config(settings, rows=rows, ranks=world.size, clip=clip, bf16=precision == "bf16")
    timeout = settings.timeout_minutes
    return DeepSpeedEngine(model, optimizer, filled, world, timeout_minutes=timeout), filled
