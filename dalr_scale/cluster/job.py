r"""The job script's questions before and after training: may this job start, and start again?

    python -m dalr_scale.cluster.job begin --run-dir RUN
    python -m dalr_scale.cluster.job end --run-dir RUN --code 1 --asked no \
        --slurm "JobState=..." --lost ""

``begin`` records the start in RUN/jobs/JOBID.json and refuses a job whose restarts make no
progress. ``end`` prints on stderr how this start ended and which rank failed first, and on stdout
one word for the script: ``requeue``, ``leave``, or ``give-up`` for a job without progress. The
launcher hides how a run ended, so the run's status file decides; a record of another job, or of an
earlier start of this one, is ignored.

Standard library only: it runs beside the training processes.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dalr_scale.errors import UserError
from dalr_scale.process import run_command
from dalr_scale.run.failure import first_failure
from dalr_scale.run.files import JsonValue, read_json_table, write_json
from dalr_scale.run.status import Outcome, Status, job_identity, read_status, write_status

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_RESTARTS_WITHOUT_PROGRESS = 3
Verdict = Literal["requeue", "leave", "give-up"]
_Start = dict[str, JsonValue]  # an entry of RUN/jobs/JOBID.json
LAST_SECONDS = 3600.0  # a signal this near to the time limit is taken for its announcement


@dataclass(frozen=True)
class SlurmFacts:
    """Facts from Slurm and the job script.

    Attributes:
        asked: Slurm has sent its signal, and the script has requested the ranks to stop.
        cause: the reason of the signal.
        cancelled: the job is being ended, and not to be started again.
        requeued: Slurm has submitted the job again itself.
        out_of_time: Slurm ends the job because its time is over.
        lost: nodes of the job that no longer answer, joined by commas.
    """

    asked: bool = False
    cause: str = ""
    cancelled: bool = False
    requeued: bool = False
    out_of_time: bool = False
    lost: str = ""


def read_facts(text: str, asked: bool, lost: str) -> SlurmFacts:
    """Reads `scontrol show job`.

    While Slurm ends a job its state is COMPLETING for any reason: the other fields distinguish a
    requeued job (one more restart) and one whose time is over from a cancelled one.
    """
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    requeued = int(fields.get("Restarts") or 0) > _identity()[1]
    left = _seconds(fields.get("TimeLimit", "")) - _seconds(fields.get("RunTime", "0"))
    ending = fields.get("JobState", "RUNNING") not in ("RUNNING", "PENDING") and not requeued
    if fields.get("PreemptTime", "None") != "None":
        cause = "preempted by Slurm"
    else:
        cause = "time limit near" if left <= LAST_SECONDS else "signal to the job script"
    return SlurmFacts(
        asked=asked,
        cause=cause if asked else "",
        cancelled=ending and left > 0,
        requeued=requeued,
        out_of_time=ending and left <= 0,
        lost=lost,
    )


def _seconds(text: str) -> float:
    """Slurm's [DAYS-]HOURS:MINUTES:SECONDS; infinity for UNLIMITED and other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class _Options(argparse.Namespace):
    moment: Literal["begin", "end"]
    run_dir: Path
    code: int
    asked: Literal["yes", "no"]
    slurm: str
    lost: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``begin`` or ``end``."""
    parser = argparse.ArgumentParser(prog="python -m dalr_scale.cluster.job", allow_abbrev=False)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--code", type=int, default=0, help="exit status of srun")
    parser.add_argument("--asked", choices=("yes", "no"), default="no", help="whether USR1 came")
    parser.add_argument("--slurm", default="", help="output of `scontrol show job`")
    parser.add_argument("--lost", default="", help="nodes that no longer answer")
    args = parser.parse_args(argv, _Options())
    if args.moment == "begin":
        begin(args.run_dir)
        return 0
    print(end(args.run_dir, args.code, read_facts(args.slurm, args.asked == "yes", args.lost)))
    return 0


def begin(run_dir: Path) -> None:
    """Records this start of the job.

    Raises:
        UserError: if the first start and `MAX_RESTARTS_WITHOUT_PROGRESS` restarts made no progress.
    """
    starts = _read_starts(run_dir)
    step = newest_step(run_dir)
    if _is_stuck(starts, step):
        _write(run_dir, read_status(run_dir) or Status(), "failed", _no_progress(run_dir, step))
        raise UserError(_no_progress(run_dir, step))
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"restart_count": _identity()[1], "checkpoint_step": step, "time": now}
    path = _record_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"starts": [*starts, start]})


def end(run_dir: Path, code: int, slurm: SlurmFacts) -> Verdict:
    """Prints how this start ended; returns the verdict on the job.

    Args:
        code: exit status of srun.
    """
    status = read_status(run_dir) or Status()
    own = (status.get("job_id"), status.get("restart_count")) == _identity()
    outcome = str(status.get("outcome")) if own else "unknown"
    reason = str(status.get("reason") or "") if own else ""
    if outcome == "running":
        outcome, reason = "failed", "it ended without a report"
    if outcome == "preempted" and slurm.cause:
        reason = slurm.cause
        _write(run_dir, status, "preempted", reason)
    if slurm.cancelled and outcome != "finished":
        # for the ranks a cancelled job and a preempted one are the same signal
        outcome, reason = "stopped", "cancelled (scancel)"
        _write(run_dir, status, "stopped", reason)
    broken = outcome in ("failed", "unknown")
    wanted = slurm.asked or slurm.out_of_time or bool(slurm.lost)
    verdict: Verdict = "leave"
    if not slurm.requeued and (outcome == "preempted" or (broken and wanted)):
        verdict = "requeue"
    if slurm.lost and broken:
        outcome, reason = "failed", f"node {slurm.lost} no longer answers"
        _write(run_dir, status, "failed", reason)
    step = newest_step(run_dir)
    if verdict == "requeue" and _is_stuck(_read_starts(run_dir), step):
        verdict, outcome, reason = "give-up", "failed", _no_progress(run_dir, step)
        code = code or 1  # the script's: ranks that saved and left exit with 0
        _write(run_dir, status, "failed", reason)
    _print_outcome(run_dir, code, outcome, reason, slurm.lost)
    return verdict


def _print_outcome(run_dir: Path, code: int, outcome: str, reason: str, lost: str) -> None:
    lines = [f"outcome: {outcome}{f' ({reason})' if reason else ''}, exit status {code}"]
    if lost:
        lines.append(f"first failure: node {lost}: it no longer answers")
    elif code and outcome in ("failed", "unknown"):
        failure = first_failure(run_dir, *_identity())
        lines += [failure.line()] if failure else []
        lines += [f"doctor: {problem}" for problem in _doctor_problems(run_dir)]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _doctor_problems(run_dir: Path) -> list[str]:
    try:
        found = read_json_table(run_dir / "doctor.json")
        own = (found["job_id"], found["restart_count"]) == _identity()
        problems: JsonValue = found["problems"] if own else None
    except (OSError, ValueError, KeyError):
        return []
    return list(map(str, problems)) if isinstance(problems, list) else []


def _write(run_dir: Path, status: Status, outcome: Outcome, reason: str) -> None:
    if status.get("job_id") not in (None, _identity()[0]):
        return  # the record of another job, which may be running in the same directory
    try:
        write_status(run_dir, outcome, step=int(status.get("step") or 0), reason=reason)
    except OSError as error:
        print(f"status.json not written: {error}", file=sys.stderr)


def _no_progress(run_dir: Path, step: int) -> str:
    return (
        f"no progress over {MAX_RESTARTS_WITHOUT_PROGRESS} restarts: the newest checkpoint of "
        f"{run_dir} is still that of step {step}; see {run_dir}/log, then submit the job again"
    )


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one."""
    steps = [
        int(path.parent.name.removeprefix("step-"))
        for path in run_dir.glob("checkpoints/step-*/manifest.json")
        if path.parent.name.removeprefix("step-").isdigit()
    ]
    return max(steps, default=0)


def _is_stuck(starts: list[_Start], step: int) -> bool:
    """Whether the first start and all allowed restarts began at the step that the run has now."""
    count = 0
    for start in reversed(starts):
        if start.get("checkpoint_step") != step:
            break
        count += 1
    return count > MAX_RESTARTS_WITHOUT_PROGRESS


def _identity() -> tuple[str, int]:
    me = job_identity()
    return str(me["job_id"]), int(me["restart_count"])


def _record_path(run_dir: Path) -> Path:
    return run_dir / "jobs" / f"{os.environ.get('SLURM_JOB_ID', 'none')}.json"


def _read_starts(run_dir: Path) -> list[_Start]:
    try:
        starts = read_json_table(_record_path(run_dir))["starts"]
    except (OSError, ValueError, KeyError):
        return []
    entries = starts if isinstance(starts, list) else []
    return [start for start in entries if isinstance(start, dict)]


if __name__ == "__main__":
    raise SystemExit(run_command(main, None))
