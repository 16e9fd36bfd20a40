"""Correctness before speed: every implementation against dense float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import ours
from bench.timing import step

if TYPE_CHECKING:
    from bench.problems import Problem

# What an implementation may add to the error of eager 16-bit torch on the same inputs. A wrong
# scale, a dropped term or a dropped negative is far outside, rounding of 16-bit factors inside.
LOSS_TOLERANCE = 2e-3
GRADIENT_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Errors:
    """Relative error of the loss, and of the gradients in the Frobenius norm (worst leaf)."""

    loss: float
    gradient: float


@dataclass(frozen=True)
class Answer:
    """Loss and gradients of a problem in float64."""

    loss: Tensor
    gradients: list[Tensor]


def exact(problem: Problem) -> Answer:
    """The specification, dense, on the problem's 16-bit inputs taken as exact."""
    double = problem.to(torch.float64)
    value = step(double, ours.loss(double, impl="reference"))
    return Answer(value, double.gradients())


def errors(problem: Problem, loss: Callable[[], Tensor], answer: Answer) -> Errors:
    """Distance of one implementation from the exact answer; NaN counts as infinite."""
    value = step(problem, loss).double()
    worst = 0.0
    found = problem.gradients()
    if len(found) != len(answer.gradients):
        raise RuntimeError(f"{len(found)} gradients instead of {len(answer.gradients)}")
    for got, want in zip(found, answer.gradients, strict=True):
        worst = max(worst, _finite((got - want).norm() / want.norm()))
    problem.clear()
    return Errors(_finite((value - answer.loss).abs() / answer.loss.abs()), worst)


def _finite(value: Tensor) -> float:
    number = value.item()
    return number if number == number else float("inf")


def verdict(found: Errors, eager16: Errors) -> str:
    """Why the errors are too large, or nothing when they are not."""
    limits = {
        "loss": 1.5 * eager16.loss + LOSS_TOLERANCE,
        "gradient": 1.5 * eager16.gradient + GRADIENT_TOLERANCE,
    }
    too_large = [
        f"{name} off by {value:.1e} (limit {limits[name]:.1e})"
        for name, value in asdict(found).items()
        if not value <= limits[name]
    ]
    return "wrong: " + ", ".join(too_large) if too_large else ""
