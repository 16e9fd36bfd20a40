"""The benchmark harness: time budget, results file, table, goals, and a whole dry run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import cpu, host, plots, results, run, schedule, table, targets, tune
from bench.peers import CHUNKS, EAGER, OURS, PRODUCTS, Unavailable, implementations
from bench.problems import PROBLEMS, Problem, Shape, operations, square
from bench.schedule import Cell
from bench.timing import Budget, HostClock, Samples, interleave, quantiles
from torch import Tensor

HOST = {
    "device": "Some GPU",
    "memory_bytes": 150_000_000_000,
    "packages": {"torch": "2.11.0", "inf-cl": None},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
    "cuda": "13.0",
    "driver_version": "580",
    "python": "3.12.3",
}


class FakeTime:
    """A clock and implementations that cost what they are told to."""

    peak_bytes = 7

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, problem: Any, loss: Any) -> dict[str, float]:
        seconds = loss()
        self.now += seconds
        return {"forward": 400 * seconds, "backward": 600 * seconds, "both": 1000 * seconds}

    def evaluation(self, problem: Any, loss: Any) -> dict[str, float]:
        self.now += loss() / 4
        return {"evaluation": 250 * loss()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr("bench.timing.time.monotonic", fake)
    return fake


def costs(**seconds: float) -> dict[str, Any]:
    return {name: (lambda value=value: value) for name, value in seconds.items()}


NO_PROBLEM: Any = None


# Budget and rounds


def test_budget(clock: FakeTime) -> None:
    budget = Budget(10, clock)
    clock.now = 4
    assert budget.remaining() == 6 and budget.allows(6) and not budget.allows(6.1)
    share = budget.share(100)
    assert share.remaining() == 6
    clock.now = 50
    assert budget.remaining() == share.remaining() == 0


def test_all_rounds_when_there_is_time(clock: FakeTime) -> None:
    found = interleave(
        NO_PROBLEM, costs(a=0.1, b=0.2), clock, Budget(1000, clock), rounds=30, evaluations=10,
        warmups=1,
    )  # fmt: skip
    for name, cost in (("a", 100.0), ("b", 200.0)):
        assert len(found[name].runs["both"]) == 30
        assert len(found[name].runs["evaluation"]) == 10
        summary = found[name].summary()
        assert summary["milliseconds"]["both"]["median"] == pytest.approx(cost)
        assert summary["peak_bytes"] == 7 and summary["status"] == "measured"


def test_a_slow_implementation_does_not_take_the_rounds_of_the_others(clock: FakeTime) -> None:
    budget = Budget(20, clock)
    found = interleave(NO_PROBLEM, costs(fast=0.1, slow=5.0), clock, budget, rounds=30)
    assert len(found["fast"].runs["both"]) == 30
    assert len(found["slow"].runs["both"]) == 2
    assert clock.now <= 20


@pytest.mark.parametrize("seconds", [0.0, 0.5, 3.0, 12.0])
def test_everybody_runs_once_and_the_budget_is_overrun_by_one_round_at_most(
    clock: FakeTime, seconds: float
) -> None:
    losses = costs(a=1.0, b=1.0, c=1.0)
    found = interleave(NO_PROBLEM, losses, clock, Budget(seconds, clock), rounds=30)
    assert all(sample.runs["both"] for sample in found.values())
    assert clock.now <= max(seconds, 3.0) + 1.0


def test_out_of_memory_in_a_round_is_a_reason(clock: FakeTime) -> None:
    def full() -> float:
        raise torch.OutOfMemoryError("no")

    class Leaves:
        def clear(self) -> None:
            pass

    problem: Any = Leaves()
    losses: dict[str, Any] = {**costs(fine=0.1), "full": full}
    found = interleave(problem, losses, clock, Budget(100, clock), rounds=3)
    assert found["full"].summary() == {"status": "not measured: out of memory"}
    assert found["fine"].summary()["runs"] == 3


def test_quantiles() -> None:
    found = quantiles([float(value) for value in range(11)])
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert quantiles([4.0]) == {"median": 4.0, "p10": 4.0, "p90": 4.0}


# The schedule


def test_the_schedule_names_known_problems_and_implementations() -> None:
    known = implementations()
    cells = schedule.gpu_cells()
    assert len({cell.key for cell in cells}) == len(cells) - len(big_cells(cells))
    for cell in cells:
        assert cell.problem in PROBLEMS
        for name in cell.implementations:
            assert cell.problem in known[name].problems, (cell.key, name)
            assert cell.warm or len(cell.implementations) == 1  # its peak memory is its own


def big_cells(cells: list[Cell]) -> list[Cell]:
    """Second modes of a size that is measured in two cells."""
    return [cell for cell in cells if not cell.warm and cell.implementations == OURS[1:2]]


def test_the_plan_covers_what_the_issue_asks() -> None:
    cells = schedule.gpu_cells()
    assert {cell.shape.width for cell in cells} >= {256, 768, 1024}
    assert max(cell.shape.rows for cell in cells) >= 2**20
    assert {cell.data for cell in cells} == {"random", "clustered"}
    assert any(cell.shape.rows != cell.shape.cols for cell in cells)
    headline = cells[0]
    assert headline.rounds >= 30 and set(CHUNKS.values()) < set(headline.implementations)


# Results


def small_results() -> dict[str, Any]:
    cells = [
        Cell("triple", square(32768, 768), (OURS[0], EAGER[0], CHUNKS[512]), 30, 9),
        Cell("triple", square(65536, 768), (OURS[1], EAGER[0]), 30, 9),
        Cell("info_nce", square(32768, 768), (OURS[0], "inf-cl", "memeff"), 30, 9),
    ]
    return results.new(HOST, cells, {})


def measured(milliseconds: float, peak: int = 0) -> dict[str, Any]:
    samples = Samples(peak_bytes=peak)
    samples.add(forward=milliseconds / 2, backward=milliseconds / 2, both=milliseconds)
    return samples.summary() | {"errors": {"loss": 1e-4, "gradient": 1e-3}}


def test_every_planned_row_is_named_before_anything_ran() -> None:
    text = table.render(small_results())
    for name in (OURS[0], EAGER[0], CHUNKS[512], "inf-cl", "memeff"):
        assert f"- {name}: {results.NOT_REACHED}" in text
    assert "The run ended before every cell was reached." in text
    assert "reached |" not in text.replace("not measured |", "")


def test_goals_reached_and_missed() -> None:
    document = small_results()
    document["machine"] = {"gemm_flops": 790e12, "copy_bytes": 4.3e12}
    triple, large, plain = (cell["contestants"] for cell in document["cells"])
    triple[OURS[0]] = measured(14.0)
    triple[EAGER[0]] = measured(150.0)
    triple[CHUNKS[512]] = measured(15.0)
    plain[OURS[0]] = measured(10.0)
    plain["inf-cl"] = measured(120.0)
    plain["memeff"] = {"status": "not measured: memeff is not installed"}
    large[OURS[1]] = measured(60.0, peak=900_000_000)
    large[EAGER[0]] = {"status": "not measured: out of memory"}
    goals = {goal.name: goal for goal in targets.check(document)}
    rate = next(goal for name, goal in goals.items() if "d = 768: share" in name)
    assert rate.value == pytest.approx(59.6, abs=0.1) and rate.verdict == "reached"
    verdicts = {name: goal.verdict for name, goal in goals.items()}
    start = "three losses, d = 768: faster than"
    assert verdicts[f"{start} row-chunked torch.compile, its best chunk"] == "**missed**"
    assert verdicts[f"{start} torch eager, its faster precision"] == "reached"
    assert verdicts["plain InfoNCE, d = 768: faster than inf-cl"] == "stretch reached"
    assert verdicts["plain InfoNCE, d = 768: faster than memeff"] == "not measured"
    memory = next(goal for name, goal in goals.items() if "memory of eager" in name)
    assert memory.value == pytest.approx(150 / 0.9) and "at least" in memory.note
    text = table.render(document)
    assert "**missed**" in text and "memeff is not installed" in text


def test_predictions_stand_apart_and_an_impossible_time_is_flagged() -> None:
    document = small_results()
    rows = document["cells"][0]["contestants"]
    rows[OURS[0]], rows[EAGER[0]] = measured(2.0), measured(200.0)
    text = table.render(document)
    ours = next(line for line in text.splitlines() if line.startswith(f"| {OURS[0]} |"))
    eager = next(line for line in text.splitlines() if line.startswith(f"| {EAGER[0]} |"))
    column = table.HEADER.index("predicted floor, ms")
    assert float(ours.split("|")[1:-1][column]) == pytest.approx(8.35, rel=0.01)
    assert eager.split("|")[1:-1][column].strip() == ""
    assert "faster than its floor" in ours and "faster than its floor" not in eager


def test_a_run_is_taken_up_again_only_by_the_same_code(tmp_path: Path) -> None:
    path, first = tmp_path / "gpu.json", small_results()
    first["machine"] = {"gemm_flops": 1.0}
    first["cells"][0]["contestants"][OURS[0]] = measured(3.0)
    results.write(path, first)
    again = results.resume(path, small_results())
    assert again["cells"][0]["contestants"][OURS[0]]["status"] == "measured"
    assert results.pending(again["cells"][0]) == [EAGER[0], CHUNKS[512]]
    other = small_results()
    other["host"] = HOST | {"commit": "def"}
    assert results.resume(path, other)["cells"][0]["contestants"][OURS[0]] == {
        "status": results.NOT_REACHED
    }
    assert results.resume(tmp_path / "none.json", small_results()) == small_results()


def test_a_broken_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    results.write(path, {"cells": 1})

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("bench.results.Path.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        results.write(path, {"cells": 2})
    assert results.read(path) == {"cells": 1}


@pytest.mark.parametrize(
    ("problem", "formula"),
    [("info_nce", "6u"), ("triple", "8u"), ("global_to_local", "4uL"), ("dalr", "R N")],
)
def test_flop_formula_is_printed(problem: str, formula: str) -> None:
    count, text = operations(problem, square(1024, 768))
    assert formula in text and count > 0


# Whole runs


def test_dry_run_from_end_to_end(tmp_path: Path) -> None:
    assert run.main(["--dry-run", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "dry-run.json").read_text(encoding="utf-8"))
    rows = [row for cell in document["cells"] for row in cell["contestants"].values()]
    assert document["complete"]
    assert not [row["status"] for row in rows if re.match("failed|wrong", row["status"])]
    assert sum(row["status"] == "measured" for row in rows) >= 15
    first = document["cells"][0]["contestants"]
    assert first[OURS[0]]["status"] == "not measured: needs a GPU"
    assert first[PRODUCTS]["status"] == "measured" and "errors" not in first[PRODUCTS]
    text = (tmp_path / "dry-run.md").read_text(encoding="utf-8")
    assert all(name in text for name in first)


def test_no_time_at_all_still_writes_every_row(tmp_path: Path) -> None:
    assert run.main(["--dry-run", "--out", str(tmp_path), "--seconds", "0"]) == 0
    document = results.read(tmp_path / "dry-run.json")
    rows = [row for cell in document["cells"] for row in cell["contestants"].values()]
    assert {row["status"] for row in rows} == {results.NOT_REACHED}
    assert not document["complete"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_no_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "gpu benchmarks skipped: torch sees no CUDA device\n"
    assert not list(tmp_path.iterdir())


def test_a_failing_implementation_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    rows = implementations()

    def broken(problem: Problem) -> Any:
        def loss() -> Tensor:
            raise RuntimeError("misaligned address\nsecond line")

        return loss

    def wrong(problem: Problem) -> Any:
        right = rows[EAGER[0]].build(problem)
        return lambda: 2 * right()

    def absent(problem: Problem) -> Any:
        raise Unavailable("no licence")

    for name, build in (("broken", broken), ("wrong", wrong), ("absent", absent)):
        rows[name] = type(rows[EAGER[0]])(name, ("triple",), build)
    names = ("broken", "wrong", "absent", EAGER[0])
    cells = [Cell("triple", Shape(16, 16, 8), names, 2, 10)]
    document = results.new(HOST, cells, {})
    run.run(torch.device("cpu"), tmp_path / "x.json", document, cells, Budget(60), rows)
    found = {name: row["status"] for name, row in document["cells"][0]["contestants"].items()}
    assert found["broken"] == "failed: RuntimeError: misaligned address"
    assert found["wrong"].startswith("wrong: loss off by")
    assert found["absent"] == "not measured: no licence"
    assert found[EAGER[0]] == "measured"
    assert "milliseconds" not in document["cells"][0]["contestants"]["wrong"]


# The make targets


def commands(target: str, *arguments: str) -> str:
    """What make would run, with an environment that does not exist."""
    done = subprocess.run(
        ["make", "-n", target, "VENV=/nonexistent/venv", *arguments],
        cwd=host.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("target", ["gpu", "gpu-test"])
def test_a_named_interpreter_runs_as_it_is(target: str) -> None:
    """A GPU host without a network: nothing is fetched, no environment is made."""
    offline = commands(target, "PYTHON=python3")
    assert "python3 " in offline and "pip" not in offline and "venv" not in offline
    assert "pip install" in commands(target)  # the control: the usual environment comes first


# The host and the CPU benchmark


def test_names_of_results_files() -> None:
    assert host.slug("NVIDIA H200") == "nvidia-h200"
    assert host.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    about = host.describe(torch.device("cpu"))
    assert about["packages"]["torch"] == torch.__version__.split("+")[0]


def cpu_document(time: float, peak: int) -> dict[str, Any]:
    rows = {
        cpu.OURS: measured(1000.0, 100),
        cpu.DENSE[0]: measured(time, peak),
        cpu.DENSE[1]: {"status": "not measured: needs about 30 GB"},
    }
    cell = {"problem": "triple", "size": 8192, "width": 256, "contestants": rows}
    return {"host": HOST, "cells": [cell]}


def test_cpu_goals() -> None:
    good = [row[-1] for row in cpu.goals(cpu_document(2500.0, 2400))[1:]]
    assert good == ["reached", "not measured", "reached", "not measured", "reached"]
    bad = cpu.goals(cpu_document(900.0, 1000))
    assert [row[-1] for row in bad[1:]].count("**missed**") == 3
    text = cpu.render(cpu_document(2500.0, 2400))
    assert "needs about 30 GB" in text and "2.50x, 24.0x" in text


def test_cpu_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ask", lambda **request: cpu.child(request))
    entry = cpu.cell("triple", 256, 16, 2, {})
    for name, row in entry["contestants"].items():
        assert row["status"] == "measured" and row["runs"] == 2, (name, row)
    too_large = cpu.cell("triple", 64, 16, 1, dict.fromkeys(cpu.DENSE, 1e15))
    assert "needs about" in too_large["contestants"][EAGER[0]]["status"]
    assert too_large["contestants"][cpu.OURS]["status"] == "measured"


def test_cpu_memory_in_a_process_of_its_own() -> None:
    """Dense matrices of 1024 x 1024 show in the resident set of the process that made them."""
    request = {"what": "memory", "problem": "info_nce", "size": 1024, "width": 16}
    found = cpu.ask(implementations=[EAGER[0]], **request)
    assert found[EAGER[0]]["peak_bytes"] > 2 * 4 * 1024**2


def test_a_cpu_process_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "executable", "false")
    found = cpu.ask(what="memory", implementations=["a"])
    assert found["a"]["status"] == "failed: ended with 1 (out of memory?)"


def test_plots_need_no_display(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    path = tmp_path / "plot.png"
    panel = plots.Panel("title", "seconds", {"a": [(1024.0, 1.0), (2048.0, 4.0)]})
    plots.save(path, [panel, panel], "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_host_clock_times_both_phases() -> None:
    problem = run.problems.make("info_nce", square(8, 4), torch.device("cpu"))
    took = HostClock().step(problem, implementations()[EAGER[0]].build(problem))
    assert took["both"] == pytest.approx(took["forward"] + took["backward"])


def test_sweep_covers_every_block_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tune.sweep()
    for cell in tune.cells(rows):
        assert set(cell.implementations) < set(rows) and EAGER[1] not in cell.implementations
        assert len(cell.implementations) == 3 * len(tune.ROWS)
    if not torch.cuda.is_available():
        assert tune.main(["--out", str(tmp_path)]) == 0
        assert "sweep skipped" in capsys.readouterr().out
