"""Stopping on purpose: one flag, one agreed step; and the watchdog for everything else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_worlds import SoloWorld, ThreadWorld, run_ranks

from dalr_scale.training import stopping as preempt
from dalr_scale.training.stopping import (
    STOP_SIGNALS,
    StopFlag,
    StopReason,
    Watchdog,
)

WORLD = SoloWorld()


def test_no_reason_to_stop(tmp_path: Path) -> None:
    with StopFlag(tmp_path) as flag:
        assert flag.poll() is None
        assert flag.agree(WORLD) is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_only_sets_the_flag(tmp_path: Path, number: signal.Signals) -> None:
    with StopFlag(tmp_path) as flag:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the second changes nothing
        reason = flag.agree(WORLD)
    assert reason is not None
    assert reason.outcome == ("stopped" if number == signal.SIGINT else "preempted")
    assert reason.text


def test_handlers_are_given_back(tmp_path: Path) -> None:
    former = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopFlag(tmp_path):
        assert signal.getsignal(signal.SIGTERM) not in former
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == former


def test_control_without_the_flag_a_signal_kills() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGUSR1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", StopReason.STOP_FILE),
        ("requeue\n", StopReason.REQUEUE),
        ("please", StopReason.STOP_FILE),
    ],
)
def test_stop_file(tmp_path: Path, content: str, reason: StopReason) -> None:
    (tmp_path / "STOP").write_text(content)
    flag = StopFlag(tmp_path)
    assert flag.agree(WORLD) == reason
    assert reason.outcome == ("preempted" if reason == StopReason.REQUEUE else "stopped")


def test_stop_file_read_before_its_word_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `echo requeue > STOP` creates, then writes; read in between it looks like a stop request.
    path = tmp_path / "STOP"
    path.touch()
    monkeypatch.setattr(preempt.time, "sleep", lambda seconds: path.write_text("requeue\n"))
    assert StopFlag(tmp_path).poll() == StopReason.REQUEUE


def test_stop_file_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()
    assert StopFlag(tmp_path).poll() == StopReason.STOP_FILE


def test_stale_stop_file_is_removed_at_start(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    flag = StopFlag(tmp_path)
    flag.clear_stale(WORLD)
    assert flag.agree(WORLD) is None


@pytest.mark.parametrize(
    ("job", "restarts", "word", "kept"),
    [
        ("7", "1", "requeue 7 1\n", True),
        ("7", "2", "requeue 7 1\n", False),
        ("8", "1", "requeue 7 1\n", False),
        ("7", "1", "", False),
        ("", "", "requeue None 0\n", False),
    ],
)
def test_a_stop_request_for_this_very_start_stays(
    job: str, restarts: str, word: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job script's signal may come while torch is loading, before this is looked at."""
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    (tmp_path / "STOP").write_text(word)
    flag = StopFlag(tmp_path)
    flag.clear_stale(WORLD)
    assert flag.agree(WORLD) == (StopReason.REQUEUE if kept else None)


def test_time_limit(tmp_path: Path) -> None:
    now = [100.0]
    flag = StopFlag(tmp_path, limit_seconds=60, clock=lambda: now[0])
    now[0] = 159.9
    assert flag.agree(WORLD) is None
    now[0] = 160.0
    assert flag.agree(WORLD) == StopReason.TIME_LIMIT
    assert StopReason.TIME_LIMIT.outcome == "preempted"
    assert StopFlag(tmp_path, limit_seconds=0).poll() is None


def test_a_persons_stop_request_outranks_preemption(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    with StopFlag(tmp_path) as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.agree(WORLD) == StopReason.STOP_FILE


def test_all_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    def train(world: ThreadWorld) -> tuple[int, StopReason | None, StopReason | None]:
        flag = StopFlag(tmp_path)
        for step in range(1, 9):
            if world.rank == 1 and step == 5:
                flag._handle(signal.SIGTERM, None)
            alone = flag.poll()
            if reason := flag.agree(world):
                return step, reason, alone
        return 0, None, None

    results = run_ranks(3, train)
    assert [result[:2] for result in results] == [(5, StopReason.SIGNAL)] * 3
    # Control: a rank that asks only itself would have gone on.
    assert [result[2] for result in results] == [None, StopReason.SIGNAL, None]


def test_only_rank_0_reads_the_file_and_all_stop(tmp_path: Path) -> None:
    (tmp_path / "STOP").write_text("requeue")

    def agree(world: ThreadWorld) -> StopReason | None:
        return StopFlag(tmp_path if world.rank == 0 else tmp_path / "nowhere").agree(world)

    assert run_ranks(2, agree) == [StopReason.REQUEUE] * 2


# Watchdog


def watched(code: str) -> tuple[int, str, float]:
    head = "import re, time; from dalr_scale.training.stopping import Watchdog; dog = Watchdog()\n"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.parametrize(
    "hang",
    ["time.sleep(20)", "re.match('(a?){40}a{40}', 'a' * 40)"],
    ids=["sleep", "holds the GIL"],
)
def test_watchdog_ends_a_hang_and_shows_where(hang: str) -> None:
    code, err, seconds = watched(f"def stuck():\n    {hang}\ndog.arm(0.3, 'step')\nstuck()")
    assert code == 1
    assert "Timeout" in err and "in stuck" in err
    assert seconds < 10


def test_watchdog_is_rearmed_per_phase() -> None:
    work = "for _ in range(3):\n    dog.arm(1, 'step'); time.sleep(0.4)\n"
    save = "dog.arm(9, 'saving'); time.sleep(1.1)\ndog.disarm(); time.sleep(0.1)"
    assert watched(work + save)[0] == 0


def test_control_without_a_new_limit_the_slow_save_is_taken_for_a_hang() -> None:
    assert watched("dog.arm(0.4, 'step'); time.sleep(1)")[0] == 1


def test_watchdog_is_off_at_zero() -> None:
    assert watched("dog.arm(0.2, 'step'); dog.arm(0, 'step'); time.sleep(0.4)")[0] == 0


def test_watchdog_logs_each_limit_once(caplog: pytest.LogCaptureFixture) -> None:
    dog = Watchdog()
    with caplog.at_level("DEBUG", logger="dalr_scale"):
        for phase in ("data", "step", "data", "step", "saving"):
            dog.arm(0, phase)
    dog.disarm()
    assert [record.getMessage().split()[1] for record in caplog.records] == [
        "data",
        "step",
        "saving",
    ]
