"""The results file of one GPU: every planned row is in it from the start, as not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.problems import operations

if TYPE_CHECKING:
    from bench.schedule import Cell

# In schema 1 the rows of a cell are saved under "contestants".
SCHEMA = 1
NOT_REACHED = "not measured: the time was used up before"


def new(host: dict[str, Any], cells: list[Cell], settings: dict[str, Any]) -> dict[str, Any]:
    """An empty result with one row per cell and implementation."""
    return {
        "schema": SCHEMA,
        "host": host,
        "settings": settings,
        "machine": {},
        "complete": False,
        "cells": [_cell(cell) for cell in cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    flop, formula = operations(cell.problem, cell.shape)
    shape = cell.shape
    return {
        "key": cell.key,
        "problem": cell.problem,
        "rows": shape.rows,
        "cols": shape.cols,
        "width": shape.width,
        "tokens": shape.tokens,
        "data": cell.data,
        "flop": flop,
        "flop_formula": formula,
        "state": {},
        "contestants": {name: {"status": NOT_REACHED} for name in cell.implementations},
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file at once, so that a run cut short leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def resume(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """Rows measured before by the same code on the same kind of machine, kept.

    A result of another or unknown commit, device or version is not mixed in: `fresh` comes back as
    it is.
    """
    if not path.exists():
        return fresh
    before = read(path)
    same = ("device", "packages", "commit")
    if (
        not fresh["host"]["commit"]
        or before.get("schema") != SCHEMA
        or any(before["host"].get(key) != fresh["host"].get(key) for key in same)
    ):
        return fresh
    known = {cell["key"]: cell for cell in before["cells"]}
    fresh["machine"] = before["machine"]
    for cell in fresh["cells"]:
        if cell["key"] not in known:
            continue
        old = known[cell["key"]]
        cell["state"] = old["state"]
        for name in cell["contestants"]:
            cell["contestants"][name] = old["contestants"].get(name, cell["contestants"][name])
    return fresh


def pending(cell: dict[str, Any]) -> list[str]:
    """Implementations of a cell that the time has not reached."""
    return [name for name, row in cell["contestants"].items() if row["status"] == NOT_REACHED]


def find(results: dict[str, Any], problem: str, size: int, width: int) -> dict[str, dict[str, Any]]:
    """Rows of one square cell on random data by implementation; empty when it is not planned."""
    wanted = (problem, "random", size, size, width)
    for cell in results["cells"]:
        if wanted == tuple(cell[k] for k in ("problem", "data", "rows", "cols", "width")):
            return cell["contestants"]
    return {}


def median(row: dict[str, Any] | None, phase: str = "both") -> float | None:
    """Milliseconds of a measured row, else None."""
    if not row or row["status"] != "measured":
        return None
    return row["milliseconds"].get(phase, {}).get("median")
