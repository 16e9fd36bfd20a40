"""Atomic, verified checkpoints.

A save becomes visible by one rename, after every byte of it has been written, hashed and synced,
and nothing old is deleted before the new one has been read back. A load accepts nothing that the
manifest does not list or whose SHA-256 differs: safetensors, torch.save files and ZeRO shards all
load a flipped bit silently.

The trainer passes the function that writes the tensors; neither torch nor DeepSpeed appears here.

    RUN/checkpoints/step-120/manifest.json      files of the checkpoint, and the run state
                             manifest.sha256    `sha256sum -c manifest.sha256` works
                             ...                the files that `write` created
    RUN/checkpoints/.tmp-step-240/              a save in progress, or interrupted; never read
    RUN/checkpoints/step-240.rejected-1/        renamed because a replay saved step 240 again
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, get_args

from dalr_scale.errors import UserError
from dalr_scale.run.files import JsonTable, JsonValue, fsync_directory
from dalr_scale.run.manifest import Manifest, hash_and_sync, list_files, verify, write_manifest
from dalr_scale.run.status import read_status, write_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from dalr_scale.run.ranks import Ranks
    from dalr_scale.run.state import RunState

log = logging.getLogger(__name__)
T = TypeVar("T")

_CANDIDATE = re.compile(r"step-(\d{1,15})(?:\.rejected-(\d{1,6}))?")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the older ones are untouched."""


SavePolicy = Literal["continue", "stop"]


@dataclass
class SaveErrors:
    """The effect of a failed save on the run, and how many failed in a row.

    Attributes:
        policy: "continue" trains on (until `limit` saves in a row failed), "stop" raises at once.
    """

    policy: SavePolicy = "continue"
    limit: int = 3
    in_a_row: int = 0

    def __post_init__(self) -> None:
        if self.policy not in get_args(SavePolicy):
            raise UserError(f"a failed save can 'continue' or 'stop', not {self.policy!r}")

    def failed(self, message: str) -> None:
        """Count one failure.

        Raises:
            SaveError: if the policy or the limit says so.
        """
        self.in_a_row += 1
        if self.policy == "stop":
            raise SaveError(message)
        if self.in_a_row >= self.limit:
            raise SaveError(f"save failed {self.in_a_row} times in a row; the last: {message}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> RunState:
        return self.manifest.state

    @property
    def fingerprint(self) -> JsonTable:
        return self.manifest.fingerprint


def maybe_fault(point: str, step: int | None = None) -> None:
    """Die here by SIGKILL if DALR_FAULT requests it ("save:before-rename", or "...@STEP")."""
    if _fault_wanted(point, step):
        os.kill(os.getpid(), signal.SIGKILL)


def _fault_wanted(point: str, step: int | None) -> bool:
    return os.environ.get("DALR_FAULT") in (point, f"{point}@{step}")


# Saving


def save_checkpoint(
    run_dir: Path,
    step: int,
    ranks: Ranks,
    write: Callable[[Path], None],
    state: RunState,
    *,
    fingerprint: JsonTable,
    keep: int,
    on_error: SaveErrors,
) -> Path | None:
    """Write one checkpoint; every rank calls this at the same step.

    Args:
        write: creates this rank's files in the directory it is given. Called on all ranks, because
            sharded states are written by collectives (a rank-0-only save hangs).
        fingerprint: what a resume must agree on, see `dalr_scale.training.fingerprint`.
        keep: valid checkpoints to keep, at least 2 in any case.
        on_error: one object for the whole run; it counts failures.

    Returns:
        The directory of the checkpoint, or None if the save failed and the run may go on. All ranks
        get the same answer and the older checkpoints are intact.

    Raises:
        SaveError: on all ranks, if `on_error` does not let the run go on.
    """
    started = time.monotonic()
    root = run_dir / "checkpoints"
    final = root / f"step-{step}"
    plain: JsonTable = json.loads(json.dumps(dict(fingerprint), allow_nan=False))
    if _is_saved_already(final, ranks, state, plain):
        return final
    try:
        _write_and_commit(root, step, ranks, write, state, plain)
    except _Agreed as failure:
        _clear_temporary(root, ranks)
        message = f"checkpoint at step {step} not saved: {failure}"
        log.error("%s", message)
        on_error.failed(message)
        return None
    on_error.in_a_row = 0
    log.info("checkpoint %s saved in %.1f s", final.name, time.monotonic() - started)
    _after_commit(run_dir, final, step, ranks, keep)
    return final


class _Agreed(Exception):
    """A failure that all ranks know of; the message names the ranks it happened on."""


def _together(ranks: Ranks, what: str, action: Callable[[], T], *, only_first: bool = False) -> T:
    """Run `action` here and raise on every rank if it failed on any."""
    value, error = None, None
    try:
        if ranks.rank == 0 or not only_first:
            value = action()
    except Exception as caught:  # of any kind: the other ranks must not wait for this one
        error = f"rank {ranks.rank}, {what}: {type(caught).__name__}: {caught}"
    if ranks.all_max(int(error is not None)):
        errors = ranks.gather_objects(error) or []
        raise _Agreed(ranks.broadcast_object("; ".join(filter(None, errors))))
    return cast("T", value)  # None only on ranks whose callers pass only_first and ignore it


def _write_and_commit(
    root: Path,
    step: int,
    ranks: Ranks,
    write: Callable[[Path], None],
    state: RunState,
    fingerprint: JsonTable,
) -> None:
    temporary, final = root / f".tmp-step-{step}", root / f"step-{step}"
    maybe_fault("save:before-tmp", step)
    _together(ranks, "directory", lambda: _fresh_directory(root, temporary), only_first=True)
    _together(ranks, "write", lambda: write(temporary))
    if _fault_wanted("save:mid-file", step):
        _die_mid_file(temporary)
    names = ranks.broadcast_object(
        _together(ranks, "list", lambda: list_files(temporary), only_first=True)
    )
    share = names[ranks.rank :: ranks.size]
    entries = _together(ranks, "hash", lambda: [hash_and_sync(temporary, n) for n in share])
    shares = ranks.gather_objects(entries) or []

    def commit() -> None:
        files = tuple(sorted((e for part in shares for e in part), key=lambda e: e.path))
        maybe_fault("save:before-manifest", step)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_manifest(temporary, Manifest(step, ranks.size, state, fingerprint, files, now))
        maybe_fault("save:before-rename", step)
        if os.path.lexists(final):
            _move_aside(final)
        temporary.rename(final)
        fsync_directory(root)

    _together(ranks, "commit", commit, only_first=True)
    _, problems = verify(final, ranks)
    if problems:
        _together(ranks, "rename", lambda: _move_aside(final), only_first=True)
        raise _Agreed("read back differently: " + "; ".join(problems))


def _after_commit(run_dir: Path, final: Path, step: int, ranks: Ranks, keep: int) -> None:
    # The checkpoint is safe by now: trouble here is reported and does not fail the save.
    if ranks.rank == 0:
        try:
            name = str(final.relative_to(run_dir))
            write_status(run_dir, "running", step=step, checkpoint=name)
        except OSError as error:
            log.error("status.json not written: %s", error)
    maybe_fault("save:before-prune", step)
    prune(run_dir, ranks, keep=keep, verified=final.name)


def _is_saved_already(final: Path, ranks: Ranks, state: RunState, fingerprint: JsonTable) -> bool:
    """True if this very checkpoint exists: a run stopped again right where it resumed."""
    if not ranks.broadcast_object(os.path.lexists(final)):
        return False
    manifest, problems = verify(final, ranks)
    return (
        manifest is not None
        and not problems
        and manifest.state.to_json() == state.to_json()
        and manifest.fingerprint == fingerprint
    )


def _fresh_directory(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".tmp*"):
        _remove(old)
    temporary.mkdir()


def _clear_temporary(root: Path, ranks: Ranks) -> None:
    if ranks.rank == 0:
        for old in root.glob(".tmp*"):
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _move_aside(directory: Path) -> None:
    # Renaming onto a directory that is not empty fails, so the name has to be freed first.
    number = 1
    while os.path.lexists(aside := directory.with_name(f"{directory.name}.rejected-{number}")):
        number += 1
    directory.rename(aside)
    log.warning("%s moved to %s", directory.name, aside.name)


def _die_mid_file(directory: Path) -> None:
    """End like a process killed in the middle of a write: half of the largest file is missing."""
    names = list_files(directory)
    if names:
        largest = max((directory / name for name in names), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


# Finding and pruning


def find_checkpoint(run_dir: Path, ranks: Ranks) -> Checkpoint | None:
    """Newest checkpoint that verifies; rank 0 chooses the order, all ranks check and agree.

    Returns:
        None if the run has none yet.

    Raises:
        UserError: if there are checkpoints and all are bad, or if there is none although the
            status file names one, or metrics without a status file show that the run has trained.
            Starting from scratch would throw the work away silently.
    """
    root = run_dir / "checkpoints"
    names = ranks.broadcast_object(_candidates(root) if ranks.rank == 0 else [])
    rejected: list[str] = []
    for name in names:
        manifest, problems = verify(root / name, ranks)
        if manifest is not None and not problems:
            if ranks.rank == 0:
                log.info("checkpoint %s verified, %d files", name, len(manifest.files))
            return Checkpoint(root / name, manifest)
        rejected.append(f"{name}: {'; '.join(problems)}")
        if ranks.rank == 0:
            log.warning("checkpoint rejected: %s", rejected[-1])
    if rejected:
        raise UserError(
            f"no checkpoint in {root} can be used; restore one from a copy, or give the work up "
            "with --run.from_scratch=true:\n  " + "\n  ".join(rejected)
        )
    status = ranks.broadcast_object(read_status(run_dir) if ranks.rank == 0 else None)
    if status and (lost := status.get("checkpoint")):
        raise UserError(
            f"{run_dir}/status.json names {lost}, but there is no checkpoint; "
            "restore it, or give the work up with --run.from_scratch=true"
        )
    if status is not None:
        return None
    steps = ranks.broadcast_object(_recorded_steps(run_dir) if ranks.rank == 0 else 0)
    if steps:
        raise UserError(
            f"{run_dir}/metrics.jsonl has {steps} steps, but checkpoints/ and status.json are "
            "gone; restore them, or move what is left aside with --run.from_scratch=true"
        )
    return None


def _recorded_steps(run_dir: Path) -> int:
    """The last training step in RUN/metrics.jsonl, 0 without."""
    steps = [0]
    try:
        for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                record: dict[str, JsonValue] = json.loads(line)
                step = record["step"] if record.get("kind") == "train" else 0
                steps.append(step if isinstance(step, int) else 0)
    except OSError:
        return 0
    return max(steps)


def _candidates(root: Path) -> list[str]:
    """Newest first; rejected ones come last and are read only if nothing else is left."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    found = [match for match in map(_CANDIDATE.fullmatch, names) if match]
    found.sort(key=lambda m: (m[2] is None, int(m[1]), int(m[2] or 0)), reverse=True)
    return [match[0] for match in found]


def prune(run_dir: Path, ranks: Ranks, *, keep: int, verified: str | None = None) -> None:
    """Delete checkpoints older than the `max(2, keep)` newest valid ones; all ranks call it.

    Bad checkpoints do not count, so that two usable ones stay after any damage of the disk.

    Args:
        verified: name of a checkpoint that has just been verified and need not be read again.
    """
    root = run_dir / "checkpoints"
    wanted = max(2, keep)
    names = ranks.broadcast_object(_candidates(root) if ranks.rank == 0 else [])
    plain = [name for name in names if "." not in name]
    if len(plain) <= wanted:
        return
    valid = 0
    for oldest_kept in plain:
        valid += oldest_kept == verified or not verify(root / oldest_kept, ranks)[1]
        if valid == wanted:
            break
    else:
        return
    if ranks.rank == 0:
        _delete_older(root, names, _step_of(oldest_kept))
    ranks.barrier()


def _delete_older(root: Path, names: list[str], step: int) -> None:
    for name in names:
        if _step_of(name) < step:
            try:
                # A half deleted checkpoint must not look like one that went bad.
                doomed = root / f".tmp-delete-{name}"
                (root / name).rename(doomed)
                _remove(doomed)
            except OSError as error:
                log.error("old checkpoint %s not deleted: %s", name, error)


def _step_of(name: str) -> int:
    match = _CANDIDATE.fullmatch(name)
    assert match, name
    return int(match[1])
