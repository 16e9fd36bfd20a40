"""The items of each step's batch: a pure function of the seed and the step.

Nothing here depends on ranks, workers, clocks or process state. The position of a run is its step
number: a resume computes one permutation, regardless of the step, and the same seed gives the same
global batches at any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

ORDER_VERSION = 1  # raise it whenever the same seed would give another order

Kind = Literal["text", "pair"]
Alternation = Literal["proportional", "reference"]
Tail = Literal["drop", "keep"]

MAX_REPLACEMENTS = 8  # eight unusable replacements in a row are no accident
_CHUNK = 1 << 22


def epoch_order(seed: int, epoch: int, num_items: int, *, stream: str) -> np.ndarray:
    """Return the item numbers of one epoch of a stream in the order they are used.

    The random bits come from the Philox bit generator, whose output numpy keeps stable;
    ``Generator.permutation`` may change between numpy releases. Each word holds the item number in
    its low bits, so that sorting the words in place gives the permutation. This needs 8 bytes per
    item and has no ties whose order could depend on the sorting algorithm.

    Args:
        seed: seed of the run.
        epoch: number of the epoch of this stream, from 0.
        num_items: length of the permutation.
        stream: name of the stream; two streams with equal lengths are ordered differently.

    Returns:
        int64 [num_items], read-only.
    """
    if num_items < 0 or epoch < 0:
        raise ValueError(f"num_items ({num_items}) and epoch ({epoch}) must not be negative")
    text = f"dalr-order {ORDER_VERSION} {stream} {seed} {epoch}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    low_bits = (1 << max(num_items - 1, 0).bit_length()) - 1
    words = np.random.Philox(key=key).random_raw(num_items)
    words &= np.uint64(~low_bits & 0xFFFFFFFFFFFFFFFF)
    for start in range(0, num_items, _CHUNK):  # one arange of all items would double the memory
        stop = min(start + _CHUNK, num_items)
        words[start:stop] |= np.arange(start, stop, dtype=np.uint64)
    words.sort()
    words &= np.uint64(low_bits)
    order = words.view(np.int64)
    order.flags.writeable = False
    return order


_latest: dict[tuple[int, int, str], tuple[int, np.ndarray]] = {}


def _cached_order(seed: int, epoch: int, num_items: int, *, stream: str) -> np.ndarray:
    """``epoch_order`` with a cache of the last epoch of each stream: steps only increase."""
    key = (seed, num_items, stream)
    if key not in _latest or _latest[key][0] != epoch:
        _latest.pop(key, None)  # first, because two orders need twice the memory
        _latest[key] = epoch, epoch_order(seed, epoch, num_items, stream=stream)
    return _latest[key][1]


def exact_fraction(value: float | str | Fraction) -> Fraction:
    """Turn a configured fraction into an exact one: 0.1 means 1/10, and ``"1/3"`` is allowed."""
    try:
        fraction = value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"pair fraction {value!r} is not a number between 0 and 1") from None
    if not 0 <= fraction <= 1:
        raise UserError(f"pair fraction {value!r} is not between 0 and 1")
    return fraction


def rank_rows(rows: int, rank: int, world_size: int) -> np.ndarray:
    """Return which rows of a global batch a rank takes: int64 [c], c = ceil(rows / world_size).

    Every rank takes the same number of rows, in order. If the batch cannot be divided equally,
    positions past its end repeat its last row.
    """
    own = -(-rows // world_size)
    return np.minimum(np.arange(rank * own, (rank + 1) * own), rows - 1)


@dataclass(frozen=True)
class Part:
    """A weighted part of a stream: its items, and the rows of each batch that come from it."""

    items: int
    rows: int


def share_rows(global_batch: int, weights: Sequence[float]) -> list[int]:
    """Cut the rows of a batch by weight, to whole rows (largest remainder).

    Raises:
        UserError: a weight is not positive, or a part would get no row.
    """
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"weights {list(weights)}: each must be a number above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    wanted = [global_batch * weight / sum(exact) for weight in exact]
    rows = [int(share) for share in wanted]
    by_rest = sorted(range(len(rows)), key=lambda n: (rows[n] - wanted[n], n))
    for number in by_rest[: global_batch - sum(rows)]:
        rows[number] += 1
    if min(rows) < 1:
        raise UserError(
            f"weights {list(weights)} leave a source without a row in a batch of {global_batch}; "
            "enlarge the batch, or the smallest weight"
        )
    return rows


@dataclass(frozen=True)
class StreamPlan:
    """The alternation of text-only and paired batches, and the items of each batch.

    The batch of a step comes from one stream. ``proportional`` gives the pair stream its share of
    the steps, N_pair / (N_text + N_pair) or ``pair_fraction``, spread evenly in integer arithmetic.
    ``reference`` is the published rule: within an epoch of N_text + N_pair steps, step n is paired
    when n mod k = 0 with k = max(1, floor(N_text / N_pair)). Streams repeat, so pairs are used
    more than once in an epoch, and with N_text < 2 N_pair (k = 1) text is never used.

    Attributes:
        seed: seed of both streams' orders.
        global_batch: items of one step over all ranks.
        text_items: items of the text stream; 0 when there is none.
        pair_items: items of the pair stream; 0 when there is none.
        alternation: see above.
        pair_fraction: share of paired steps (``proportional`` only); None means N_pair's share.
        tail: what happens to the last, shorter batch of an epoch. ``drop`` leaves it out, ``keep``
            uses it when it has two items or more.
        text_parts, pair_parts: weighted parts of the streams, numbered one after the other; empty:
            one part. Every batch takes the same number of rows from each part, and each part has
            its own epochs, whose tails are dropped.
    """

    seed: int
    global_batch: int
    text_items: int = 0
    pair_items: int = 0
    alternation: Alternation = "proportional"
    pair_fraction: Fraction | None = None
    tail: Tail = "drop"
    text_parts: tuple[Part, ...] = ()
    pair_parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UserError(f"the global batch is {self.global_batch}; it must be at least 1")
        if self.alternation not in ("proportional", "reference"):
            raise UserError(f"alternation {self.alternation!r} is not proportional or reference")
        if self.tail not in ("drop", "keep"):
            raise UserError(f"tail {self.tail!r} is not drop or keep")
        if self.pair_fraction is not None:
            object.__setattr__(self, "pair_fraction", exact_fraction(self.pair_fraction))
            if self.alternation == "reference":
                raise UserError("a pair fraction cannot be set with the reference alternation")
        if not self.text_items and not self.pair_items:
            raise UserError("there is neither a text nor a pair stream; name shards for one")
        for kind, items in (("text", self.text_items), ("pair", self.pair_items)):
            if items and not self._batches(items):
                raise UserError(
                    f"the {kind} stream has {items} items, fewer than one global batch of "
                    f"{self.global_batch}; lower the global batch or add shards"
                )
        self._check_fraction()
        for kind in ("text", "pair"):
            self._check_parts(kind)

    def _check_parts(self, kind: Kind) -> None:
        parts = self.text_parts if kind == "text" else self.pair_parts
        if not parts:
            return
        items = self.text_items if kind == "text" else self.pair_items
        if sum(p.items for p in parts) != items or sum(p.rows for p in parts) != self.global_batch:
            raise ValueError(
                f"parts {parts} do not add up to {items} items, {self.global_batch} rows"
            )
        if self.tail == "keep":
            raise UserError(
                "a shorter last batch cannot be kept of weighted sources; set objective.tail=drop"
            )
        for number, part in enumerate(parts):
            if part.items < part.rows:
                raise UserError(
                    f"source {number + 1} of the {kind} stream has {part.items} items, fewer than "
                    f"the {part.rows} rows that each batch takes from it; lower its weight"
                )

    def _check_fraction(self) -> None:
        """Refuse a configured fraction that needs a missing stream."""
        fraction = self._fraction
        if fraction > 0 and not self.pair_items:
            raise UserError(f"the pair fraction is {fraction} but there is no pair stream")
        if fraction < 1 and not self.text_items:
            raise UserError(f"the pair fraction is {fraction} but there is no text stream")

    def _batches(self, items: int) -> int:
        full, rest = divmod(items, self.global_batch)
        return full + (1 if self.tail == "keep" and rest >= 2 else 0)

    @property
    def n_text(self) -> int:
        """Batches in one epoch of the text stream."""
        return self._batches(self.text_items)

    @property
    def n_pair(self) -> int:
        """Batches in one epoch of the pair stream."""
        return self._batches(self.pair_items)

    @property
    def steps_per_epoch(self) -> int:
        """N_text + N_pair, for any alternation and fraction."""
        return self.n_text + self.n_pair

    @property
    def _fraction(self) -> Fraction:
        if self.pair_fraction is not None:
            return self.pair_fraction
        return Fraction(self.n_pair, self.steps_per_epoch)

    @property
    def reference_period(self) -> int:
        """k: the reference alternation pairs every k-th step of an epoch."""
        return max(1, self.n_text // self.n_pair) if self.n_pair else self.steps_per_epoch + 1

    def _pairs_before(self, step: int) -> int:
        if self.alternation == "reference":
            if not self.n_pair:
                return 0
            epoch, position = divmod(step, self.steps_per_epoch)
            period = self.reference_period
            return epoch * -(-self.steps_per_epoch // period) + -(-position // period)
        fraction = self._fraction
        return step * fraction.numerator // fraction.denominator

    def kind(self, step: int) -> Kind:
        """Return which stream step ``step`` (from 0, over the whole run) takes its batch from."""
        return "pair" if self._pairs_before(step + 1) > self._pairs_before(step) else "text"

    def batches_before(self, step: int) -> tuple[int, int]:
        """Return the (text, pair) batches used by all steps before ``step``."""
        pairs = self._pairs_before(step)
        return step - pairs, pairs

    def position(self, step: int) -> tuple[Kind, int, int]:
        """Return (stream, epoch of it, batch within the epoch) of a step."""
        kind = self.kind(step)
        text, pair = self.batches_before(step)
        per_epoch = self.n_text if kind == "text" else self.n_pair
        return (kind, *divmod(text if kind == "text" else pair, per_epoch))

    def batch_ids(self, step: int) -> np.ndarray:
        """Return the global batch of a step: int64 item numbers [global_batch] of its stream.

        The batch is shorter only for the last batch of an epoch under ``tail="keep"``. Which rows a
        rank takes: ``rank_rows``.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        kind = self.kind(step)
        parts = self._parts(kind)
        if len(parts) == 1:
            return self._part_ids(kind, 0, step)
        ids = np.empty(self.global_batch, np.int64)
        layout = self._layout(kind)
        for number in range(len(parts)):
            ids[layout == number] = self._part_ids(kind, number, step)
        return ids

    def batch_rows(self, step: int) -> int:
        """Return how many items the global batch of a step has, without computing its order."""
        if self.tail == "drop":
            return self.global_batch
        kind, _, batch = self.position(step)
        items = self.text_items if kind == "text" else self.pair_items
        return min(self.global_batch, items - batch * self.global_batch)

    def prepare(self, step: int) -> None:
        """Create the orders of both streams' current epochs, so that forked workers share them."""
        first = {self.kind(step): step}
        other = step + 1
        while len(first) < bool(self.n_text) + bool(self.n_pair) and other < step + 1000:
            first.setdefault(self.kind(other), other)
            other += 1
        for number in first.values():
            self.batch_ids(number)

    def _part_ids(self, kind: Kind, number: int, step: int) -> np.ndarray:
        epoch, batch = self._part_position(kind, number, step)
        rows = self._parts(kind)[number].rows
        order = self._part_order(kind, number, epoch)
        return order[batch * rows : (batch + 1) * rows] + self._part_start(kind, number)

    def _part_order(self, kind: Kind, number: int, epoch: int) -> np.ndarray:
        parts = self._parts(kind)
        name = kind if len(parts) == 1 else f"{kind}[{number}]"
        return _cached_order(self.seed, epoch, parts[number].items, stream=name)

    def _part_start(self, kind: Kind, number: int) -> int:
        return sum(part.items for part in self._parts(kind)[:number])

    def _part_position(self, kind: Kind, number: int, step: int) -> tuple[int, int]:
        """Return (epoch of the part, batch within it) of a step of this kind."""
        parts = self._parts(kind)
        if len(parts) == 1:
            return self.position(step)[1:]
        text, pair = self.batches_before(step)
        done = text if kind == "text" else pair
        return divmod(done, parts[number].items // parts[number].rows)

    def _parts(self, kind: Kind) -> tuple[Part, ...]:
        if kind == "text":
            return self.text_parts or (Part(self.text_items, self.global_batch),)
        return self.pair_parts or (Part(self.pair_items, self.global_batch),)

    def _layout(self, kind: Kind) -> np.ndarray:
        return self._layouts[kind]

    @cached_property
    def _layouts(self) -> dict[Kind, np.ndarray]:
        """Part of each row of a batch, by kind: evenly mixed, so that every rank gets its share."""
        layouts: dict[Kind, np.ndarray] = {}
        kinds: tuple[Kind, Kind] = ("text", "pair")
        for kind in kinds:
            rows = [part.rows for part in self._parts(kind)]
            part = np.repeat(np.arange(len(rows)), rows)
            place = np.concatenate([(np.arange(n) + 0.5) / n for n in rows])
            layouts[kind] = part[np.argsort(place, kind="stable")]
        return layouts

    def sources_before(self, step: int) -> dict[str, tuple[int, int]]:
        """Return (epochs, batches of the current epoch) of every source, before ``step``.

        Streams with parts have an entry for each, ``pair[0]``, ``pair[1]`` ...
        """
        text, pair = self.batches_before(step)
        found: dict[str, tuple[int, int]] = {}
        for kind, done, per_epoch, parts in (
            ("text", text, self.n_text, self.text_parts),
            ("pair", pair, self.n_pair, self.pair_parts),
        ):
            if per_epoch:
                found[kind] = divmod(done, per_epoch)
            for number, part in enumerate(parts):
                found[f"{kind}[{number}]"] = divmod(done, part.items // part.rows)
        return found

    def num_replacements(self, kind: Kind) -> int:
        """Return how many replacements a bad row may try."""
        shortest = min(part.items // part.rows for part in self._parts(kind))
        return min(shortest - 1, MAX_REPLACEMENTS)

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """Return the item that replaces a bad row: the same row, some batches later.

        It is never an item of the batch itself, and no other bad row of the batch gets the same
        one. It depends on the order only, so that all ranks and resumes agree on it.

        Args:
            step: the step.
            row: row of the global batch.
            attempt: 1 for the first replacement, up to ``num_replacements``.
        """
        kind = self.kind(step)
        layout = self._layout(kind)
        number = int(layout[row])
        part = self._parts(kind)[number]
        epoch, batch = self._part_position(kind, number, step)
        place = int((layout[:row] == number).sum()) + (batch + attempt) * part.rows
        place %= part.items // part.rows * part.rows
        order = self._part_order(kind, number, epoch)
        return int(order[place]) + self._part_start(kind, number)
