"""All GPU benchmarks in one command that ends in time; see README.md beside this file.

usage: python kernels/bench/run.py [--seconds 470] [--resume] [--only TEXT] [--dry-run]
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

# a checkout runs as it is, without an installation
sys.path[:0] = [str(directory) for directory in Path(__file__).resolve().parents[1:3]]

import torch
from torch import Tensor

from bench import checking, host, problems, results, schedule, table, targets
from bench.peers import EAGER, NO_BASELINE, Implementation, Unavailable, implementations
from bench.problems import Problem, square
from bench.timing import Budget, Clock, CudaClock, HostClock, interleave

HERE = Path(__file__).resolve().parent
CHECK_ROWS = 2048
# seconds the last run may overshoot before the process is ended
GRACE = 30.0
EVALUATIONS = 10
# part of a cell's time that compilation and first runs may not touch
TIMING_SHARE = 0.35
Loss = Callable[[], Tensor]


class Benchmark:
    """One run over the schedule: builds, checks, times and writes as it goes."""

    def __init__(
        self,
        device: torch.device,
        path: Path,
        document: dict[str, Any],
        budget: Budget,
        implementations: Mapping[str, Implementation],
    ) -> None:
        self.device = device
        self.path = path
        self.document = document
        self.budget = budget
        self.clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
        self.implementations = implementations
        self._answers: dict[tuple[Any, ...], tuple[Problem, checking.Answer, checking.Errors]] = {}
        self._verdicts: dict[tuple[Any, ...], tuple[str, checking.Errors | None]] = {}

    def save(self) -> None:
        results.write(self.path, self.document)
        self.path.with_suffix(".md").write_text(table.render(self.document), encoding="utf-8")

    def machine(self) -> None:
        """The two ceilings of the card, unless an earlier run measured them."""
        if self.device.type == "cuda" and not self.document["machine"]:
            self.document["machine"] = ceilings()
        self.save()

    def cell(self, cell: schedule.Cell, entry: dict[str, Any]) -> None:
        """Measure what is pending of a cell; every outcome is recorded."""
        names = results.pending(entry)
        least = 2.0 if cell.warm else cell.seconds / 2
        if not names or not self.budget.allows(least):
            return
        share = self.budget.share(cell.seconds)
        rows = entry["contestants"]
        try:
            problem = problems.make(cell.problem, cell.shape, self.device, data=cell.data)
        except torch.OutOfMemoryError:
            for name in names:
                rows[name] = {"status": "not measured: out of memory making the inputs"}
            return
        losses: dict[str, Loss] = {}
        for name in names:
            if losses and not share.allows(TIMING_SHARE * cell.seconds):
                break  # the rest of the cell's time belongs to those that are ready
            rows[name] = self._prepare(problem, self.implementations[name], cell, losses)
            self._release()
        samples = interleave(
            problem, losses, self.clock, share, rounds=cell.rounds,
            evaluations=EVALUATIONS if cell.warm else 0, warmups=1 if cell.warm else 0,
        )  # fmt: skip
        for name, found in samples.items():
            rows[name] |= found.summary()
        entry["state"] = host.state(self.device)
        del problem, losses
        self._release()

    def _prepare(
        self,
        problem: Problem,
        implementation: Implementation,
        cell: schedule.Cell,
        losses: dict[str, Loss],
    ) -> dict[str, Any]:
        """Check, build and run once; adds the loss when it may be timed."""
        row: dict[str, Any] = {"status": results.NOT_REACHED}
        start = time.monotonic()
        reason, errors = self._verdict(implementation, problem)
        if reason:
            return {"status": reason}
        try:
            row["backend"] = implementation.backend(problem)
            loss = implementation.build(problem)
            if cell.warm:
                self.clock.step(problem, loss)
                row["first_call_s"] = round(time.monotonic() - start, 3)
        except Exception as error:  # a baseline's failure is a result, not an end of the run
            problem.clear()
            return {"status": outcome(error)}
        losses[implementation.name] = loss
        if errors is not None:
            row["errors"] = asdict(errors)
        return row

    def _verdict(
        self, implementation: Implementation, problem: Problem
    ) -> tuple[str, checking.Errors | None]:
        """Whether the implementation is right at a small size, tried once per width and data.

        Rows of one family differ in a block size only, and compiling costs seconds: one of them
        is checked.
        """
        if not implementation.checked:
            return "", None
        shape = problem.shape
        who = implementation.family or implementation.name
        key = (who, problem.name, shape.width, problem.data)
        if key not in self._verdicts:
            try:
                small, answer, eager16 = self._answer(problem)
                found = checking.errors(small, implementation.build(small), answer)
                self._verdicts[key] = checking.verdict(found, eager16), found
            except Exception as error:  # as in _prepare, and it would fail again in other cells
                self._verdicts[key] = outcome(error), None
            self._release()
        return self._verdicts[key]

    def _answer(self, problem: Problem) -> tuple[Problem, checking.Answer, checking.Errors]:
        shape = problem.shape
        key = (problem.name, shape.width, problem.data)
        if key not in self._answers:
            rows = min(CHECK_ROWS, shape.cols)
            # the dense float64 answer of the tokens is rows x rows x tokens
            rows = rows // 4 if problem.name.endswith("-full") else rows
            rows = rows // 4 if problem.name == "global_to_local" else rows
            small = problems.make(
                problem.name, square(max(rows, 2), shape.width, shape.tokens), self.device,
                data=problem.data, seed=1,
            )  # fmt: skip
            answer = checking.exact(small)
            eager16 = checking.Errors(0.0, 0.0)
            if problem.name not in NO_BASELINE:
                loss = self.implementations[EAGER[1]].build(small)
                eager16 = checking.errors(small, loss, answer)
            self._answers[key] = small, answer, eager16
        return self._answers[key]

    def _release(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def ceilings() -> dict[str, float]:
    """Rate of a dense bf16 product on random data and of a device copy, by events."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    product = _milliseconds(lambda: torch.mm(left, right, out=out))
    copy = _milliseconds(lambda: target.copy_(source))
    return {
        "gemm_flops": 2 * 8192**3 / (product / 1e3),
        "copy_bytes": 2 * source.numel() / (copy / 1e3),
    }


def _milliseconds(work: Callable[[], Any], runs: int = 20) -> float:
    times = []
    for turn in range(runs + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def outcome(error: Exception) -> str:
    """What the table says instead of a time."""
    if isinstance(error, Unavailable):
        return f"not measured: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "not measured: out of memory"
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {text[0][:160] if text else ''}"


def end_in_time(seconds: float) -> threading.Timer:
    """End the process when a device call hangs; everything measured so far is on disk."""

    def end() -> None:
        print("time is up inside a run; what was measured before is written", flush=True)
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def prepare_torch() -> None:
    """TF32 for float32 products, and compilation that never falls back to eager unseen."""
    torch.set_float32_matmul_precision("high")
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = 64
    dynamo.fail_on_recompile_limit_hit = True
    # the BLAS products win at these sizes; trying every Triton tile costs minutes
    inductor.max_autotune_gemm_backends = "ATEN"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPU benchmarks of dalr_kernels")
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all cells")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory for results")
    parser.add_argument("--resume", action="store_true", help="keep the rows measured before")
    parser.add_argument("--only", default="", help="cells whose key contains this text")
    parser.add_argument("--dry-run", action="store_true", help="tiny cells on the CPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu benchmarks skipped: torch sees no CUDA device")
        return 0
    budget = Budget(options.seconds)
    device = torch.device("cpu" if options.dry_run else "cuda")
    cells = schedule.dry_cells() if options.dry_run else schedule.gpu_cells()
    cells = [cell for cell in cells if options.only in cell.key]
    about = host.describe(device)
    name = "dry-run" if options.dry_run else host.slug(about["device"])
    path = options.out / f"{name}.json"
    settings = {"seconds": options.seconds, "check_rows": CHECK_ROWS, "dry_run": options.dry_run}
    document = results.new(about, cells, settings)
    if options.resume:
        document = results.resume(path, document)
    timer = end_in_time(options.seconds + GRACE)
    prepare_torch()
    run(device, path, document, cells, budget, implementations())
    timer.cancel()
    for goal in targets.check(document):
        print(f"{goal.verdict.strip('*')}: {goal.name}: {goal.value} (must {goal.must:g})")
    print(f"{path} and {path.with_suffix('.md')} are written")
    return 0


def run(
    device: torch.device, path: Path, document: dict[str, Any], cells: list[schedule.Cell],
    budget: Budget, implementations: Mapping[str, Implementation],
) -> None:  # fmt: skip
    """Measure the cells in order until the budget ends."""
    benchmark = Benchmark(device, path, document, budget, implementations)
    benchmark.machine()
    for cell, entry in zip(cells, document["cells"], strict=True):
        start = time.monotonic()
        benchmark.cell(cell, entry)
        benchmark.save()
        left = budget.remaining()
        print(f"{cell.key}: {time.monotonic() - start:.1f} s, {left:.0f} s left", flush=True)
    document["complete"] = not any(results.pending(entry) for entry in document["cells"])
    benchmark.save()


if __name__ == "__main__":
    sys.exit(main())
