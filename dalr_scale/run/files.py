"""Files that survive a crash, and the JSON in them.

Nothing in `dalr_scale.run` imports torch, so that tools and the job script start in a fraction of a
second.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

JsonValue: TypeAlias = (
    "Mapping[str, JsonValue] | Sequence[JsonValue] | str | int | float | bool | None"
)
JsonTable: TypeAlias = Mapping[str, JsonValue]


def fsync_directory(directory: Path) -> None:
    """Make renames and new names inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_name() -> str:
    """Host and process number: unique among all that may write into a shared directory."""
    return f"{socket.gethostname()}-{os.getpid()}"


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path`: a reader, or a crash, sees the old or the new content, never a part."""
    temporary = path.with_name(f".tmp-{path.name}.{process_name()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Replace `path` durably by a table as JSON, indented by one space and closed by a newline."""
    write_durably(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json_table(path: Path) -> dict[str, JsonValue]:
    """The table in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not a table.
    """
    value: JsonValue = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON table")
    return value
