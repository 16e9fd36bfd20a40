"""When the Slurm script submits its job again: only for this start's own word, or when asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train_8node.sh"


def run_script(folder: Path, srun: str, restarts: str | None) -> tuple[int, bool]:
    """Runs the script as job 77 with a stand-in for srun; returns (exit status, requeued)."""
    scontrol = f'[ "$1" = requeue ] && touch {folder}/requeued || echo host'
    for name, body in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "host",
        "RUN_DIR": str(folder / "run"),
        "VENV": str(folder),
    }
    if restarts is not None:
        variables["SLURM_RESTART_COUNT"] = restarts
    done = subprocess.run(["bash", str(SCRIPT)], env=variables, capture_output=True, timeout=60)
    return done.returncode, (folder / "requeued").exists()


def leave_status(folder: Path, outcome: str, job: str | None, restarts: int) -> None:
    (folder / "run").mkdir()
    status = {"outcome": outcome, "job_id": job, "restart_count": restarts}
    (folder / "run" / "status.json").write_text(json.dumps(status), encoding="utf-8")


@pytest.mark.parametrize("restarts", [None, "2"])
@pytest.mark.parametrize(
    ("outcome", "code", "again"),
    [("preempted", 0, True), ("finished", 0, False), ("stopped", 0, False), ("failed", 3, False)],
)
def test_the_own_status_decides(
    tmp_path: Path, restarts: str | None, outcome: str, code: int, again: bool
) -> None:
    leave_status(tmp_path, outcome, "77", int(restarts or 0))
    assert run_script(tmp_path, f"exit {code}", restarts) == (code, again)


@pytest.mark.parametrize(("job", "restarts"), [("76", 1), ("77", 0), (None, 0)])
def test_a_status_of_another_start_is_not_believed(
    tmp_path: Path, job: str | None, restarts: int
) -> None:
    """Else a job that cannot start would be requeued for ever."""
    leave_status(tmp_path, "preempted", job, restarts)
    assert run_script(tmp_path, "exit 3", "1") == (3, False)


def test_a_job_that_was_asked_is_requeued_without_a_word_of_the_run(tmp_path: Path) -> None:
    leave_status(tmp_path, "finished", "76", 0)
    assert run_script(tmp_path, "kill -USR1 $PPID; sleep 0.3; exit 1", None) == (0, True)
    assert (tmp_path / "run" / "STOP").read_text() == "requeue\n"


def test_without_a_status_the_exit_status_is_passed_on(tmp_path: Path) -> None:
    assert run_script(tmp_path, "exit 4", None) == (4, False)
