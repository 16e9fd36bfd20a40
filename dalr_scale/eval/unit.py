"""The unit of scores: fractions in memory, x 100 in everything that a run or a command writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

UNIT = "x 100"
TABLES = ("untrained", "lexical", "trained")


def in_percent(scores: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Correlations in [-1, 1] and recalls in [0, 1] as they are written: x 100, not rounded."""
    return {name: 100 * float(score) for name, score in scores.items()}


def read_scores(path: Path) -> dict[str, Any]:
    """RUN/before.json or RUN/result.json, x 100.

    Files without a unit are from before 0.1 and hold fractions.

    Raises:
        OSError, ValueError: no such file, or not JSON.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("unit") == UNIT:
        return record
    scores = {name: in_percent(record[name]) for name in TABLES if name in record}
    return record | {"unit": UNIT} | scores
