"""The lock on a run directory: two jobs must not write into one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from typing import TYPE_CHECKING, cast

from dalr_scale.errors import UserError
from dalr_scale.run.state import is_count
from dalr_scale.run.status import JobIdentity, job_identity

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from dalr_scale.run.ranks import Ranks

log = logging.getLogger(__name__)


class RunLock:
    """Held while a job writes into a run directory; see `lock_run_directory`."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock the directory; harmless when called again."""
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


def lock_run_directory(run_dir: Path, ranks: Ranks) -> RunLock:
    """Claim the run directory for this job; rank 0 holds the lock, all ranks get the answer.

    The kernel's record lock ends with its process, so on one host a stale lock cannot exist; it is
    not inherited by forked loader workers (`flock` would be). Network file systems may keep such
    locks local to each host, hence the owner's name in the file: a lock from another host is taken
    over only by a later restart of the same Slurm job.

    Raises:
        UserError: on every rank, if another live job holds the directory.
    """
    lock, refusal = RunLock(None), None
    if ranks.rank == 0:
        try:
            lock = _take_lock(run_dir)
        except UserError as error:
            refusal = str(error)
    refusal = ranks.broadcast_object(refusal)
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
        if taken is False or (owner and not _has_ended(owner, lock_is_free=taken is True)):
            raise UserError(
                f"{run_dir} is in use by host {owner.get('host', '?')}, process "
                f"{owner.get('pid', '?')}, job {owner.get('job_id') or '-'}: wait for it, choose "
                f"another run directory, or delete {path} if you are sure that it has ended"
            )
        if owner:
            log.warning(
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


class _Owner(JobIdentity, total=False):
    """The identity in a lock file, which may be empty or damaged."""


def _read_owner(descriptor: int) -> _Owner:
    try:
        owner: object = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return cast("_Owner", {})
    return cast("_Owner", owner if isinstance(owner, dict) else {})


def _has_ended(owner: _Owner, *, lock_is_free: bool) -> bool:
    own = job_identity()
    if owner.get("host") == own["host"]:
        return lock_is_free or not _is_alive(owner.get("pid"))
    # Slurm restarts a job only after its former processes have ended on every node.
    same_job = own["job_id"] is not None and owner.get("job_id") == own["job_id"]
    return same_job and owner.get("restart_count", 0) < own["restart_count"]


def _is_alive(pid: object) -> bool:
    if not is_count(pid) or pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
