"""Ending a run on purpose: signals, the STOP file, a time limit, and a watchdog for hangs.

Signal handlers only set a flag. The flag, the file and the clock are merged into one number that
the ranks compare in every step, so that all of them save the same step and leave.
"""

from __future__ import annotations

import enum
import faulthandler
import logging
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias

from dalr_scale.run.status import job_identity

if TYPE_CHECKING:
    from pathlib import Path

    from dalr_scale.run.ranks import Ranks

log = logging.getLogger(__name__)

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None

# torchrun forwards only the signals it is told to; any of these may arrive, so all are handled.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
    signal.SIGQUIT,
)


class StopReason(enum.IntEnum):
    """Why a run ends early; of several reasons the highest counts."""

    TIME_LIMIT = 1
    SIGNAL = 2
    REQUEUE = 3
    INTERRUPT = 4
    STOP_FILE = 5

    @property
    def outcome(self) -> Literal["preempted", "stopped"]:
        """`preempted` is to be requeued, `stopped` was requested by a person."""
        requested = self in (StopReason.INTERRUPT, StopReason.STOP_FILE)
        return "stopped" if requested else "preempted"

    @property
    def text(self) -> str:
        return _TEXTS[self]


_TEXTS = {
    StopReason.TIME_LIMIT: "time limit reached",
    StopReason.SIGNAL: "signal received",
    StopReason.REQUEUE: "STOP file with the word requeue",
    StopReason.INTERRUPT: "interrupted from the keyboard",
    StopReason.STOP_FILE: "STOP file",
}


class StopFlag:
    """Collects stop requests; use it as a context manager around training.

    Args:
        run_dir: directory whose file STOP ends the run: empty means `stopped`, the word `requeue`
            (written by the job script, with the job and its restart) means `preempted`.
        limit_seconds: wall-clock limit counted from here; None or 0 for none.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        limit_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = run_dir / "STOP"
        self._clock = clock
        self._deadline = clock() + limit_seconds if limit_seconds else None
        self._caught = 0
        self._agreed: StopReason | None = None
        self._former: dict[signal.Signals, _Handler] = {}

    def install(self) -> None:
        """Take over the signals; main thread only."""
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, former in self._former.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)
        self._former.clear()

    def __enter__(self) -> StopFlag:
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - of a handler
        # No saving, logging or collective in here: it may interrupt any of them half way. A
        # second signal finds the flag set; Ctrl-C after SIGTERM still turns into a stop request.
        code = StopReason.INTERRUPT if number == signal.SIGINT else StopReason.SIGNAL
        self._caught = max(self._caught, code)

    def clear_stale(self, world: Ranks) -> None:
        """Remove a STOP left by an earlier run; all ranks call it once, before the first poll.

        The job script's stop request for this very start stays: its signal may come while torch
        is loading.
        """
        if world.rank == 0 and self._path.exists() and not self._is_for_this_start():
            self._path.unlink(missing_ok=True)
            log.info("removed a STOP file from before this start")
        world.barrier()

    def _is_for_this_start(self) -> bool:
        me = job_identity()
        start = f"requeue {me['job_id']} {me['restart_count']}"
        return me["job_id"] is not None and self._read_file() == start

    def poll(self, *, read_file: bool = True) -> StopReason | None:
        """This rank's reason to stop so far, without asking the others (for waits and loops)."""
        code = self._caught
        if self._deadline is not None and self._clock() >= self._deadline:
            code = max(code, StopReason.TIME_LIMIT)
        if read_file:
            code = max(code, self._file_code())
        return StopReason(code) if code else None

    def agree(self, world: Ranks) -> StopReason | None:
        """The common reason to stop, the same on all ranks, by a collective of its own.

        In training the vote of a step carries it (``training.agreement``).

        Only rank 0 looks at the file: the others would load the file system for nothing.
        """
        if self._agreed is None:
            self.settle(world.all_max(int(self.poll(read_file=world.rank == 0) or 0)))
        return self._agreed

    def settle(self, code: int) -> StopReason | None:
        """Takes the largest code of all ranks, 0 for none; an earlier reason stays."""
        if self._agreed is None and code:
            self._agreed = StopReason(code)
        return self._agreed

    def _file_code(self) -> int:
        word = self._read_file()
        if word == "":
            # `echo requeue > STOP` creates the file before it fills it.
            time.sleep(0.1)
            word = self._read_file()
        if word is None:
            return 0
        return StopReason.REQUEUE if word.startswith("requeue") else StopReason.STOP_FILE

    def _read_file(self) -> str | None:
        try:
            return self._path.read_bytes()[:64].decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return None
        except OSError:
            return ""  # it is there (a directory, no permission): this is a stop request as well


class Watchdog:
    """Ends this process with all stacks on stderr when a phase takes longer than it may.

    The timer lives in a C thread, so it also fires while the GIL is held or the rank waits in a
    collective for a peer that died. Re-arm it for every phase: a slow save is not a hang.
    """

    def __init__(self) -> None:
        self._limits: dict[str, float] = {}

    def arm(self, seconds: float, what: str) -> None:
        """Start or restart the timer for phase `what`; 0 seconds switches it off."""
        if what not in self._limits:  # once: the phases alternate with every step
            log.debug("watchdog: %s may take %g s", what, seconds)
        self._limits[what] = seconds
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
        else:
            faulthandler.cancel_dump_traceback_later()

    def disarm(self) -> None:
        """Stop the timer."""
        faulthandler.cancel_dump_traceback_later()
