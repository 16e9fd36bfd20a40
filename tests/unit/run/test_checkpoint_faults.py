"""Kills inside a save, full disks, failing ranks, and two jobs in one directory."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_worlds import (
    SoloWorld,
    ThreadWorld,
    flip_bit,
    run_ranks,
    save,
    state_at,
    write_files,
)

from dalr_scale.errors import UserError
from dalr_scale.run import checkpoint, files, lock, manifest
from dalr_scale.run.checkpoint import SaveError, SaveErrors, find_checkpoint
from dalr_scale.run.lock import lock_run_directory
from dalr_scale.run.manifest import MANIFEST, verify
from dalr_scale.run.state import RunState
from dalr_scale.run.status import read_status, start_status, write_status

ROOT = Path(__file__).parents[3]
WORLD = SoloWorld()


def python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter with the helpers at hand; it must not import torch (0.2 s a start)."""
    paths = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    head = "import sys; from pathlib import Path; from checkpoint_worlds import *\n"
    tail = "\nassert 'torch' not in sys.modules"
    return subprocess.Popen(
        [sys.executable, "-c", head + code + tail, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def newest(run: Path) -> int:
    found = find_checkpoint(run, WORLD)
    assert found is not None
    return found.step


# Kills

POINTS = {
    "before-tmp": 2,
    "mid-file": 2,
    "before-manifest": 2,
    "before-rename": 2,
    "before-prune": 3,
}


@pytest.mark.parametrize("point", POINTS)
def test_kill_inside_the_save(tmp_path: Path, point: str) -> None:
    code = "for step in (1, 2, 3): save(Path(sys.argv[1]), step, keep=2)"
    process = python(code, tmp_path, DALR_FAULT=f"save:{point}@3")
    assert outcome(process)[0] == -signal.SIGKILL
    assert newest(tmp_path) == POINTS[point]
    assert {"step-1", "step-2"} <= names(tmp_path)  # nothing deleted before the new one is safe
    assert (".tmp-step-3" in names(tmp_path)) == (point not in ("before-tmp", "before-prune"))
    save(tmp_path, 4, keep=2)
    assert newest(tmp_path) == 4
    assert names(tmp_path) == {f"step-{POINTS[point]}", "step-4"}


def test_control_without_the_staging_directory_a_half_save_is_the_newest(tmp_path: Path) -> None:
    code = "for step in (1, 2): save(Path(sys.argv[1]), step)"
    assert outcome(python(code, tmp_path, DALR_FAULT="save:mid-file@2"))[0] == -signal.SIGKILL
    root = tmp_path / "checkpoints"
    (root / ".tmp-step-2").rename(root / "step-2")  # what a save in place leaves behind
    assert max(path.name for path in root.iterdir()) == "step-2"  # what "newest by name" loads
    assert newest(tmp_path) == 1


def test_kill_at_any_moment(tmp_path: Path) -> None:
    draw = random.Random(11)
    code = """
found = checkpoint.find_checkpoint(run, SoloWorld())
first = found.step if found else 0
print("ready", flush=True)
for step in range(first + 1, first + 1000): save(run, step, keep=2)
"""
    head = "from dalr_scale.run import checkpoint; run = Path(sys.argv[1])\n"
    last = 0
    for _ in range(5):
        process = python(head + code, tmp_path)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.15, 0.4))
        process.kill()
        outcome(process)
        found = find_checkpoint(tmp_path, WORLD)
        assert found is not None and found.step >= last
        last = found.step
        content = (found.path / "weights.safetensors").read_bytes()
        assert content == last.to_bytes(4, "big") * 500
    assert last > 5


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kill leaves the page cache intact, so the order of the calls is what can be tested here.
    calls: list[str] = []

    def record(name: str, real: Any, path_of: Any) -> Any:
        def call(first: Any, *rest: Any) -> Any:
            calls.append(f"{name} {path_of(first)}")
            return real(first, *rest)

        return call

    by_descriptor = lambda number: os.readlink(f"/proc/self/fd/{number}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", record("sync", os.fsync, by_descriptor))
    monkeypatch.setattr(os, "rename", record("rename", os.rename, str))
    save(tmp_path, 1)
    root = tmp_path / "checkpoints"
    border = calls.index(f"rename {root / '.tmp-step-1'}")
    files = ["", MANIFEST, manifest.MANIFEST_SUM, "latest", "model", "model/shard0.bin"]
    wanted = {f"sync {root / '.tmp-step-1' / name}" for name in [*files, "weights.safetensors"]}
    assert wanted == set(calls[:border])
    assert f"sync {root}" in calls[border:]


# Failing writes


def test_disk_full_keeps_the_old_and_goes_on(tmp_path: Path) -> None:
    code = """
import resource
run, errors = Path(sys.argv[1]), SaveErrors()
save(run, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
print(save(run, 2, on_error=errors), errors.in_a_row)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(save(run, 3, on_error=errors).name, errors.in_a_row)
"""
    code, out, err = outcome(python(code, tmp_path))
    assert code == 0, err
    assert out.split() == ["None", "1", "step-3", "0"]
    assert "File too large" in err
    assert names(tmp_path) == {"step-1", "step-3"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_input_output_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path, 1)

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        assert save(tmp_path, 2) is None
    assert names(tmp_path) == {"step-1"} and newest(tmp_path) == 1


def failing(directory: Path) -> None:
    write_files(directory, 2)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_three_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    errors = SaveErrors()
    save(tmp_path, 1, on_error=errors)
    for step in (2, 3):
        assert save(tmp_path, step, write=failing, on_error=errors) is None
    with pytest.raises(SaveError, match=r"3 times in a row.*rank 0, write.*No space left"):
        save(tmp_path, 4, write=failing, on_error=errors)
    assert newest(tmp_path) == 1


def test_failures_with_successes_between_do_not(tmp_path: Path) -> None:
    errors = SaveErrors()
    for step in range(1, 7):
        write = failing if step % 3 else None
        save(tmp_path, step, on_error=errors, **({"write": write} if write else {}))
    assert errors.in_a_row == 0 and newest(tmp_path) == 6


def test_policy_stop_raises_at_once(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No space left"):
        save(tmp_path, 2, write=failing, on_error=SaveErrors("stop"))
    with pytest.raises(UserError, match="'continue' or 'stop'"):
        SaveErrors("ignore")


def test_a_save_that_reads_back_differently_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    real = checkpoint.write_manifest

    def damaging(directory: Path, content: manifest.Manifest) -> None:
        real(directory, content)
        flip_bit(directory / "latest", 5)

    monkeypatch.setattr(checkpoint, "write_manifest", damaging)
    assert save(tmp_path, 2) is None
    assert names(tmp_path) == {"step-1", "step-2.rejected-1"}


def test_a_link_among_the_written_files_fails_the_save(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "link").symlink_to("/etc/hostname")

    assert save(tmp_path, 1, write=write) is None


# Several ranks


def test_ranks_share_the_work_and_agree(tmp_path: Path) -> None:
    results = run_ranks(3, lambda world: save(tmp_path, 1, world))
    assert results == [tmp_path / "checkpoints" / "step-1"] * 3
    found = run_ranks(3, lambda world: find_checkpoint(tmp_path, world))
    assert [f.manifest.world_size for f in found] == [3, 3, 3]
    assert {e.path for e in found[2].manifest.files} >= {f"model/shard{r}.bin" for r in range(3)}


def test_every_rank_sees_damage_found_by_one(tmp_path: Path) -> None:
    run_ranks(3, lambda world: save(tmp_path, 1, world))
    directory = tmp_path / "checkpoints" / "step-1"
    for rank in range(3):
        flip_bit(directory / "model" / f"shard{rank}.bin", 9)
    results = run_ranks(3, lambda world: verify(directory, world)[1])
    assert len(results[0]) == 3 and results == [results[0]] * 3


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_one_failing_rank_fails_the_save_for_all(tmp_path: Path, broken: int) -> None:
    run_ranks(3, lambda world: save(tmp_path, 1, world))

    def save_two(world: ThreadWorld) -> Any:
        def write(directory: Path) -> None:
            write_files(directory, 2, world.rank)
            if world.rank == broken:
                raise OSError(errno.ENOSPC, "No space left on device")

        return save(tmp_path, 2, world, write=write, on_error=SaveErrors("stop"))

    errors = run_ranks(3, save_two)
    assert {type(error) for error in errors} == {SaveError}
    assert all(f"rank {broken}, write" in str(error) for error in errors)
    assert names(tmp_path) == {"step-1"}


def test_ranks_that_see_different_newest_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        run_ranks(2, lambda world, step=step: save(tmp_path, step, world))
    real = manifest.check_file

    def stale_view(directory: Path, entry: manifest.FileEntry) -> str | None:
        # Second by name, so it is rank 1 that checks this file; its view of the directory is old.
        hidden = directory.name == "step-2" and entry.path == "model/shard0.bin"
        return f"{entry.path}: No such file" if hidden else real(directory, entry)

    monkeypatch.setattr(manifest, "check_file", stale_view)
    found = run_ranks(2, lambda world: find_checkpoint(tmp_path, world))
    assert [f.step for f in found] == [1, 1]


# One job per run directory

HOLD = """
from dalr_scale.run.lock import lock_run_directory
lock = lock_run_directory(Path(sys.argv[1]), SoloWorld())
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


def holder(run: Path, code: str = HOLD, **environment: str) -> subprocess.Popen[str]:
    process = python(code, run, **environment)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_second_job_is_refused_by_name(tmp_path: Path) -> None:
    process = holder(tmp_path, SLURM_JOB_ID="4711")
    try:
        with pytest.raises(UserError, match=rf"process {process.pid}, job 4711"):
            lock_run_directory(tmp_path, WORLD)
        errors = run_ranks(3, lambda world: lock_run_directory(tmp_path, world))
        assert {type(error) for error in errors} == {UserError}
    finally:
        assert outcome(process)[0] == 0
    with lock_run_directory(tmp_path, WORLD):
        pass


def test_lock_of_a_killed_job_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = holder(tmp_path)
    process.kill()
    outcome(process)
    lock_run_directory(tmp_path, WORLD).release()
    assert "stale lock" in caplog.text and str(process.pid) in caplog.text


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    # Loader workers are forked and may outlive a killed rank by seconds; flock would stay held.
    fork = "import os, time\nif (pid := os.fork()) == 0: time.sleep(30)\nprint(pid, flush=True)"
    process = python(HOLD.replace('print("held", flush=True)', fork), tmp_path)
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[0])
    try:
        process.kill()
        process.wait()
        lock_run_directory(tmp_path, WORLD).release()
    finally:
        os.kill(child, signal.SIGKILL)
        outcome(process)


@pytest.mark.parametrize(
    ("owner", "me", "allowed"),
    [
        ('{"host": "elsewhere", "pid": 1, "job_id": "7"}', {}, False),
        ('{"host": "elsewhere", "pid": 1, "job_id": "7"}', {"SLURM_JOB_ID": "8"}, False),
        (
            '{"host": "elsewhere", "pid": 1, "job_id": "7", "restart_count": 0}',
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            True,
        ),
        ("not json", {}, True),
    ],
)
def test_locks_of_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, me: dict[str, str], allowed: bool
) -> None:
    (tmp_path / ".lock").write_text(owner)
    for name, value in me.items():
        monkeypatch.setenv(name, value)
    if allowed:
        lock_run_directory(tmp_path, WORLD).release()
    else:
        with pytest.raises(UserError, match="host elsewhere"):
            lock_run_directory(tmp_path, WORLD)


def test_without_kernel_locks_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_record_lock", lambda descriptor: None)
    process = holder(tmp_path)
    with pytest.raises(UserError, match="in use"):
        lock_run_directory(tmp_path, WORLD)
    process.kill()
    outcome(process)
    lock_run_directory(tmp_path, WORLD).release()


# Status


def test_status_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_status(tmp_path, "running", step=5, checkpoint="checkpoints/step-5")
    write_status(tmp_path, "preempted", step=6, reason="signal received")
    status = read_status(tmp_path)
    assert status is not None
    shown = {name: status[name] for name in ("outcome", "step", "checkpoint", "job_id", "reason")}
    assert shown == {
        "outcome": "preempted",
        "step": 6,
        "checkpoint": "checkpoints/step-5",
        "job_id": "4711",
        "reason": "signal received",
    }
    assert status["restart_count"] == 2
    with pytest.raises(ValueError, match="unknown outcome"):
        write_status(tmp_path, "done", step=6)  # type: ignore[arg-type]


def test_crash_loops_are_counted(tmp_path: Path) -> None:
    counts = []
    for _ in range(3):
        counts.append(start_status(tmp_path, 0))
        write_status(tmp_path, "failed", step=0, reason="boom")
    assert counts == [0, 1, 2]
    assert start_status(tmp_path, 10) == 0  # progress: a newer checkpoint
    write_status(tmp_path, "preempted", step=10)
    assert start_status(tmp_path, 10) == 0  # stopped in order


def test_status_is_unreadable_never_half(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text('{"outcome": "fini')
    assert read_status(tmp_path) is None
    assert start_status(tmp_path, 3) == 0


# The state


def test_state_survives_json() -> None:
    state = state_at(9, best_score=0.1 + 0.2, best_step=6)
    assert RunState.from_json(state.to_json()) == state


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"step": 1.0},
        {"step": True},
        {"global_batch": 0},
        {"best_score": float("nan")},
        {"schema": 2},
        {"tail_rule": None},
        {"streams": []},
        {"streams": {"text": {"epoch": 0}}},
        {"streams": {"text": {"epoch": 0, "batches_done": -1}}},
    ],
)
def test_states_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"run state: {next(iter(change))}"):
        RunState.from_json(state_at(1).to_json() | change)


def test_nobody_reads_a_status_without_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job script and people read the file at any moment, also while a start begins."""
    write_status(tmp_path, "preempted", step=4)
    seen = []
    monkeypatch.setattr(files, "write_durably", lambda _, data: seen.append(json.loads(data)))
    start_status(tmp_path, 4)
    assert [status["outcome"] for status in seen] == ["running"]
    assert seen[0]["last_stop"]["outcome"] == "preempted" and "job_id" in seen[0]


def test_the_status_tells_how_the_start_before_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    start_status(tmp_path, 0)
    assert read_status(tmp_path)["last_stop"] is None  # type: ignore[index]
    write_status(tmp_path, "preempted", step=5, reason="preempted by Slurm")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start_status(tmp_path, 5)
    write_status(tmp_path, "running", step=6)  # a checkpoint does not forget it
    status = read_status(tmp_path) or {}
    assert (status["restart_count"], status["last_stop"]["restart_count"]) == (1, 0)
    last = {key: status["last_stop"][key] for key in ("outcome", "step", "reason", "job_id")}
    assert last == {
        "outcome": "preempted",
        "step": 5,
        "reason": "preempted by Slurm",
        "job_id": "7",
    }
    start_status(tmp_path, 6)  # it was killed
    last = (read_status(tmp_path) or {})["last_stop"]
    assert (last["outcome"], last["restart_count"]) == ("failed", 1)
    assert "without a report" in last["reason"]
