"""What a step asks of an engine, whichever shards the weights.

Every engine offers the same few calls. A step opens one ``gradients()`` block, back-propagates
into it as often as it likes, and leaves it with gradients averaged over ranks by one reduction.
The block is told over how many chunks they add up, since bfloat16 cannot add many.
Repeated bare ``backward`` calls would be silently wrong on ZeRO-1 and ZeRO-2, where each one
reduces and the last one wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")
AnyModule: TypeAlias = Any
"""The module of an engine: whoever hands over a function for it knows its type."""


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping, and whether the optimizer changed the weights."""

    grad_norm_preclip: float
    applied: bool


class Engine(Protocol):
    """A module and its optimizer on all ranks.

    Attributes:
        module: the trainable module.
        gathers_weights: whether ``apply`` and ``encode`` call collectives of their own (ZeRO-3).
        device: where the weights are.
        steps: optimizer steps taken, skipped ones included; None where a checkpoint of an
            earlier version did not say.

    `apply` calls ``function(module, ...)`` inside the engine's forward, in which parameters may be
    used. `encode` does the same and may compute in half precision although the weights are float32
    (autocast); its tensors come out in the precision of the weights or of the engine.

    `unused_gradients` is a collective call between ``gradients()`` and ``step()``: for each
    parameter that no term of the step reached, the largest absolute gradient that the
    optimizer is about to apply to it. Every value must be 0.
    """

    gathers_weights: bool

    @property
    def module(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def steps(self) -> int | None: ...
    def apply(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    def encode(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    def gradients(self, chunks: int = 1) -> AbstractContextManager[None]: ...
    def backward(self, loss: Tensor) -> None: ...
    def unused_gradients(self) -> dict[str, float]: ...
    def step(self, lr: float) -> StepResult: ...
    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path, saved_ranks: int) -> None: ...
    def full_state(self, prefix: str) -> dict[str, Tensor]: ...


class RunsFunctions(nn.Module):
    """A module whose forward calls a function on it.

    DeepSpeed gathers parameters and prepares its backward pass around one ``forward``. A function
    as its only argument lets a step use the module in several ways, and shows DeepSpeed's hooks no
    tensors that they would wrap.
    """

    def forward(self, function: Callable[[AnyModule], T]) -> T:
        """Returns ``function(self)``."""
        return function(self)


class Wrapped(RunsFunctions):
    """A module of another library, on which functions are to be called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[AnyModule], T]) -> T:
        """Returns ``function(module)``."""
        return function(self.module)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share ``lr_scale`` of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
