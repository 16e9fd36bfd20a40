"""Which rank failed first, from what the ranks and their launchers left behind."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dalr_scale.errors import UserError
from dalr_scale.run.failure import first_failure, record_failure

ROOT_CAUSE = """\
============================================================
dalr_scale.train FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : {time}
  host      : some.host
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 4242)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4242
============================================================
"""
ECHO = "[/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (tmp_path / "log").mkdir()
    return tmp_path


def launcher(run: Path, node: int, rank: int, code: int, restart: int = 0, late: int = 0) -> None:
    now = time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(time.time() + late))
    with open(run / "log" / f"node{node}.log", "a", encoding="utf-8") as file:
        file.write(f"=== job 7 restart {restart} node n{node + 1} 2026-01-01T00:00:00+0000\n")
        file.write(ROOT_CAUSE.format(time=now, rank=rank, code=code))


def test_nothing_failed(run: Path) -> None:
    assert first_failure(run, "7", 0) is None


def test_an_error_comes_before_its_echoes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the peers' clocks are ahead and they noticed at once."""
    for rank in (0, 1, 3):
        monkeypatch.setenv("SLURMD_NODENAME", f"n{rank + 1}")
        record_failure(run, rank, RuntimeError(ECHO))
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    record_failure(run, 2, ValueError("row 7 is not finite\nand more"))
    found = first_failure(run, "7", 0)
    assert found is not None
    assert found.line() == "first failure: node n3, rank 2: ValueError: row 7 is not finite"


def test_a_killed_rank_is_found_in_its_launchers_words(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    record_failure(run, 0, RuntimeError(ECHO))
    launcher(run, node=0, rank=0, code=1)
    launcher(run, node=5, rank=5, code=-9, late=2)
    launcher(run, node=6, rank=6, code=-15)  # ended by its launcher
    found = first_failure(run, "7", 0)
    assert found is not None
    assert found.line() == "first failure: node n6, rank 5: killed by SIGKILL"


def test_a_refusal_is_told_in_its_own_words(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    record_failure(run, 0, UserError("the socket closed is a word in a user's message"))
    found = first_failure(run, "7", 0)
    assert found is not None and not found.echo and found.what.startswith("the socket closed")


def test_other_starts_and_damage_do_not_count(run: Path) -> None:
    record_failure(run, 0, ValueError("of restart 0"))
    launcher(run, node=1, rank=1, code=-11, late=2)
    assert first_failure(run, "7", 1) is None
    assert first_failure(run, "8", 0) is None
    (run / "log" / "rank3.failure.json").write_text("{")
    (run / "log" / "rank4.failure.json").write_text(json.dumps([1]))
    found = first_failure(run, "7", 0)
    assert found is not None and found.what == "ValueError: of restart 0"
    launcher(run, node=1, rank=1, code=-11, restart=1)
    again = first_failure(run, "7", 1)
    assert again is not None and again.what == "killed by SIGSEGV"


def test_a_directory_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    record_failure(tmp_path / "none", 0, ValueError("x"))
