"""Data parallelism without sharding, which is also the reference for the other engines."""

# Some methods of torch are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Concatenate

import torch
import torch.distributed as dist
from dalr_kernels import half_operands
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dalr_scale.engines.gradients import largest_gradients, zero_missing_gradients
from dalr_scale.engines.protocol import AnyModule, P, StepResult, T, set_learning_rate
from dalr_scale.engines.restore import (
    load_state_by_name,
    numbered_state_by_name,
    require_same_parameters,
    state_by_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from dalr_scale.distributed.world import World
    from dalr_scale.engines.precision import Precision


class DDPEngine:
    """Data parallelism without sharding: whole weights on each rank, one flat all-reduce.

    The reference path: float64 works, and nothing but this file stands between autograd and
    the optimizer. A parameter without gradient counts as gradient zero, as under ZeRO.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        precision: Precision = "fp32",
        clip: float = 0.0,
    ) -> None:
        if precision == "fp64":
            model.double()
        self.module = model.to(world.device)
        self.gathers_weights = False
        self.optimizer, self.world = optimizer, world
        self.clip = clip
        self.bf16 = precision == "bf16"
        self.steps: int | None = 0
        self._unused: list[str] = []
        if world.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    @property
    def device(self) -> torch.device:
        return self.world.device

    def apply(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with half_operands(self.bf16):
            return function(self.module, *args, **kwargs)

    def encode(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if not self.bf16:
            return self.apply(function, *args, **kwargs)
        with torch.autocast(self.world.device.type, torch.bfloat16):
            return tree_map_only(Tensor, Tensor.float, function(self.module, *args, **kwargs))

    @contextlib.contextmanager
    def gradients(self, chunks: int = 1) -> Generator[None]:
        del chunks  # gradients have the weights' precision, which is float32 or better
        self.optimizer.zero_grad(set_to_none=True)
        yield
        self._unused = zero_missing_gradients(self.module, self.optimizer)
        self._average()

    def unused_gradients(self) -> dict[str, float]:
        return largest_gradients(self.module, self._unused, lambda parameter: parameter.grad)

    def _average(self) -> None:
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        if self.world.size == 1:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        dist.all_reduce(flat)
        flat /= self.world.size
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(piece.view_as(p))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        limit = self.clip if self.clip > 0 else float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        applied = math.isfinite(norm)  # the same on all ranks: gradients are averaged already
        if applied:
            self.optimizer.step()
        self.steps = None if self.steps is None else self.steps + 1
        return StepResult(norm, applied)

    def save(self, directory: Path) -> None:
        if self.world.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.module.state_dict(),
                "optimizer": state_by_name(self.optimizer, self.module),
                "steps": self.steps,
            }
            torch.save(state, directory / "engine.pt")

    def load(self, directory: Path, saved_ranks: int) -> None:
        del saved_ranks  # every rank holds everything
        path = directory / "engine.pt"
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        saved, own = state["model"], self.module.state_dict()
        require_same_parameters(
            {k: v.shape for k, v in saved.items()}, {k: v.shape for k, v in own.items()}, path
        )
        self.module.load_state_dict(saved)
        moments = state["optimizer"]
        if "param_groups" in moments:
            moments = numbered_state_by_name(moments, self.optimizer, self.module, path)
        load_state_by_name(self.optimizer, self.module, moments)
        self.steps = state.get("steps")

    def full_state(self, prefix: str) -> dict[str, Tensor]:
        if self.world.rank != 0:
            return {}
        return {
            name.removeprefix(prefix): tensor.detach().float().cpu().clone()
            if tensor.is_floating_point()
            else tensor.cpu()
            for name, tensor in self.module.state_dict().items()
            if name.startswith(prefix)
        }
