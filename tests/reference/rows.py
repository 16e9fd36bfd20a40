"""One row of the random search: run it, run its reference, say how they agree."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dalr_scale.errors import UserError
from reference.compare import compare
from reference.runs import RunFailed, run
from reference.trainer import train

if TYPE_CHECKING:
    from reference.draw import Row


@dataclass
class RowResult:
    """kind: "agrees", "refused" (as it must be), "differs", or "failed"."""

    number: int
    summary: str
    kind: str
    steps: float = 0.0
    weights: float = 0.0
    compared: int = 0
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.kind in ("agrees", "refused")

    def __str__(self) -> str:
        return f"{self.number:5d} {self.kind:8s} {self.summary}: {self.detail}"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def try_row(row: Row, data: Path, directory: Path) -> RowResult:
    """Trains a row in `directory`, which is removed, and compares it with its reference."""
    torch.set_num_threads(1)
    try:
        return _refused(row, data, directory) if row.broken else _compared(row, data, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _compared(row: Row, data: Path, directory: Path) -> RowResult:
    config = row.config(data)
    try:
        done = run(config, directory, row.ranks, row.stops)
    except RunFailed as error:
        return RowResult(row.number, row.summary, "failed", detail=str(error))
    found = compare(config, done, train(config), row.bounds)
    kind = "agrees" if found.within(row.bounds) else "differs"
    return RowResult(
        row.number, row.summary, kind, found.steps, found.weights, found.compared, str(found)
    )


def _refused(row: Row, data: Path, directory: Path) -> RowResult:
    """A broken row must end with one sentence and exit code 2, on every rank."""
    try:
        run(row.config(data), directory, row.ranks)
    except UserError as error:
        return RowResult(row.number, row.summary, "refused", detail=str(error))
    except RunFailed as error:
        text = str(error)
        good = error.codes == (2,) * row.ranks and "Traceback" not in text and "error: " in text
        return RowResult(row.number, row.summary, "refused" if good else "failed", detail=text)
    return RowResult(row.number, row.summary, "failed", detail="trained, but must be refused")
