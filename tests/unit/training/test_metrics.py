"""What a run reports, read back."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from common import curves
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.summary.writer import event_file_writer

from dalr_scale.eval.unit import read_scores
from dalr_scale.training.metrics import Meter, RunLog, drop_later_records, format_table, logging_to


class Clock:
    """Advances only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_steps(run: Path, first: int, last: int, **options: Any) -> str:
    console = options.pop("console", None) or io.StringIO()
    clock = Clock()
    settings = {"rank": 0, "total_steps": 120, "every": 4, "tensorboard": False} | options
    with RunLog(run, console=console, clock=clock, **settings) as log:
        for step in range(first, last + 1):
            clock.now += 0.5
            values = {"loss": 3.0 / step, "con": 2.101, "xce": 3.9, "lr": 1e-4, "grad_norm": 0.91}
            log.step(step, values, samples=256, data_seconds=0.05, tags={"stream": "text"})
        if last % 4 == 0:
            log.scores(last, {"STS-B-dev": 0.72})
    return console.getvalue()


def test_meter_counts_samples_time_and_waiting() -> None:
    clock = Clock()
    meter = Meter(window=2, clock=clock)
    assert math.isnan(meter.samples_per_second)
    for seconds, value in ((100.0, 9.0), (1.0, 1.0), (3.0, 2.0)):
        clock.now += seconds
        meter.add({"loss": value}, samples=10, data_seconds=0.5)
    assert meter.means() == {"loss": 1.5}  # the first step has left the window
    assert meter.samples_per_second == 20 / 4
    assert meter.step_seconds == 2.0
    assert meter.data_share == 0.25


def test_meter_leaves_out_pauses() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    clock.now += 1
    with meter.paused():
        clock.now += 50
    clock.now += 1
    meter.add({}, samples=10)
    assert meter.samples_per_second == 5.0


def test_terms_of_only_some_steps_are_averaged_over_those() -> None:
    meter = Meter(clock=Clock())
    meter.add({"loss": 1.0}, samples=1)
    meter.add({"loss": 3.0, "xce": 7.0}, samples=1)
    assert meter.means() == {"loss": 2.0, "xce": 7.0}


def test_streams_are_averaged_apart() -> None:
    meter = Meter(clock=Clock())
    for loss, stream in ((1.0, "text"), (5.0, "pair"), (2.0, "text")):
        meter.add({"loss": loss}, samples=1, stream=stream)
    assert meter.streams == ["text", "pair"]
    assert (meter.means("text"), meter.means("pair")) == ({"loss": 1.5}, {"loss": 5.0})


def test_what_happens_before_the_first_batch_is_no_part_of_the_throughput(tmp_path: Path) -> None:
    clock = Clock()
    options = {"tensorboard": False, "clock": clock, "console": io.StringIO()}
    with RunLog(tmp_path, rank=0, total_steps=1, **options) as log:
        clock.now += 60  # evaluation, start of the loader's workers
        log.start_timing()
        clock.now += 1
        log.step(1, {"loss": 1.0}, samples=10, data_seconds=0.25)
    (record,) = records(tmp_path)
    assert (record["samples_per_second"], record["data_share"]) == (10.0, 0.25)


def test_console_line(tmp_path: Path) -> None:
    lines = log_steps(tmp_path, 1, 4).splitlines()
    assert lines == [
        "step      4/120  text loss 1.562  con 2.101  xce 3.9  |g| 0.91  lr 1.0e-04  "
        "512 samples/s  data 10.0 %  eta 00:58",
        "step      4/120  scores x 100  STS-B-dev 72",
    ]


def test_last_step_has_its_line(tmp_path: Path) -> None:
    assert log_steps(tmp_path, 1, 7, total_steps=7).count("\n") == 2


def test_no_bar_without_a_terminal_and_one_with(tmp_path: Path) -> None:
    assert "\r" not in log_steps(tmp_path / "a", 1, 8)
    text = log_steps(tmp_path / "b", 1, 8, console=Terminal())
    assert "\r" in text and "loss 1.562" in text


def test_records_hold_exact_numbers(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 4)
    train = [record for record in records(tmp_path) if record["kind"] == "train"]
    assert [record["loss"].hex() for record in train] == [(3.0 / n).hex() for n in range(1, 5)]
    assert train[0]["stream"] == "text" and train[0]["samples_per_second"] == 512.0
    assert records(tmp_path)[-1] == {"kind": "scores", "step": 4, "STS-B-dev": 72.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_become_null(tmp_path: Path, value: float) -> None:
    console = io.StringIO()
    with RunLog(
        tmp_path, rank=0, total_steps=2, every=1, tensorboard=False, console=console
    ) as log:
        log.step(1, {"loss": value, "grad_norm": value}, samples=4)
    assert records(tmp_path)[0]["loss"] is None
    assert f"loss {value}" in console.getvalue()


def test_resumed_run_holds_every_step_once(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # torn by a kill
    log_steps(tmp_path, 9, 12, start_step=8)
    train = [record["step"] for record in records(tmp_path) if record["kind"] == "train"]
    assert train == list(range(1, 13))
    scores = [record["step"] for record in records(tmp_path) if record["kind"] == "scores"]
    assert scores == [12]


def test_control_plain_append_repeats_steps(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 10)
    kept = (tmp_path / "metrics.jsonl").read_text()
    log_steps(tmp_path, 9, 12, start_step=8)
    (tmp_path / "metrics.jsonl").write_text(kept + (tmp_path / "metrics.jsonl").read_text())
    steps = [record["step"] for record in records(tmp_path) if record["kind"] == "train"]
    assert len(steps) > len(set(steps))


@given(lines=st.lists(st.binary(max_size=20) | st.integers(0, 9), max_size=12), step=st.integers(0))
def test_dropping_keeps_exactly_the_good_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes | int], step: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    good = [
        json.dumps({"step": n}).encode() + b"\n" if isinstance(n, int) else n + b"\n" for n in lines
    ]
    path.write_bytes(b"".join(good))
    drop_later_records(path, step)
    wanted = [n for n in lines if isinstance(n, int) and n <= step]
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == wanted


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    assert log_steps(tmp_path / "run", 1, 8, rank=1) == ""
    assert not (tmp_path / "run").exists()


@pytest.fixture
def first_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard numbers the writers of a process in their file names, and reads them by name.

    In one second the tenth file would therefore be read before the ninth.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def run_until(run: Path, last: int, start_step: int = 0, *, finished: bool = False) -> None:
    """Steps up to `last` of 4, text and paired in turn, as the trainer reports them."""
    options = {"rank": 0, "total_steps": 4, "console": io.StringIO(), "clock": Clock()}
    with RunLog(run, start_step=start_step, **options) as log:
        if start_step == 0:
            log.scores(0, {"dev": 0.1, "test": 0.125})
        for step in range(start_step + 1, last + 1):
            values = {"loss": 8.0 / step, "lr": 0.5, "grad_norm": 2.0}
            tags = {"stream": ("text", "pair")[step % 2], "ids": "0123456789abcdef"}
            log.step(step, values, samples=8, tags=tags)
            if step % 2 == 0:
                log.scores(step, {"dev": 0.2 * step})
        if finished:
            log.final_scores(4, {"dev": 0.8, "test": 0.75}, {"dev": 0.9, "test": 0.5}, 2)


FINISHED = {
    "train/text/loss": [(2, 4.0), (4, 2.0)],
    "train/pair/loss": [(1, 8.0), (3, pytest.approx(8 / 3))],
    "train/lr": [(n, 0.5) for n in range(1, 5)],
    "scores/dev": [(0, 10.0), (2, 40.0), (4, 80.0)],
    "scores/test": [(0, 12.5), (4, 75.0)],
    "best/dev": [(4, 90.0)],
    "best/test": [(4, 50.0)],
}


def test_curves_run_from_the_untrained_to_the_final_scores_by_stream(tmp_path: Path) -> None:
    run_until(tmp_path, 4, finished=True)
    found = curves(tmp_path)
    assert {tag: found[tag] for tag in FINISHED} == FINISHED
    assert not {"train/loss", "train/grad_norm"} & found.keys()
    kinds = [(record["kind"], record["step"]) for record in records(tmp_path)]
    assert kinds[-2:] == [("final", 4), ("best", 4)]
    assert records(tmp_path)[-1] == {
        "kind": "best", "step": 4, "model_step": 2, "dev": 90.0, "test": 50.0
    }  # fmt: skip


INTERRUPTIONS = {
    "before the first checkpoint": [(3, 0, False), (4, 0, True)],
    "in the middle": [(3, 0, False), (4, 2, True)],
    "before the final scores": [(4, 0, False), (4, 4, True)],
    "after the final scores, before the run was marked as finished": [(4, 0, True), (4, 4, True)],
    "all of them": [(2, 0, False), (3, 0, False), (4, 2, True), (4, 4, True), (4, 4, True)],
}


@pytest.mark.usefixtures("first_writers")
@pytest.mark.parametrize("attempts", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_interrupted_runs_report_what_an_uninterrupted_one_does(
    tmp_path: Path, attempts: list[tuple[int, int, bool]]
) -> None:
    run_until(tmp_path / "whole", 4, finished=True)
    for last, start_step, finished in attempts:
        run_until(tmp_path / "parts", last, start_step, finished=finished)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")


@pytest.mark.usefixtures("first_writers")
def test_control_a_log_that_only_appends_would_double_points(tmp_path: Path) -> None:
    run_until(tmp_path, 3)
    with mock.patch("torch.utils.tensorboard.SummaryWriter", unpurged):
        run_until(tmp_path, 4, finished=True)
    steps = [step for step, _ in curves(tmp_path)["scores/test"]]
    assert len(steps) > len(set(steps))


def unpurged(directory: Path, purge_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(directory)


def test_a_flush_leaves_nothing_to_lose(tmp_path: Path) -> None:
    """What a kill right after a checkpoint would find on the disk."""
    with RunLog(tmp_path, rank=0, total_steps=9, console=io.StringIO()) as log:
        log.step(1, {"loss": 3.0}, samples=8, tags={"stream": "text"})
        log.flush()
        assert curves(tmp_path)["train/text/loss"] == [(1, 3.0)]
        assert len(records(tmp_path)) == 1


def test_scores_without_a_unit_are_fractions_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"steps": 3, "trained": {"STS-B": 0.5}, "lexical": {"STS-B": 0.25}}))
    old = read_scores(path)
    assert (old["steps"], old["trained"], old["lexical"]) == (3, {"STS-B": 50}, {"STS-B": 25})
    path.write_text(json.dumps(old))
    assert read_scores(path) == old


# Tables and log files


def test_table() -> None:
    rows = [
        {"task": "STS-B", "dalr": 72.1234, "simcse": None},
        {"task": "SICK-R test", "dalr": 58.0, "n": 4927},
    ]
    assert format_table("Spearman", rows).splitlines() == [
        "Spearman",
        "---------------------------------",
        "task           dalr  simcse     n",
        "---------------------------------",
        "STS-B        72.123  -          -",
        "SICK-R test  58.000  -       4927",
        "---------------------------------",
    ]


@pytest.mark.parametrize("rows", [[], [{}]])
def test_empty_table(rows: list[dict[str, object]]) -> None:
    assert format_table("Nothing", rows).startswith("Nothing")


def test_log_file_of_each_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("dalr_scale.somewhere")
    for rank in (0, 1):
        with logging_to(tmp_path, rank) as path:
            logger.debug("detail")
            logger.warning("careful")
        assert path == tmp_path / "log" / f"rank{rank}.log"
        text = path.read_text()
        assert f"rank {rank} pid" in text and "detail" in text and "careful" in text
        shown = capsys.readouterr().err
        assert ("careful" in shown) == (rank == 0) and "detail" not in shown
    logger.warning("after the run")
    assert "after the run" not in (tmp_path / "log" / "rank0.log").read_text()
