"""What a run knows about itself: its position, its outcome and who is writing into its folder.

Three small things share this file because the same four readers need them (trainer, job script,
resume, user): `RunState` travels inside every checkpoint, `RUN/status.json` says how the run ended
(the launcher's exit code cannot: it is 1 whenever the launcher itself was signalled, even if every
rank saved), and the lock on the run folder keeps two jobs from writing into one folder.

Nothing here imports torch, so that tests and tools start in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from dalr_scale.errors import UserError

logger = logging.getLogger(__name__)

STATE_SCHEMA = 1
Outcome = Literal["running", "finished", "preempted", "stopped", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("running", "finished", "preempted", "stopped", "failed")


class World(Protocol):
    """The few collectives that saving and stopping need; all ranks call them in one order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def barrier(self) -> None: ...

    def all_max(self, value: int) -> int: ...

    def gather_objects(self, obj: Any) -> list[Any] | None:
        """All ranks' objects in rank order on rank 0, None elsewhere."""
        ...

    def broadcast_object(self, obj: Any, src: int = 0) -> Any: ...


@dataclass(frozen=True)
class StreamState:
    """Position in one data stream, counted in full global batches."""

    epoch: int
    batches_done: int


@dataclass(frozen=True)
class RunState:
    """Everything besides tensors that a resumed run must agree on; stored in the checkpoint.

    The order of the data is a pure function of seed and step, so the stream counters follow from
    `step`; they are stored to be checked, not to be trusted. The number of ranks is not part of it.

    Attributes:
        order_version: version of the order function; another version is another order.
        step: optimizer steps done (applied or deliberately skipped).
        streams: stream name to position.
        global_batch: items of a global batch, over all ranks.
        tail_rule: what happens to the incomplete last batch of a pass.
        dataset_fingerprint: identity of the shards.
        best_score: best dev score so far, None before the first evaluation.
        bad_items: stream name to the numbers of items that could not be used.
    """

    order_version: int
    seed: int
    step: int
    streams: Mapping[str, StreamState]
    global_batch: int
    tail_rule: str
    dataset_fingerprint: str
    best_score: float | None = None
    best_step: int | None = None
    bad_items: Mapping[str, Sequence[int]] = field(default_factory=dict)
    schema: int = STATE_SCHEMA

    def __post_init__(self) -> None:
        for name in ("schema", "order_version", "seed", "step", "global_batch"):
            _require(_is_count(getattr(self, name)), name, "an integer >= 0", getattr(self, name))
        _require(self.schema == STATE_SCHEMA, "schema", str(STATE_SCHEMA), self.schema)
        _require(self.global_batch >= 1, "global_batch", ">= 1", self.global_batch)
        for name in ("tail_rule", "dataset_fingerprint"):
            _require(isinstance(getattr(self, name), str), name, "text", getattr(self, name))
        _require(isinstance(self.streams, Mapping), "streams", "a table", self.streams)
        for name, stream in self.streams.items():
            good = _is_count(stream.epoch) and _is_count(stream.batches_done)
            _require(good, f"streams.{name}", "two integers >= 0", stream)
        best = self.best_score
        good = best is None or (isinstance(best, int | float) and math.isfinite(best))
        _require(good, "best_score", "a finite number or null", best)
        good = self.best_step is None or _is_count(self.best_step)
        _require(good, "best_step", "an integer >= 0 or null", self.best_step)
        _require(isinstance(self.bad_items, Mapping), "bad_items", "a table", self.bad_items)
        for name, numbers in self.bad_items.items():
            good = isinstance(numbers, list | tuple) and all(map(_is_count, numbers))
            _require(good, f"bad_items.{name}", "integers >= 0", numbers)

    def to_json(self) -> dict[str, Any]:
        """Plain values only; `from_json` gives an equal state back."""
        plain = dataclasses.asdict(self) | {"streams": {}}
        plain["streams"] = {name: dataclasses.asdict(s) for name, s in self.streams.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> RunState:
        """Rebuild a state.

        Raises:
            ValueError: for a missing, unknown or malformed field, naming it.
        """
        _require(isinstance(plain, dict), "state", "a table", plain)
        names = {entry.name for entry in dataclasses.fields(cls)}
        different = sorted(names.symmetric_difference(plain))
        _require(not different, "state", "exactly the known fields", different)
        streams = plain["streams"]
        _require(isinstance(streams, dict), "streams", "a table", streams)
        rebuilt: dict[str, StreamState] = {}
        for name, stream in streams.items():
            good = isinstance(stream, dict) and set(stream) == {"epoch", "batches_done"}
            _require(good, f"streams.{name}", "epoch and batches_done", stream)
            rebuilt[name] = StreamState(stream["epoch"], stream["batches_done"])
        return cls(**(plain | {"streams": rebuilt}))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(good: bool, name: str, wanted: str, value: Any) -> None:
    if not good:
        raise ValueError(f"run state: {name} must be {wanted}, not {value!r}")


# Files that survive a crash


def fsync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_name() -> str:
    """Host and process number: unique among all that may write into a shared folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path`: a reader, or a crash, sees the old or the new content, never a part."""
    temporary = path.with_name(f".tmp-{path.name}.{process_name()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


# RUN/status.json


def job_identity() -> dict[str, Any]:
    """Slurm's job id and restart count (None and 0 outside Slurm), host and process."""
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
        checkpoint: path of the newest valid checkpoint relative to the run folder; None keeps the
            one that the file already names.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"unknown outcome {outcome!r}; it is one of {', '.join(OUTCOMES)}")
    before = read_status(run_dir) or {}
    kept = {
        "checkpoint": checkpoint or before.get("checkpoint"),
        "starts_without_progress": before.get("starts_without_progress", 0),
        "started_at_step": before.get("started_at_step", step),
        "last_stop": before.get("last_stop"),
    }
    _replace_status(run_dir, outcome, step, reason, kept)


def _replace_status(
    run_dir: Path, outcome: Outcome, step: int, reason: str, further: dict[str, Any]
) -> None:
    status = {
        "outcome": outcome,
        "step": step,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **further,
        **job_identity(),
    }
    write_durably(run_dir / "status.json", (json.dumps(status, indent=1) + "\n").encode())


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The last status, or None when there is none or it cannot be read."""
    try:
        status = json.loads((run_dir / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def start_status(run_dir: Path, step: int) -> int:
    """Mark the run as running from `step` and count starts that led nowhere; rank 0 only.

    Returns:
        How many starts before this one began at the same step and failed without a newer
        checkpoint: 0 on a healthy run. A crash loop shows here; the caller decides when to give up.
    """
    before = read_status(run_dir) or {}
    # "running" means that the process died without a word.
    died = before.get("outcome") in ("running", "failed")
    stuck = died and before.get("started_at_step") == step
    fruitless = int(before.get("starts_without_progress", 0)) + 1 if stuck else 0
    fresh = {
        "checkpoint": before.get("checkpoint"),
        "starts_without_progress": fruitless,
        "started_at_step": step,
        "last_stop": _last_stop(before),
    }
    _replace_status(run_dir, "running", step, "", fresh)
    return fruitless


def _last_stop(before: dict[str, Any]) -> dict[str, Any] | None:
    """How the start before this one ended, None on the first one."""
    if "outcome" not in before:
        return None
    stop = {key: before.get(key) for key in ("outcome", "step", "reason", "time", "job_id")}
    stop["restart_count"] = before.get("restart_count")
    if before["outcome"] == "running":
        stop |= {"outcome": "failed", "reason": "ended without a word: killed, or its node failed"}
    return stop


# The run folder belongs to one job


class RunLock:
    """Held while a job writes into a run folder; see `lock_run_folder`."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the folder free; harmless when called again."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock_run_folder(run_dir: Path, world: World) -> RunLock:
    """Claim the run folder for this job; rank 0 holds the lock, all ranks learn the answer.

    The kernel's record lock dies with its process, so on one host a stale lock cannot exist; it is
    not inherited by forked loader workers (`flock` would be). Network file systems may keep such
    locks local to each host, hence the owner's name in the file: a lock from another host is taken
    over only by a later restart of the same Slurm job.

    Raises:
        UserError: on every rank, if another live job holds the folder.
    """
    lock, refusal = RunLock(None), None
    if world.rank == 0:
        try:
            lock = _take_lock(run_dir)
        except UserError as error:
            refusal = str(error)
    refusal = world.broadcast_object(refusal)
    if refusal is not None:
        raise UserError(refusal)
    return lock


def _take_lock(run_dir: Path) -> RunLock:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        taken = _record_lock(descriptor)
        owner = _read_owner(descriptor)
        if taken is False or (owner and not _is_gone(owner, kernel_says_free=taken is True)):
            raise UserError(
                f"{run_dir} is in use by host {owner.get('host', '?')}, process "
                f"{owner.get('pid', '?')}, job {owner.get('job_id') or '-'}: wait for it, choose "
                f"another run folder, or delete {path} if you are sure that it has ended"
            )
        if owner:
            logger.warning(
                "stale lock of host %s, process %s, job %s taken over",
                *(owner.get(key) for key in ("host", "pid", "job_id")),
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(job_identity()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return RunLock(descriptor)


def _record_lock(descriptor: int) -> bool | None:
    """True: we hold it. False: another process does. None: this file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        return None
    return True


def _read_owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_gone(owner: dict[str, Any], *, kernel_says_free: bool) -> bool:
    me = job_identity()
    if owner.get("host") == me["host"]:
        return kernel_says_free or not _is_alive(owner.get("pid"))
    # Slurm restarts a job only after its former processes are gone from every node.
    same_job = me["job_id"] is not None and owner.get("job_id") == me["job_id"]
    return same_job and owner.get("restart_count", 0) < me["restart_count"]


def _is_alive(pid: Any) -> bool:
    if not _is_count(pid) or pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
