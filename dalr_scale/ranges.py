"""The allowed range of every number in a configuration, and what the ranks can share.

A wrong number is refused when the configuration is read, before any process waits for another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dalr_scale.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; an open end is not allowed itself."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        lower = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return f"a finite number {lower}"
        return f"{lower} and {'below' if self.open_high else 'at most'} {self.high:g}"


NOT_NEGATIVE = Range()
POSITIVE = Range(open_low=True)
COUNT = Range(1)
SHARE = Range(high=1)

# Every number that is not named here must be finite and not negative.
RANGES = {
    "data.pair_fraction": SHARE,
    "data.pair_weights": POSITIVE,
    "data.text_weights": POSITIVE,
    "data.max_bad_fraction": SHARE,
    "data.crop_area": Range(high=1, open_low=True),
    "data.flip": SHARE,
    "data.max_length": Range(3),  # the two special tokens and one of the sentence
    "model.grounding_width": COUNT,
    "model.consistency_width": COUNT,
    "model.head_init_std": POSITIVE,
    "objective.temperature": POSITIVE,
    "objective.vl_temperature": POSITIVE,
    "objective.kl_student_temperature": POSITIVE,
    "objective.kl_teacher_temperature": POSITIVE,
    "objective.rank_teacher_temperature": POSITIVE,
    "objective.margin": Range(high=math.pi),
    "objective.vl_margin": Range(high=math.pi),
    "objective.false_negative_threshold": SHARE,
    "batch.global_size": COUNT,
    "optim.lr": POSITIVE,
    "optim.betas": Range(high=1, open_high=True),
    "optim.eps": POSITIVE,
    "optim.epochs": POSITIVE,
    "engine.timeout_minutes": POSITIVE,
    "eval.batch_size": COUNT,
    "save.keep": Range(2),
    "log.every": COUNT,
}
LENGTHS = {"optim.betas": 2}


def check_ranges(config: Any) -> None:
    """Refuses the first number of a configuration that is out of its range.

    Raises:
        UserError: naming the key, the value and the range.
    """
    for name, value in _entries(config):
        if name in LENGTHS and len(value) != LENGTHS[name]:
            raise UserError(f"{name} has {len(value)} entries; it needs {LENGTHS[name]}")
        allowed = RANGES.get(name, NOT_NEGATIVE)
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and number not in allowed:
                raise UserError(f"{name} = {number} is out of range: it must be {allowed}")


def check_arithmetic(config: Any, world_size: int) -> int:
    """Rows of a rank's share of the global batch.

    Raises:
        UserError: one line with the numbers of an impossible share.
    """
    size, micro = config.batch.global_size, config.batch.micro_size
    if size < 2:
        raise UserError(f"batch.global_size = {size}: a contrast needs at least 2 rows")
    if size % world_size:
        raise UserError(
            f"batch.global_size = {size} cannot be cut into equal shares for {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    rows = size // world_size
    if not 0 <= micro <= rows:
        raise UserError(
            f"batch.micro_size = {micro} does not fit the {rows} rows of a rank "
            f"({size} rows over {world_size} ranks); choose 1 to {rows}, or 0 for all"
        )
    return rows


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    for section in dataclasses.fields(config):
        entries = getattr(config, section.name)
        for entry in dataclasses.fields(entries):
            yield f"{section.name}.{entry.name}", getattr(entries, entry.name)
