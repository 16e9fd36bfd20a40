"""The allowed range of every number in a configuration, and the rows of a rank.

A number out of range is refused when the configuration is read, before any process waits for
another.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dalr_scale.config.schema import BatchConfig, Config


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is not allowed itself."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        lower = f"{'above' if self.open_low else 'at least'} {_digits(self.low)}"
        return f"{lower} and {'below' if self.open_high else 'at most'} {_digits(self.high)}"


def _digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def shown(value: object) -> str:
    """A value for a message, truncated to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of more than 4300 digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


# A year, and a number of steps, that no run reaches; a width that no model has.
YEAR, MANY, WIDE = 525_600, 10**9, 65_536
SHARE = Range(0, 1)
WEIGHT = Range(0, 10**6)
COUNT = Range(1, MANY)
COUNT_OR_OFF = Range(0, MANY)
MINUTES_OR_OFF = Range(0, YEAR)
WIDTH = Range(1, WIDE)
# float32 holds logits of unit vectors down to these temperatures with room to spare
TEMPERATURE = Range(1e-4, 1e4)
ANGLE = Range(0, math.pi, open_high=True)

# The range of every number; a test looks that none is missing. Upper ends are where arithmetic,
# clocks or the operating system would give up, far above what a run can use.
RANGES = {
    "run.seed": Range(0, 2**63 - 1),
    "run.watchdog_minutes": MINUTES_OR_OFF,
    "run.max_minutes": MINUTES_OR_OFF,
    "data.pair_fraction": SHARE,
    "data.max_length": Range(3, 10**6),  # the two special tokens and one of the sentence
    "data.workers": Range(0, 256),
    "data.pair_weights": Range(0, 10**9, open_low=True),
    "data.text_weights": Range(0, 10**9, open_low=True),
    "data.max_bad_fraction": SHARE,
    "data.crop_area": Range(0, 1, open_low=True),
    "data.flip": SHARE,
    "model.grounding_width": WIDTH,
    "model.consistency_width": WIDTH,
    "model.head_init_std": Range(0, 100, open_low=True),
    "teachers.text_weights": SHARE,
    "objective.temperature": TEMPERATURE,
    "objective.vl_temperature": TEMPERATURE,
    "objective.margin": ANGLE,
    "objective.vl_margin": ANGLE,
    "objective.cross_weight": WEIGHT,
    "objective.intra_weight": WEIGHT,
    "objective.consistency_weight": WEIGHT,
    "objective.cross_kl_weight": WEIGHT,
    "objective.image_weight": WEIGHT,
    "objective.caption_weight": WEIGHT,
    "objective.intra_kl_weight": WEIGHT,
    "objective.rank_weight": WEIGHT,
    "objective.g2l_weight": WEIGHT,
    "objective.false_negative_threshold": SHARE,
    "objective.kl_student_temperature": TEMPERATURE,
    "objective.kl_teacher_temperature": TEMPERATURE,
    "objective.rank_teacher_temperature": TEMPERATURE,
    "objective.listmle_eps": SHARE,
    "batch.global_size": COUNT,
    "batch.micro_size": COUNT_OR_OFF,
    "optim.lr": Range(1e-12, 1e3),
    "optim.embedding_lr": Range(0, 1e3),
    "optim.weight_decay": Range(0, 1e3),
    "optim.betas": Range(0, 1, open_high=True),
    "optim.eps": Range(1e-30, 1),  # float32 would make less of it 0, and 0 / 0 of an unused weight
    "optim.clip": Range(0, 1e9),
    "optim.steps": COUNT_OR_OFF,
    "optim.epochs": Range(0, 10**6, open_low=True),
    "optim.warmup": COUNT_OR_OFF,
    "engine.timeout_minutes": Range(0.05, YEAR),
    "engine.threads": Range(0, 1024),
    "eval.every": COUNT_OR_OFF,
    "eval.batch_size": Range(1, WIDE),
    "save.every_steps": COUNT_OR_OFF,
    "save.every_minutes": MINUTES_OR_OFF,
    "save.keep": Range(2, MANY),
    "log.every": COUNT,
}


def check_ranges(config: Config) -> None:
    """Refuses the first number of a configuration that is out of its range.

    Raises:
        UserError: naming the key, the value and the range.
    """
    for name, value in _numbers(config):
        for number in value if isinstance(value, tuple) else (value,):
            if number not in RANGES[name]:
                raise UserError(
                    f"{name} = {shown(number)} is out of range: it must be {RANGES[name]}"
                )


def check_arithmetic(batch: BatchConfig, world_size: int) -> int:
    """Rows of the global batch on each rank.

    Raises:
        UserError: one line with the numbers of an impossible share.
    """
    size, micro = batch.global_size, batch.micro_size
    if size < 2:
        raise UserError(f"batch.global_size = {size}: a contrastive loss needs at least 2 rows")
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


def _numbers(config: Config) -> Iterator[tuple[str, float | tuple[float, ...]]]:
    """The values of all keys that have a range."""
    for section in dataclasses.fields(config):
        entries = getattr(config, section.name)
        for entry in dataclasses.fields(entries):
            name = f"{section.name}.{entry.name}"
            if name in RANGES:
                yield name, cast("float | tuple[float, ...]", getattr(entries, entry.name))
