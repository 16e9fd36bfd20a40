"""The position of a run and what its continuation must agree on; stored in every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, TypeGuard, cast

if TYPE_CHECKING:
    from dalr_scale.run.files import JsonValue

STATE_SCHEMA = 1


@dataclass(frozen=True)
class StreamState:
    """Position in one data stream, counted in full global batches."""

    epoch: int
    batches_done: int


def _no_items() -> dict[str, Sequence[int]]:
    return {}


@dataclass(frozen=True)
class RunState:
    """Everything besides tensors that a resumed run must agree on.

    The order of the data is a pure function of seed and step, so the stream counters follow from
    `step`; they are stored to be checked, not to be trusted. The number of ranks is not part of it.

    Attributes:
        order_version: version of the order function; another version is another order.
        step: optimizer steps done (applied or deliberately skipped).
        streams: stream name to position.
        global_batch: items of a global batch, over all ranks.
        tail_rule: treatment of the incomplete last batch of an epoch.
        dataset_fingerprint: identity of the shards.
        best_score: best dev score so far, None before the first evaluation.
        bad_items: stream name to the numbers of items that could not be used.

    Raises:
        ValueError: a field has the wrong type or range; it may come from a damaged file.
    """

    order_version: int
    seed: int
    step: int
    streams: Mapping[str, StreamState]
    global_batch: int
    tail_rule: str
    dataset_fingerprint: str
    best_score: float | None = None
    best_step: int | None = None
    bad_items: Mapping[str, Sequence[int]] = field(default_factory=_no_items)
    schema: int = STATE_SCHEMA

    def __post_init__(self) -> None:
        for name in ("schema", "order_version", "seed", "step", "global_batch"):
            _require(is_count(getattr(self, name)), name, "an integer >= 0", getattr(self, name))
        _require(self.schema == STATE_SCHEMA, "schema", str(STATE_SCHEMA), self.schema)
        _require(self.global_batch >= 1, "global_batch", ">= 1", self.global_batch)
        for name in ("tail_rule", "dataset_fingerprint"):
            _require(isinstance(getattr(self, name), str), name, "text", getattr(self, name))
        for name, stream in self.streams.items():
            good = is_count(stream.epoch) and is_count(stream.batches_done)
            _require(good, f"streams.{name}", "two integers >= 0", stream)
        good = self.best_score is None or _is_finite(self.best_score)
        _require(good, "best_score", "a finite number or null", self.best_score)
        good = self.best_step is None or is_count(self.best_step)
        _require(good, "best_step", "an integer >= 0 or null", self.best_step)
        _require(_is_table(self.bad_items), "bad_items", "a table", self.bad_items)
        for name, numbers in self.bad_items.items():
            _require(_are_counts(numbers), f"bad_items.{name}", "integers >= 0", numbers)

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values only; `from_json` gives an equal state back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: object) -> RunState:
        """Rebuild a state.

        Raises:
            ValueError: for a missing, unknown or malformed field, naming it.
        """
        if not _is_table(plain):
            raise _malformed("state", "a table", plain)
        names = {entry.name for entry in dataclasses.fields(cls)}
        different = sorted(names.symmetric_difference(plain))
        _require(not different, "state", "exactly the known fields", different)
        # __post_init__ checks the values
        fields = cast("_Fields", {**plain, "streams": _streams(plain["streams"])})
        return cls(**fields)


class _Fields(TypedDict):
    order_version: int
    seed: int
    step: int
    streams: Mapping[str, StreamState]
    global_batch: int
    tail_rule: str
    dataset_fingerprint: str
    best_score: float | None
    best_step: int | None
    bad_items: Mapping[str, Sequence[int]]
    schema: int


def _streams(plain: object) -> dict[str, StreamState]:
    if not _is_table(plain):
        raise _malformed("streams", "a table", plain)
    rebuilt: dict[str, StreamState] = {}
    for name, stream in plain.items():
        if not _is_table(stream) or set(stream) != {"epoch", "batches_done"}:
            raise _malformed(f"streams.{name}", "epoch and batches_done", stream)
        position = cast("dict[str, int]", stream)  # RunState checks that these are counts
        rebuilt[name] = StreamState(position["epoch"], position["batches_done"])
    return rebuilt


def is_count(value: object) -> TypeGuard[int]:
    """An integer of at least 0, no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_counts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(map(is_count, cast("list[object]", values)))


def _is_table(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


def _require(good: bool, name: str, wanted: str, value: object) -> None:
    if not good:
        raise _malformed(name, wanted, value)


def _malformed(name: str, wanted: str, value: object) -> ValueError:
    return ValueError(f"run state: {name} must be {wanted}, not {value!r}")
