"""Engines: the only code that touches DeepSpeed and Accelerate.

Both engines offer the same few calls. A step opens one ``gradients()`` block, back-propagates
into it as often as it likes, and leaves it with gradients averaged over ranks by one reduction.
The block is told over how many chunks they add up, since bfloat16 cannot add many.
Repeated bare ``backward`` calls would be silently wrong on ZeRO-1 and ZeRO-2, where each one
reduces and the last one wins.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from dalr_kernels import half_operands
from torch import Tensor, nn

from dalr_scale.config import Config
from dalr_scale.distributed.world import World
from dalr_scale.engines.ds_config import ds_config
from dalr_scale.engines.reshard import has_own_groups, load_resharded
from dalr_scale.engines.restore import (
    hyperparameters,
    load_state_by_name,
    numbered_state_by_name,
    require_same_parameters,
    set_hyperparameters,
    state_by_name,
)
from dalr_scale.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping, and whether the optimizer changed the weights."""

    grad_norm_preclip: float
    applied: bool


class Engine(Protocol):
    """What a step asks of an engine.

    Attributes:
        module: the trainable module.
        gathers_weights: whether ``forward`` calls collectives of its own (ZeRO-3).
        steps: optimizer steps taken, skipped ones included; None where a checkpoint of an
            earlier version did not say.

    `untouched` is a collective call between ``gradients()`` and ``step()``: for each parameter
    that no term of the step reached, the largest absolute gradient that the optimizer is about to
    apply to it. Every value must be 0.
    """

    module: nn.Module
    gathers_weights: bool

    def forward(self, task: str, **inputs: Any) -> Any: ...
    @property
    def steps(self) -> int | None: ...
    def gradients(self, chunks: int = 1) -> contextlib.AbstractContextManager[None]: ...
    def backward(self, loss: Tensor) -> None: ...
    def untouched(self) -> dict[str, float]: ...
    def step(self, lr: float) -> StepResult: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path, saved_ranks: int) -> None: ...
    def full_state(self, prefix: str) -> dict[str, Tensor]: ...


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share ``lr_scale`` of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
) -> tuple[Engine, dict[str, Any] | None]:
    """Wraps the trainable module; returns the engine and the DeepSpeed dict it was built from."""
    bf16 = resolve_precision(config) == "bf16"
    if config.engine.kind == "ddp":
        return PlainEngine(model, optimizer, config, world), None
    rows = config.batch.global_size // world.size
    filled = ds_config(config, rows, bf16=bf16)
    return DeepSpeedEngine(model, optimizer, filled, config, world), filled


def resolve_precision(config: Config) -> str:
    """``auto`` is bf16 where an accelerator computes in it, fp32 elsewhere."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


class DeepSpeedEngine:
    """ZeRO 1, 2 or 3 through Accelerate."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        filled: dict[str, Any],
        config: Config,
        world: World,
    ) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.utils import InitProcessGroupKwargs

        _keep_gloo(world)
        plugin = DeepSpeedPlugin(hf_ds_config=filled)
        handler = InitProcessGroupKwargs(
            backend="nccl" if world.device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=config.engine.timeout_minutes),
        )
        precision = "bf16" if filled["bf16"]["enabled"] else "no"
        accelerator = Accelerator(
            deepspeed_plugin=plugin, kwargs_handlers=[handler], mixed_precision=precision
        )
        if accelerator.num_processes != world.size:
            raise RuntimeError(
                f"Accelerate sees {accelerator.num_processes} processes, the process group "
                f"{world.size}"
            )
        _refuse_scalar_parameters(model)
        # gathered columns come as float32 that was bfloat16 before
        self.bf16 = filled["bf16"]["enabled"]
        self.engine: Any = accelerator.prepare(model, optimizer)[0]
        self.module = self.engine.module
        self.gathers_weights = config.engine.kind == "zero3"
        self.world = world
        self._sums: WideSums | None = None
        self._untouched: list[str] = []

    @property
    def steps(self) -> int | None:
        return int(self.engine.global_steps)

    def forward(self, task: str, **inputs: Any) -> Any:
        with half_operands(self.bf16):
            return self.engine(task, **inputs)

    @contextlib.contextmanager
    def gradients(self, chunks: int = 1) -> Iterator[None]:
        with self.engine.coalesce_grad_reduction():
            self._sums = WideSums(self.module) if self.bf16 and chunks > 1 else None
            yield
            if self._sums is not None:
                self._sums.write_back()
                self._sums = None
            self._untouched = zero_missing_gradients(self.module, self.engine.optimizer)

    def untouched(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        return largest_gradients(self.module, self._untouched, safe_get_full_grad)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if self._sums is not None:
            self._sums.add()

    def step(self, lr: float) -> StepResult:
        set_learning_rate(self.engine.optimizer, lr)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepResult(float(norm if norm is not None else 0.0), self.engine.was_step_applied())

    def save(self, folder: Path) -> None:
        """Engine state of all ranks; called by all ranks."""
        self.engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path, saved_ranks: int) -> None:
        """Restores all ranks' state from `folder` without running anything stored in it.

        Group hyperparameters and the clipping norm stay those of the configuration.

        Raises:
            OtherParameters: the checkpoint is of a model with other parameters.
            UserError: it is incomplete.
        """
        allow_deepspeed_globals()
        optimizer, rank, size = self.engine.optimizer, self.world.rank, self.world.size
        wanted, clip = hyperparameters(optimizer), optimizer.clip_grad
        if has_own_groups(self.engine, folder / "engine") and saved_ranks == size:
            path, _ = self.engine.load_checkpoint(str(folder), tag="engine")
            if path is None:
                raise UserError(f"{folder} holds no engine state; choose another checkpoint")
        else:
            self._refuse_other_layout(saved_ranks)
            load_resharded(self.engine, folder / "engine", saved_ranks, rank, size)
        set_hyperparameters(optimizer, wanted)
        optimizer.clip_grad = clip

    def _refuse_other_layout(self, saved_ranks: int) -> None:
        """An option of a user's DeepSpeed file leaves gaps between the flat weights."""
        aligned = self.engine.zero_parameter_alignment()
        if aligned and self.engine.zero_optimization_stage() < 3:
            raise UserError(
                "parameter_alignment of engine.ds_config: a run with it continues with its "
                f"{saved_ranks} processes and its parameter groups (optim.weight_decay, "
                f"optim.embedding_lr) only; here are {self.world.size} processes"
            )

    def full_state(self, prefix: str) -> dict[str, Tensor]:
        """fp32 parameters under `prefix` on rank 0 (empty elsewhere); a collective call.

        Parameters come from the optimizer's fp32 masters, whole, whatever the ZeRO stage.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if not name.startswith(prefix):
                continue
            full = safe_get_full_fp32_param(parameter)
            full = parameter.detach() if full is None else full
            if self.world.rank == 0:
                state[name.removeprefix(prefix)] = full.detach().float().cpu().clone()
        if self.world.rank == 0:
            state |= _buffers(self.module, prefix)
        return state


@torch.no_grad()
def zero_missing_gradients(module: nn.Module, optimizer: Any) -> list[str]:
    """Gives each trainable parameter without a gradient an explicit zero; returns their names.

    DeepSpeed reduces only the parameters that have a gradient, but its optimizer step reads the
    reduced gradients of all of them: ZeRO-3, and every stage with optimizer offload, would apply
    what an earlier step left in those buffers (seen in 0.19.8: ``stage3.py``,
    ``independent_gradient_partition_epilogue``; ``stage_1_and_2.py``, ``copy_grads_in_partition``).
    """
    # with a wider accumulation type, ZeRO-1 keeps gradients in an attribute of their own
    parked = getattr(optimizer, "use_grad_accum_attribute", False)
    missing = []
    for name, parameter in module.named_parameters():
        held = getattr(parameter, "grad_accum", None) if parked else parameter.grad
        if held is not None or not parameter.requires_grad:
            continue
        missing.append(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        zero = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        if parked:
            wide = zero.to(optimizer.gradient_accumulation_dtype)
            parameter.grad_accum = wide  # pyright: ignore[reportAttributeAccessIssue]
            continue
        # a parameter of ZeRO-3 is empty outside of a forward pass, and refuses a whole gradient
        data, parameter.data = parameter.data, zero
        parameter.grad = zero
        parameter.data = data
    return missing


def largest_gradients(
    module: nn.Module, names: list[str], read: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, float]:
    """Largest absolute element of the gradients of some parameters; 0 where there is none."""
    parameters = dict(module.named_parameters())
    gradients = {name: read(parameters[name]) for name in names}
    return {n: 0.0 if g is None else float(g.abs().max()) for n, g in gradients.items()}


class WideSums:
    """Sums of half-precision gradients in float32.

    Chunks would add up in bfloat16, in which 256 equal gradients are as much as any larger number
    of them: the sum stands still where its rounding exceeds what is added.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self) -> None:
        """Moves what the parameters' gradients hold to the sums."""
        for number, parameter in enumerate(self._parameters):
            grad = parameter.grad
            if grad is None:
                continue
            if number in self._sums:
                self._sums[number] += grad
            else:
                self._sums[number] = grad.float()
            # kept in its place: a parameter of ZeRO-3 has no shape now that a gradient could take
            grad.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the sums into the gradients, once."""
        for number, total in self._sums.items():
            grad = self._parameters[number].grad
            assert grad is not None
            grad.copy_(total)


class PlainEngine:
    """Data parallelism without sharding: whole weights on each rank, one flat all-reduce.

    The reference path: float64 works, and nothing but this file stands between autograd and
    the optimizer. A parameter without gradient counts as gradient zero, as under ZeRO.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> None:
        precision = resolve_precision(config)
        if precision == "fp64":
            model.double()
        self.module = model.to(world.device)
        self.gathers_weights = False
        self.optimizer, self.world = optimizer, world
        self.clip = config.optim.clip
        self.bf16 = precision == "bf16"
        self.steps: int | None = 0
        self._untouched: list[str] = []
        if world.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def forward(self, task: str, **inputs: Any) -> Any:
        if task == "encode" and self.bf16:
            with torch.autocast(self.world.device.type, torch.bfloat16):
                return self.module(task, **inputs).float()
        with half_operands(self.bf16):
            return self.module(task, **inputs)

    @contextlib.contextmanager
    def gradients(self, chunks: int = 1) -> Iterator[None]:
        del chunks  # gradients have the weights' precision, which is float32 or better
        self.optimizer.zero_grad(set_to_none=True)
        yield
        self._untouched = zero_missing_gradients(self.module, self.optimizer)
        self._average()

    def untouched(self) -> dict[str, float]:
        return largest_gradients(self.module, self._untouched, lambda parameter: parameter.grad)

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

    def save(self, folder: Path) -> None:
        if self.world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.module.state_dict(),
                "optimizer": state_by_name(self.optimizer, self.module),
                "steps": self.steps,
            }
            torch.save(state, folder / "engine.pt")

    def load(self, folder: Path, saved_ranks: int) -> None:
        del saved_ranks  # every rank holds everything
        path = folder / "engine.pt"
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


@contextlib.contextmanager
def unsharded_loading() -> Iterator[None]:
    """Inside, ``from_pretrained`` gives whole models again.

    Accelerate leaves transformers a ZeRO-3 configuration under which every model that is loaded
    comes out in shards (https://github.com/huggingface/accelerate/issues/3140).
    """
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def allow_deepspeed_globals() -> None:
    """Lets weights-only loading read DeepSpeed's own four classes, and nothing else.

    DeepSpeed loads with ``weights_only=False`` throughout, so a planted checkpoint would run
    code; the environment variable forces the safe loader on it.
    """
    import os

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise UserError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: unset it to load a checkpoint")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals(
        [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    )


def _keep_gloo(world: World) -> None:
    """On CPU hosts DeepSpeed would compile a shared-memory collective for minutes at first use.

    It needs a C++ compiler, and is no faster than gloo for our sizes.
    """
    if world.device.type == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _refuse_scalar_parameters(model: nn.Module) -> None:
    """DeepSpeed 0.19.7 and later cannot broadcast 0-dim parameters; say so in our words."""
    names = [name for name, p in model.named_parameters() if p.ndim == 0]
    if names:
        raise UserError(f"parameters {names} have no dimension; give them shape [1] for DeepSpeed")


def _buffers(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    persistent = module.state_dict().keys()
    return {
        name.removeprefix(prefix): buffer.detach().cpu().clone()
        for name, buffer in module.named_buffers()
        if name.startswith(prefix) and name in persistent
    }
