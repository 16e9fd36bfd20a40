"""RUN/status.json: how the run ended.

The launcher's exit code does not show it: it is 1 whenever the launcher itself was signalled, even
if every rank saved. Trainer, job script, resume and user read the file.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from dalr_scale.run.files import read_json_table, write_json
from dalr_scale.run.state import is_count

if TYPE_CHECKING:
    from pathlib import Path

Outcome = Literal["running", "finished", "preempted", "stopped", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("running", "finished", "preempted", "stopped", "failed")


class JobIdentity(TypedDict):
    """Slurm's job id and restart count (None and 0 outside Slurm), host and process."""

    job_id: str | None
    restart_count: int
    host: str
    pid: int


class LastStop(TypedDict):
    """How an earlier start of the run ended."""

    outcome: str
    step: int | None
    reason: str | None
    time: str | None
    job_id: str | None
    restart_count: int | None


class _Progress(TypedDict, total=False):
    """Fields that a record takes over from the one before it."""

    checkpoint: str | None
    starts_without_progress: int
    started_at_step: int
    last_stop: LastStop | None


class Status(_Progress, total=False):
    """The content of status.json; a file of an earlier version may lack fields.

    `checkpoint` is the path of the newest valid checkpoint relative to the run directory,
    `starts_without_progress` counts the starts in a row that failed at `started_at_step`, and
    `last_stop` says how the start before this one ended (None on the first one).
    """

    outcome: str
    step: int
    reason: str
    time: str
    job_id: str | None
    restart_count: int
    host: str
    pid: int


def job_identity() -> JobIdentity:
    """The identity of this process."""
    return {
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def write_status(
    run_dir: Path,
    outcome: Outcome,
    *,
    step: int,
    checkpoint: str | None = None,
    reason: str = "",
) -> None:
    """Write RUN/status.json; call on rank 0 only.

    Args:
        checkpoint: path of the newest valid checkpoint relative to the run directory; None keeps
            the one that the file already names.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"unknown outcome {outcome!r}; it is one of {', '.join(OUTCOMES)}")
    before = read_status(run_dir) or Status()
    kept: _Progress = {
        "checkpoint": checkpoint or before.get("checkpoint"),
        "starts_without_progress": before.get("starts_without_progress", 0),
        "started_at_step": before.get("started_at_step", step),
        "last_stop": before.get("last_stop"),
    }
    _replace_status(run_dir, outcome, step, reason, kept)


def _replace_status(
    run_dir: Path, outcome: Outcome, step: int, reason: str, progress: _Progress
) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    status = {"outcome": outcome, "step": step, "reason": reason, "time": now}
    write_json(run_dir / "status.json", {**status, **progress, **job_identity()})


def read_status(run_dir: Path) -> Status | None:
    """The last status, or None when there is none or it cannot be read."""
    try:
        # written by this module; readers test the fields that they count with
        return cast("Status", read_json_table(run_dir / "status.json"))
    except (OSError, ValueError):
        return None


def start_status(run_dir: Path, step: int) -> int:
    """Mark the run as running from `step` and count starts without progress; rank 0 only.

    Returns:
        How many starts before this one began at the same step and failed without a newer
        checkpoint: 0 on a healthy run. A crash loop shows here; the caller decides when to give up.
    """
    before = read_status(run_dir) or Status()
    # "running" means that the process died without a report
    died = before.get("outcome") in ("running", "failed")
    stuck = died and before.get("started_at_step") == step
    count = before.get("starts_without_progress", 0)
    starts = (count if is_count(count) else 0) + 1 if stuck else 0
    fresh: _Progress = {
        "checkpoint": before.get("checkpoint"),
        "starts_without_progress": starts,
        "started_at_step": step,
        "last_stop": _last_stop(before),
    }
    _replace_status(run_dir, "running", step, "", fresh)
    return starts


def _last_stop(before: Status) -> LastStop | None:
    """How the start before this one ended, None on the first one."""
    if "outcome" not in before:
        return None
    stop: LastStop = {
        "outcome": before["outcome"],
        "step": before.get("step"),
        "reason": before.get("reason"),
        "time": before.get("time"),
        "job_id": before.get("job_id"),
        "restart_count": before.get("restart_count"),
    }
    if stop["outcome"] == "running":
        stop["outcome"] = "failed"
        stop["reason"] = "ended without a report: killed, or its node failed"
    return stop
