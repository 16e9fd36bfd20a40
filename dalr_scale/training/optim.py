"""Parameter groups, the optimizer, and the learning rate as a pure function of the step.

The scheduler is never handed to Accelerate, which would step it once per process
(https://github.com/huggingface/accelerate/issues/2142); a resumed run needs only its step.
"""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import nn

from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from dalr_scale.config import OptimConfig


def count_steps(optim: OptimConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: ``optim.steps``, or ``optim.epochs`` as written, rounded up.

    Raises:
        UserError: the warm-up leaves no step for the decay.
    """
    # 1.1 epochs of 10 steps are 11: as a binary fraction 1.1 is a little more, and would make 12
    steps = optim.steps or math.ceil(Fraction(str(optim.epochs)) * steps_per_epoch)
    check_warmup(optim, steps)
    return steps


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """Refuses a warm-up that lasts to the end: the rate would never fall, or never be reached."""
    if optim.warmup >= max(steps, 1):
        raise UserError(
            f"optim.warmup = {optim.warmup} leaves none of the run's {steps} steps for the decay; "
            "lower it, or train longer"
        )


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over ``optim.warmup`` steps, then linear decay to 0 at `total_steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    return optim.lr * max(0.0, (total_steps - step) / max(1, total_steps - optim.warmup))


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (fused on CUDA) or SGD over groups that carry their share of the learning rate."""
    groups = parameter_groups(model, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    beta1, beta2 = optim.betas
    fused = {}
    if "fused" in inspect.signature(torch.optim.AdamW).parameters and torch.cuda.is_available():
        fused = {"fused": True}
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, **fused)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Groups by weight decay (matrices only) and by learning rate (embedding tables may differ)."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    ratio = optim.embedding_lr / optim.lr if optim.embedding_lr else 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            scale = ratio if id(parameter) in embeddings else 1.0
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), params in groups.items()
    ]
