"""What every loss term must pass; CONTRIBUTING.md's recipe calls it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from objective_tools import objective, views
from torch import Tensor

from dalr_scale.objective.total import batch_loss
from dalr_scale.objective.views import KernelOptions, LossBatch, Views

if TYPE_CHECKING:
    from dalr_scale.config import ObjectiveConfig

# What a student computes; everything else in `Views` is constant.
STUDENT = (
    "z1", "z2", "p1", "p2", "u", "u_caption", "z1_image", "aligned_text", "aligned_image"
)  # fmt: skip
WEIGHT = 0.3
RANKS = 2


def check_term(name: str, dense: Callable[[Views], Tensor]) -> None:
    """Value and gradient of a registered term, in chunks and over ranks.

    Args:
        name: weighted by ``objective.terms.NAME``.
        dense: the mean over all rows, in plain differentiable torch on the whole batch.

    Raises:
        AssertionError: one of them differs from `dense` by more than the rounding of float64.
    """
    own = _leaves(views())
    expected = dense(own)
    gradients = _gradients(expected, own)
    spec = objective("simcse", terms={name: WEIGHT})
    for options in ({"impl": "reference"}, {"impl": "torch", "chunk_rows": 3}):
        batch = LossBatch(own, own, options=KernelOptions(**options))  # type: ignore[typeddict-item]
        _compare(batch, spec, name, [expected, *gradients])
    _check_memory(spec, own)
    _check_ranks(spec, name, own, [expected, *gradients])


def check_with_kernels(name: str) -> None:
    """The whole objective with ``impl = "triton"``: the term runs beside the fused kernels.

    Raises:
        AssertionError: value or gradient differs by more than the rounding of float32.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = _leaves(_converted(views(), device))
    spec = objective("dalr", cross_weight=0.0, g2l_weight=0.0, terms={name: WEIGHT})
    found: list[list[Tensor]] = []
    for impl in ("reference", "triton"):
        batch = LossBatch(
            own, own, text_weights=(0.33, 0.67), options={"impl": impl, "chunk_rows": 4}
        )
        loss = batch_loss(spec, batch)
        found.append([loss.terms[name], loss.total, *_gradients(loss.total, own)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _compare(batch: LossBatch, spec: ObjectiveConfig, name: str, expected: list[Tensor]) -> None:
    """The term alone, as its share of the total and of the gradients."""
    without = batch_loss(dataclasses.replace(spec, terms={}), batch)
    found = batch_loss(spec, batch)
    share = (found.total - without.total) / WEIGHT
    torch.testing.assert_close(found.terms[name], expected[0].detach(), rtol=1e-10, atol=1e-12)
    got = [share, *_gradients(share, batch.cols)]
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-8, atol=1e-11)


def _check_memory(spec: ObjectiveConfig, own: Views) -> None:
    """Between the passes nothing of rows x columns is kept."""
    kept: list[int] = []
    matrix = len(own.ids) ** 2

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.shape[-1:] == own.ids.shape else 0)
        return tensor

    options: KernelOptions = {"impl": "torch", "chunk_rows": 3}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch_loss(spec, LossBatch(own, own, options=options)).total.backward()
    assert sum(kept) < matrix, "the term keeps rows x columns for its backward pass"


def _check_ranks(spec: ObjectiveConfig, name: str, own: Views, expected: list[Tensor]) -> None:
    """Each rank has some rows and all columns; their mean is the loss of the whole batch."""
    rows = len(own.ids) // RANKS
    starts = [rank * rows for rank in range(RANKS)]
    parts = [LossBatch(own.part(first, first + rows), own, first) for first in starts]
    losses = [batch_loss(spec, part) for part in parts]
    value = torch.stack([loss.terms[name] for loss in losses]).mean()
    torch.testing.assert_close(value, expected[0].detach(), rtol=1e-10, atol=1e-12)
    without = [batch_loss(dataclasses.replace(spec, terms={}), part) for part in parts]
    pairs = zip(losses, without, strict=True)
    share = torch.stack([(a.total - b.total) / WEIGHT for a, b in pairs]).mean()
    for got, want in zip(_gradients(share, own), expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def _leaves(v: Views) -> Views:
    """Independent leaves for everything that the student computes."""
    fresh = {name: getattr(v, name).detach().clone().requires_grad_() for name in STUDENT}
    tokens = [tensor.detach().clone().requires_grad_() for tensor in v.z1_tokens]
    return dataclasses.replace(v, **fresh, z1_tokens=tokens)


def _converted(v: Views, device: torch.device) -> Views:
    """In float32 on a device; numbers of images stay integers."""

    def convert(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(value, Tensor):
            return value.to(device, torch.float32 if value.is_floating_point() else None)
        return [value.to(device, torch.float32) for value in value]

    named = {f.name: getattr(v, f.name) for f in dataclasses.fields(v)}
    return Views(**{k: None if x is None else convert(x) for k, x in named.items()})  # type: ignore[arg-type]


def _gradients(loss: Tensor, own: Views) -> list[Tensor]:
    leaves = [getattr(own, name) for name in STUDENT] + list(own.z1_tokens)
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
