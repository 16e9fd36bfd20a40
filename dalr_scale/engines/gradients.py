"""Gradients between the backward passes of a step and its optimizer: zeros, sums, and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


@torch.no_grad()
def zero_missing_gradients(module: nn.Module, optimizer: object) -> list[str]:
    """Gives each trainable parameter without a gradient an explicit zero; returns their names.

    DeepSpeed reduces only the parameters that have a gradient, but its optimizer step reads the
    reduced gradients of all of them: ZeRO-3, and every stage with optimizer offload, would apply
    what an earlier step left in those buffers (seen in 0.19.8: ``stage3.py``,
    ``independent_gradient_partition_epilogue``; ``stage_1_and_2.py``, ``copy_grads_in_partition``).
    """
    # with a wider accumulation type, ZeRO-1 keeps gradients in an attribute of their own
    parked = getattr(optimizer, "use_grad_accum_attribute", False)
    wide_type: torch.dtype = getattr(optimizer, "gradient_accumulation_dtype", torch.float32)
    missing: list[str] = []
    for name, parameter in module.named_parameters():
        held = getattr(parameter, "grad_accum", None) if parked else parameter.grad
        if held is not None or not parameter.requires_grad:
            continue
        missing.append(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        zero = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        if parked:
            wide = zero.to(wide_type)
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


class FP32GradAccumulator:
    """Sums of half-precision gradients in float32.

    Chunks would add up in bfloat16, in which 256 equal gradients are as much as any larger number
    of them: accumulation saturates where its rounding exceeds what is added.
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
