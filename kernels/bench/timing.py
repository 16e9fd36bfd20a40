"""Fair timing: interleaved rounds, device events, a cold L2, and a budget that is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.problems import UPSTREAM, Problem

# larger than any L2 at hand (H200: 60 MB); written before every timed run
FLUSH_BYTES = 256 * 2**20
PHASES = ("evaluation", "forward", "backward", "both")


class Budget:
    """Wall-clock seconds that must not be exceeded."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    def remaining(self) -> float:
        return max(0.0, self._end - self._now())

    def allows(self, seconds: float) -> bool:
        return self.remaining() >= seconds

    def share(self, seconds: float) -> Budget:
        """A part of what is left, at most `seconds`."""
        return Budget(min(seconds, self.remaining()), self._now)


@dataclass
class Samples:
    """Milliseconds of one implementation, one number per timed run and phase."""

    runs: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    peak_bytes: int = 0
    failure: str = ""

    def add(self, **milliseconds: float) -> None:
        for name, value in milliseconds.items():
            self.runs[name].append(value)

    def summary(self) -> dict[str, Any]:
        """What the table needs: median with 10th and 90th percentile of every phase that ran."""
        if self.failure:
            return {"status": self.failure}
        found = {name: quantiles(values) for name, values in self.runs.items() if values}
        return {
            "status": "measured",
            "runs": len(self.runs["both"]),
            "milliseconds": found,
            "peak_bytes": self.peak_bytes,
        }


def quantiles(values: list[float]) -> dict[str, float]:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9)}


class Clock(Protocol):
    """Times one run on a device.

    Attributes:
        peak_bytes: Most device memory of the last step less what was allocated before it.
    """

    peak_bytes: int

    def step(self, problem: Problem, loss: Callable[[], Tensor]) -> dict[str, float]:
        """Forward and backward from cold; milliseconds of "forward", "backward" and "both"."""
        ...

    def evaluation(self, problem: Problem, loss: Callable[[], Tensor]) -> dict[str, float]:
        """The loss alone, without gradients; milliseconds of "evaluation"."""
        ...


def backward(value: Tensor) -> None:
    """Gradients for an upstream gradient that is not 1; plain products have none."""
    if value.requires_grad:
        value.backward(torch.full((), UPSTREAM, dtype=value.dtype, device=value.device))


def step(problem: Problem, loss: Callable[[], Tensor]) -> Tensor:
    """One loss and its gradients."""
    problem.clear()
    value = loss()
    backward(value)
    return value.detach()


class CudaClock:
    """Device events around the work, everything queued before them finished."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def _events(self, count: int) -> list[torch.cuda.Event]:
        return [torch.cuda.Event(enable_timing=True) for _ in range(count)]

    def step(self, problem: Problem, loss: Callable[[], Tensor]) -> dict[str, float]:
        problem.clear()
        start, middle, end = self._events(3)
        self._flush.zero_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start.record()
        value = loss()
        middle.record()
        backward(value)
        end.record()
        torch.cuda.synchronize()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before
        return {
            "forward": start.elapsed_time(middle),
            "backward": middle.elapsed_time(end),
            "both": start.elapsed_time(end),
        }

    def evaluation(self, problem: Problem, loss: Callable[[], Tensor]) -> dict[str, float]:
        start, end = self._events(2)
        self._flush.zero_()
        torch.cuda.synchronize()
        with torch.no_grad():
            start.record()
            loss()
            end.record()
        torch.cuda.synchronize()
        return {"evaluation": start.elapsed_time(end)}


class HostClock:
    """The same on a CPU, for dry runs; it does not measure memory."""

    peak_bytes = 0

    def step(self, problem: Problem, loss: Callable[[], Tensor]) -> dict[str, float]:
        problem.clear()
        start = time.perf_counter()
        value = loss()
        middle = time.perf_counter()
        backward(value)
        end = time.perf_counter()
        return {
            "forward": 1e3 * (middle - start),
            "backward": 1e3 * (end - middle),
            "both": 1e3 * (end - start),
        }

    def evaluation(self, problem: Problem, loss: Callable[[], Tensor]) -> dict[str, float]:
        start = time.perf_counter()
        with torch.no_grad():
            loss()
        return {"evaluation": 1e3 * (time.perf_counter() - start)}


def interleave(
    problem: Problem,
    losses: Mapping[str, Callable[[], Tensor]],
    clock: Clock,
    budget: Budget,
    *,
    rounds: int,
    evaluations: int = 0,
    warmups: int = 0,
) -> dict[str, Samples]:
    """Round after round, every implementation once per round, until `rounds` or the budget ends.

    Slow implementations leave once they used their fair share of the budget, so that one of them
    cannot take the rounds of the others; each runs at least once. Implementations must have been
    called before where compilation is not to be timed. Rounds before `warmups` are thrown away:
    they fill the allocator after other implementations emptied it.
    """
    samples = {name: Samples() for name in losses}
    spent = dict.fromkeys(losses, 0.0)
    fair = budget.remaining() / max(1, len(losses))
    for turn in range(-warmups, rounds):
        for name, loss in losses.items():
            found = samples[name]
            done = len(found.runs["both"])
            late = spent[name] >= fair or not budget.allows(spent[name] / max(1, done + warmups))
            if found.failure or (done and late):
                continue
            start = time.monotonic()
            try:
                took = clock.step(problem, loss)
                if 0 <= turn < evaluations:
                    took |= clock.evaluation(problem, loss)
            except torch.OutOfMemoryError:
                found.failure = "not measured: out of memory"
                problem.clear()
                continue
            if turn >= 0:
                found.add(**took)
            found.peak_bytes = max(found.peak_bytes, clock.peak_bytes)
            spent[name] += time.monotonic() - start
    return samples
