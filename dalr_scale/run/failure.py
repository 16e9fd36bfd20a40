"""Which rank failed first: every failing rank leaves a record, the job script reads them all.

When one rank dies, the others fail a moment later because their collectives break, and launchers
report all of them. So a record says whether the error was the rank's own or came through a
collective, and a rank that was killed, and could write nothing, is found in its launcher's log.

Standard library only: the job script reads this on a node that trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalr_scale.run.files import write_durably
from dalr_scale.run.status import job_identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Messages of gloo, NCCL and the TCP store when another process has ended.
_ECHOES = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket (timeout|closed)"
    r"|nccl|gloo|remote process exited|recvvalue|failed to recv|distbackenderror",
    re.IGNORECASE,
)
_HEADER = re.compile(r"^=== job (\S+) restart (\d+) node (\S+)", re.MULTILINE)
_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):\s*\[\d+\]:\s*time\s*: (\S+)\s*host\s*: \S+\s*"
    r"rank\s*: (\d+) .*\s*exitcode\s*: (-?\d+)"
)


@dataclass(frozen=True)
class Failure:
    """One rank's end.

    Attributes:
        time: seconds since the epoch, by the clock of the rank's node.
        echo: another process failed first and this one noticed.
    """

    node: str
    rank: int
    time: float
    what: str
    echo: bool

    def line(self) -> str:
        return f"first failure: node {self.node}, rank {self.rank}: {self.what}"


def node_name() -> str:
    """Slurm's name of this node, which may differ from the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Writes RUN/log/rankN.failure.json, if the directory can be written."""
    kind, text = type(error).__name__, str(error) or "no message"
    what = text if kind == "UserError" else f"{kind}: {text}"
    echo = kind != "UserError" and bool(_ECHOES.search(what))
    failure = Failure(node_name(), rank, time.time(), what.strip().splitlines()[0], echo)
    record = dataclasses.asdict(failure) | job_identity()
    with contextlib.suppress(OSError):
        write_durably(_record_path(run_dir, rank), (json.dumps(record) + "\n").encode())


def _record_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "log" / f"rank{rank}.failure.json"


def first_failure(run_dir: Path, job_id: str, restart: int) -> Failure | None:
    """The failure of this start that came before the others, or None if there is none."""
    records = {f.rank: f for f in _own_records(run_dir, job_id, restart)}
    for failure in _launcher_failures(run_dir, job_id, restart):
        records.setdefault(failure.rank, failure)
    return min(records.values(), key=lambda f: (f.echo, f.time), default=None)


def _own_records(run_dir: Path, job_id: str, restart: int) -> Iterator[Failure]:
    for path in run_dir.glob("log/rank*.failure.json"):
        try:
            plain = json.loads(path.read_bytes())
            if (plain.pop("job_id"), plain.pop("restart_count")) == (job_id, restart):
                yield Failure(**{f.name: plain[f.name] for f in dataclasses.fields(Failure)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue


def _launcher_failures(run_dir: Path, job_id: str, restart: int) -> Iterator[Failure]:
    """The first failure that each node's launcher reports, from RUN/log/nodeK.log."""
    for path in run_dir.glob("log/node*.log"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        starts = list(_HEADER.finditer(text))
        if not starts or starts[-1].group(1, 2) != (job_id, str(restart)):
            continue
        if found := _ROOT_CAUSE.search(text, starts[-1].end()):
            when, rank, code = found[1], int(found[2]), int(found[3])
            # SIGTERM is how launchers end the ranks that are left
            echo = code == -signal.SIGTERM
            # launchers cut the fraction off, ranks do not
            seconds = time.mktime(time.strptime(when, "%Y-%m-%d_%H:%M:%S")) + 1
            yield Failure(starts[-1][3], rank, seconds, _exit_text(code), echo)


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
