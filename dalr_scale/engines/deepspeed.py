"""ZeRO 1, 2 and 3 on DeepSpeed, through Accelerate, and what the two keep for a whole process."""

# DeepSpeed, Accelerate and parts of torch have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Concatenate

import torch
from dalr_kernels import half_operands
from torch import Tensor, nn

from dalr_scale.engines.gradients import (
    FP32GradAccumulator,
    largest_gradients,
    zero_missing_gradients,
)
from dalr_scale.engines.protocol import (
    AnyModule,
    P,
    RunsFunctions,
    StepResult,
    T,
    Wrapped,
    set_learning_rate,
)
from dalr_scale.engines.reshard import has_own_groups, load_resharded
from dalr_scale.engines.restore import hyperparameters, set_hyperparameters
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from dalr_scale.distributed.world import World
    from dalr_scale.engines.ds_config import DeepSpeedSettings


class DeepSpeedEngine:
    """ZeRO 1, 2 or 3 through Accelerate."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        filled: DeepSpeedSettings,
        world: World,
        *,
        timeout_minutes: float = 30.0,
    ) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.utils import InitProcessGroupKwargs

        _keep_gloo(world)
        plugin = DeepSpeedPlugin(hf_ds_config=filled)
        handler = InitProcessGroupKwargs(
            backend="nccl" if world.device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
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
        own = model if isinstance(model, RunsFunctions) else Wrapped(model)
        self.engine: Any = accelerator.prepare(own, optimizer)[0]
        self.module = model
        self.gathers_weights = filled["zero_optimization"]["stage"] == 3
        self.world = world
        self._sums: FP32GradAccumulator | None = None
        self._unused: list[str] = []

    @property
    def steps(self) -> int | None:
        return int(self.engine.global_steps)

    @property
    def device(self) -> torch.device:
        return self.world.device

    def apply(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        def call(module: AnyModule) -> T:
            return function(module, *args, **kwargs)

        with half_operands(self.bf16):
            return self.engine(call)

    def encode(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        # the module itself is in bf16: the encoder needs nothing more
        return self.apply(function, *args, **kwargs)

    @contextlib.contextmanager
    def gradients(self, chunks: int = 1) -> Generator[None]:
        with self.engine.coalesce_grad_reduction():
            self._sums = FP32GradAccumulator(self.module) if self.bf16 and chunks > 1 else None
            yield
            if self._sums is not None:
                self._sums.write_back()
                self._sums = None
            self._unused = zero_missing_gradients(self.module, self.engine.optimizer)

    def unused_gradients(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        return largest_gradients(self.module, self._unused, safe_get_full_grad)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if self._sums is not None:
            self._sums.add()

    def step(self, lr: float) -> StepResult:
        set_learning_rate(self.engine.optimizer, lr)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepResult(float(norm if norm is not None else 0.0), self.engine.was_step_applied())

    def save(self, directory: Path) -> None:
        """Engine state of all ranks; called by all ranks."""
        self.engine.save_checkpoint(str(directory), tag="engine")

    def load(self, directory: Path, saved_ranks: int) -> None:
        """Restores all ranks' state from `directory` without running anything stored in it.

        Group hyperparameters and the clipping norm stay those of the configuration.

        Raises:
            OtherParameters: the checkpoint is of a model with other parameters.
            UserError: it is incomplete.
        """
        allow_deepspeed_globals()
        optimizer, rank, size = self.engine.optimizer, self.world.rank, self.world.size
        wanted, clip = hyperparameters(optimizer), optimizer.clip_grad
        if has_own_groups(self.engine, directory / "engine") and saved_ranks == size:
            path, _ = self.engine.load_checkpoint(str(directory), tag="engine")
            if path is None:
                raise UserError(f"{directory} holds no engine state; choose another checkpoint")
        else:
            self._refuse_other_layout(saved_ranks)
            load_resharded(self.engine, directory / "engine", saved_ranks, rank, size)
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


@contextlib.contextmanager
def unsharded_loading() -> Generator[None]:
    """Inside, ``from_pretrained`` gives whole models again.

    Accelerate leaves transformers a ZeRO-3 configuration under which every model that is loaded
    comes out in shards (https://github.com/huggingface/accelerate/issues/3140).
    """
    from transformers.integrations import deepspeed as integration

    # there is a setter, but no way to ask for what was set
    reference = integration._hf_deepspeed_config_weak_ref  # pyright: ignore[reportPrivateUsage]
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
    """DeepSpeed 0.19.7 and later cannot broadcast 0-dim parameters; names them."""
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
