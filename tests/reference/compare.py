"""How far a run is from its reference, and what distance is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalr_scale.config import Config
    from reference.runs import Run
    from reference.trainer import Result


@dataclass(frozen=True)
class Bounds:
    """Largest relative difference of a loss, term or gradient norm, and of the weights.

    gate, order, kink: a step that comes this close to a jump (``losses.Discontinuities``) ends the
        comparison, because rounding decides on which side of it the run goes on.
    norms: compare the norm of each matrix, not its elements, and no vectors: biases start at zero
        and are made of what eight bits leave of their gradients.
    """

    steps: float
    weights: float
    gate: float
    order: float
    kink: float
    norms: bool = False


@dataclass
class Difference:
    """Worst relative differences, with the place where they were found.

    compared: steps that were compared; steps after a jump that rounding decides are not.
    """

    steps: float = 0.0
    weights: float = 0.0
    where: str = ""
    weight: str = ""
    compared: int = 0
    fault: str = ""

    def within(self, bounds: Bounds) -> bool:
        return not self.fault and self.steps <= bounds.steps and self.weights <= bounds.weights

    def __str__(self) -> str:
        return (
            f"{self.fault} steps {self.steps:.2e} ({self.where}), weights {self.weights:.2e} "
            f"({self.weight}), {self.compared} steps compared"
        )


def compare(config: Config, run: Run, reference: Result, bounds: Bounds) -> Difference:
    """Every step's loss, terms, gradient norm and rate, then all weights."""
    found = Difference()
    numbers = [record["step"] for record in run.steps]
    if numbers != list(range(1, len(reference.steps) + 1)):
        found.fault = f"steps {numbers}, expected 1 to {len(reference.steps)}"
        return found
    for record, step in zip(run.steps, reference.steps, strict=True):
        values = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, **step.terms}
        own = _numbers(record)
        if own.keys() != values.keys() or record["ids"] != step.items:
            found.fault = (
                f"step {record['step']}: {record['stream']} {record['ids']} {sorted(own)}, "
                f"expected {step.stream} {step.items} {sorted(values)}"
            )
            return found
        if step.gate < bounds.gate or step.order < bounds.order or step.kink < bounds.kink:
            return found
        for name, value in values.items():
            distance = relative(own[name], value)
            if distance > found.steps:
                found.steps, found.where = distance, f"step {record['step']} {name}"
        found.compared += 1
    _compare_weights(found, run, reference, bounds)
    return found


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    others = ("kind", "step", "stream", "ids", "samples_per_second", "data_share")
    return {name: value for name, value in record.items() if name not in others}


# Rounding of a gradient element in fp32, as a share of the norm of the whole gradient.
ROUNDING = 1e-6

# Weights whose exact gradient is zero: a softmax and a batch norm do not see what is added to all
# of their inputs. Their gradient is rounding, and AdamW divides it by its own size.
FREE = (".key.bias", ".k_lin.bias", "aligner.0.bias", "aligner.3.bias")


def _compare_weights(found: Difference, run: Run, reference: Result, bounds: Bounds) -> None:
    if run.weights.keys() != reference.weights.keys():
        found.fault = f"weights {sorted(run.weights.keys() ^ reference.weights.keys())}"
        return
    reach = sum(step.lr for step in reference.steps)
    for name, expected in reference.weights.items():
        free = name.endswith(FREE)
        if (free and bounds.weights > 1e-6) or (bounds.norms and expected.ndim < 2):
            continue
        own = run.weights[name].double()
        if bounds.norms:
            own, expected = own.norm(), expected.norm()
        # AdamW may move an element by the rate in every step, whatever its gradient
        scale = max(float(expected.abs().max()), reach)
        away = (own - expected).abs()
        if bounds.weights > 1e-6 and not bounds.norms:
            away = away - ROUNDING * reference.sensitivity[name]
        distance = max(0.0, float(away.max())) / scale
        distance *= 1e-3 if free else 1
        if distance > found.weights:
            found.weights, found.weight = distance, name


def relative(value: float | None, expected: float) -> float:
    if value is None:
        return math.inf
    return abs(value - expected) / max(abs(expected), 1e-6)
