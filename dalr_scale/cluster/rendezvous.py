"""How the nodes of a job report to the first one before training; see `dalr_scale.commands.doctor`.

The first node listens on the port that training will use. Each of the others connects, looks for a
file that the first has created in the output directory, creates one there too, sends its report
and, on request, its clock, and waits for the verdict. Messages are JSON, one a line.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dalr_scale.cluster.node_report import NodeReport

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from dalr_scale.run.files import JsonTable, JsonValue

MAX_LINE = 1 << 20  # bytes of one message
FILE_TIMEOUT = 5.0  # seconds; network file systems show new files late


class _JsonConnection:
    """One connection that carries JSON connections."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: JsonTable) -> None:
        """Sends one message."""
        self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, JsonValue]:
        """The next message.

        Raises:
            OSError: if the peer has closed the connection, has sent nothing until the timeout, or
                sends anything but a JSON table.
        """
        data = self._file.readline(MAX_LINE)
        try:
            message: JsonValue = json.loads(data)
        except ValueError as error:
            raise ConnectionError("the peer closed the connection") from error
        if not isinstance(message, dict):
            raise ConnectionError("not a message of dalr-scale doctor")
        return message

    def close(self) -> None:
        """Closes the connection; harmless when it is broken."""
        with suppress(OSError):
            self._file.close()
            self._connection.close()


@dataclass
class NodeReports:
    """The reports received, and the connections on which their nodes wait."""

    reports: list[NodeReport] = field(default_factory=list[NodeReport])
    connections: list[_JsonConnection] = field(default_factory=list[_JsonConnection])

    def release(self, good: bool) -> None:
        """Sends every waiting node the verdict: whether training starts."""
        for connection in self.connections:
            with suppress(OSError):
                connection.send({"good": good})


@contextmanager
def collect_reports(
    port: int, nodes: int, run_dir: Path | None, timeout: float
) -> Generator[NodeReports]:
    """Collects the reports of `nodes` - 1 other nodes, within `timeout` seconds.

    Raises:
        OSError: if the port cannot be listened on.
    """
    deadline = time.monotonic() + timeout
    collected = NodeReports()
    marker = f".doctor-{secrets.token_hex(8)}"
    server = socket.create_server(("", port), backlog=nodes)  # reuses the address
    try:
        if run_dir is not None:
            with suppress(OSError):  # the node's own report says so
                (run_dir / marker).touch()
        _collect(server, nodes, run_dir, marker, deadline, collected)
        yield collected
    finally:
        server.close()
        for connection in collected.connections:
            connection.close()
        if run_dir is not None:
            for path in run_dir.glob(f"{marker}*"):
                path.unlink(missing_ok=True)


def _collect(
    server: socket.socket,
    nodes: int,
    run_dir: Path | None,
    marker: str,
    deadline: float,
    collected: NodeReports,
) -> None:
    lock = threading.Lock()
    threads: list[threading.Thread] = []

    def receive(connection: _JsonConnection) -> None:
        try:
            report = _receive_report(connection, run_dir, marker)
        except (OSError, TypeError, KeyError):
            connection.close()  # it is reported as missing
            return
        with lock:
            collected.reports.append(report)
            collected.connections.append(connection)

    while len(collected.reports) < nodes - 1 and time.monotonic() < deadline:
        server.settimeout(0.2)
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            continue
        accepted.settimeout(max(1.0, deadline - time.monotonic()))
        connection = _JsonConnection(accepted)
        threads.append(threading.Thread(target=receive, args=(connection,), daemon=True))
        threads[-1].start()
    with lock:
        collected.reports.sort(key=lambda report: report.rank)


def _receive_report(connection: _JsonConnection, run_dir: Path | None, marker: str) -> NodeReport:
    connection.send({"marker": marker})
    report = NodeReport.from_json(connection.receive())
    sent = time.time()
    connection.send({"question": "time"})
    there = connection.receive()["time"]
    received = time.time()
    if not isinstance(there, int | float):
        raise TypeError(f"{there!r} is not a time")
    # the travel time of the question is not a difference of clocks
    offset = there - (sent + received) / 2
    report.clock_offset = offset if abs(offset) > (received - sent) / 2 else 0.0
    if run_dir is not None and not _appears(run_dir / f"{marker}.{report.rank}"):
        report.problems.append(
            f"the output directory {run_dir} is not the same there: its file does not show on the "
            "first node; choose a directory on the shared file system"
        )
    return report


def send_report(
    head: str, port: int, report: NodeReport, run_dir: Path | None, timeout: float
) -> bool:
    """Reports to the first node and returns its verdict.

    Raises:
        OSError: if the first node cannot be reached, or does not answer in time.
    """
    deadline = time.monotonic() + timeout
    connected = _retry(lambda: socket.create_connection((head, port), timeout=5), deadline)
    connected.settimeout(2 * timeout)
    connection = _JsonConnection(connected)
    try:
        marker = str(connection.receive()["marker"])
        if run_dir is not None:
            _touch_marker(run_dir, marker, report)
        connection.send(report.to_json())
        connection.receive()
        connection.send({"time": time.time()})
        return bool(connection.receive().get("good"))
    finally:
        connection.close()


def _touch_marker(run_dir: Path, marker: str, report: NodeReport) -> None:
    if os.sep in marker:
        raise ConnectionError(f"strange marker {marker!r}")
    if not _appears(run_dir / marker):
        report.problems.append(
            f"the output directory {run_dir} is not shared with the first node; choose a directory "
            "that all nodes see"
        )
    with suppress(OSError):  # reported already
        (run_dir / f"{marker}.{report.rank}").touch()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + FILE_TIMEOUT
    while time.monotonic() < deadline:
        with suppress(OSError):
            next(path.parent.iterdir(), None)  # makes NFS look again
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
