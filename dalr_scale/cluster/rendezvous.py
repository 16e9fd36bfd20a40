"""How the nodes of a job report to the first one before training; see `dalr_scale.commands.doctor`.

The first node listens on the port that training will use. Each of the others connects, looks for a
file that the first has put into the output folder, leaves one of its own there, sends its report
and then its clock when asked, and waits for the verdict. Messages are JSON, one a line.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalr_scale.cluster.node_report import NodeReport

MAX_LINE = 1 << 20  # bytes of one message
FILE_PATIENCE = 5.0  # seconds; network file systems show new files late


class _Line:
    """One connection that carries JSON lines."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            OSError: if the other side is gone, silent for too long, or talks nonsense.
        """
        data = self._file.readline(MAX_LINE)
        try:
            message = json.loads(data)
        except ValueError as error:
            raise ConnectionError("the other side closed the connection") from error
        if not isinstance(message, dict):
            raise ConnectionError("not a message of dalr-scale doctor")
        return message

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
            self._connection.close()


@dataclass
class Attendance:
    """The reports that came, and the connections on which their nodes wait."""

    reports: list[NodeReport] = field(default_factory=list)
    lines: list[_Line] = field(default_factory=list)

    def dismiss(self, good: bool) -> None:
        """Tells every waiting node whether training starts."""
        for line in self.lines:
            with suppress(OSError):
                line.send({"good": good})


@contextmanager
def call_roll(port: int, nodes: int, run_dir: Path | None, patience: float) -> Iterator[Attendance]:
    """Collects the reports of `nodes` - 1 other nodes, for `patience` seconds at most.

    Raises:
        OSError: if the port cannot be listened on.
    """
    deadline = time.monotonic() + patience
    attendance = Attendance()
    marker = f".doctor-{secrets.token_hex(8)}"
    server = socket.create_server(("", port), backlog=nodes)  # reuses the address
    try:
        if run_dir is not None:
            with suppress(OSError):  # the node's own report says so
                (run_dir / marker).touch()
        _collect(server, nodes, run_dir, marker, deadline, attendance)
        yield attendance
    finally:
        server.close()
        for line in attendance.lines:
            line.close()
        if run_dir is not None:
            for path in run_dir.glob(f"{marker}*"):
                path.unlink(missing_ok=True)


def _collect(
    server: socket.socket,
    nodes: int,
    run_dir: Path | None,
    marker: str,
    deadline: float,
    attendance: Attendance,
) -> None:
    lock = threading.Lock()
    threads: list[threading.Thread] = []

    def talk(connection: socket.socket) -> None:
        line = _Line(connection)
        try:
            report = _hear(line, run_dir, marker)
        except (OSError, TypeError, KeyError):
            line.close()  # it shows as missing
            return
        with lock:
            attendance.reports.append(report)
            attendance.lines.append(line)

    while len(attendance.reports) < nodes - 1 and time.monotonic() < deadline:
        server.settimeout(0.2)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        connection.settimeout(max(1.0, deadline - time.monotonic()))
        threads.append(threading.Thread(target=talk, args=(connection,), daemon=True))
        threads[-1].start()
    with lock:
        attendance.reports.sort(key=lambda report: report.rank)


def _hear(line: _Line, run_dir: Path | None, marker: str) -> NodeReport:
    line.send({"marker": marker})
    report = NodeReport(**line.receive())
    sent = time.time()
    line.send({"question": "time"})
    there = float(line.receive()["time"])
    got = time.time()
    # what the question may have taken on its way is no difference of clocks
    offset = there - (sent + got) / 2
    report.clock_offset = offset if abs(offset) > (got - sent) / 2 else 0.0
    if run_dir is not None and not _appears(run_dir / f"{marker}.{report.rank}"):
        report.problems.append(
            f"the output folder {run_dir} is not the same there: its file does not show on the "
            "first node; choose a folder on the shared file system"
        )
    return report


def answer_call(
    head: str, port: int, report: NodeReport, run_dir: Path | None, patience: float
) -> bool:
    """Reports to the first node and returns its verdict.

    Raises:
        OSError: if the first node cannot be reached, or does not answer in time.
    """
    deadline = time.monotonic() + patience
    connection = _retry(lambda: socket.create_connection((head, port), timeout=5), deadline)
    connection.settimeout(2 * patience)
    line = _Line(connection)
    try:
        marker = str(line.receive()["marker"])
        if run_dir is not None:
            _leave_mark(run_dir, marker, report)
        line.send(report.to_json())
        line.receive()
        line.send({"time": time.time()})
        return bool(line.receive().get("good"))
    finally:
        line.close()


def _leave_mark(run_dir: Path, marker: str, report: NodeReport) -> None:
    if os.sep in marker:
        raise ConnectionError(f"strange marker {marker!r}")
    if not _appears(run_dir / marker):
        report.problems.append(
            f"the output folder {run_dir} is not shared with the first node; choose a folder that "
            "all nodes see"
        )
    with suppress(OSError):  # found already
        (run_dir / f"{marker}.{report.rank}").touch()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + FILE_PATIENCE
    while time.monotonic() < deadline:
        with suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        if path.exists():
            return True
        time.sleep(0.1)
    return path.exists()


def _retry(action: Callable[[], socket.socket], deadline: float) -> socket.socket:
    while True:
        try:
            return action()
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.3)
