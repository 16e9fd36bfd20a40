"""Which items make up the batch of a step: a pure function of the seed and the step.

Nothing here knows ranks, workers, clocks or process state. The whole position of a run is its step
number, so resuming costs one permutation however far the run has come, and the same seed gives the
same global batches at any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np

from dalr_scale.errors import UserError

ORDER_VERSION = 1  # raise it whenever the same seed would give another order

Kind = Literal["text", "pair"]
Alternation = Literal["proportional", "reference"]
Tail = Literal["drop", "keep"]


def epoch_order(seed: int, epoch: int, num_items: int, *, stream: str) -> np.ndarray:
    """Return the item numbers of one pass over a stream in the order they are used.

    The random bits come straight from the Philox bit generator, whose output numpy guarantees to
    keep; ``Generator.permutation`` may change between numpy releases. Each word carries the item
    number in its low bits, so that sorting it in place gives the permutation, needs 8 bytes an
    item, and has no ties whose order could depend on the sorting routine.

    Args:
        seed: seed of the run.
        epoch: number of the pass, from 0.
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
    words |= np.arange(num_items, dtype=np.uint64)
    words.sort()
    words &= np.uint64(low_bits)
    order = words.view(np.int64)
    order.flags.writeable = False
    return order


# Two streams, the current pass and the next one.
_cached_order = lru_cache(maxsize=4)(epoch_order)


def exact_fraction(value: float | str | Fraction) -> Fraction:
    """Turn a configured fraction into an exact one: 0.1 means 1/10, and ``"1/3"`` is allowed."""
    try:
        fraction = value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"pair fraction {value!r} is not a number between 0 and 1") from None
    if not 0 <= fraction <= 1:
        raise UserError(f"pair fraction {value!r} is not between 0 and 1")
    return fraction


@dataclass(frozen=True)
class StreamPlan:
    """The alternation of text-only and paired batches, and the items of each batch.

    Every step is entirely text or entirely pairs. ``proportional`` gives the pair stream its share
    of the steps, N_pair / (N_text + N_pair) or ``pair_fraction``, spread evenly in integer
    arithmetic. ``reference`` is the published rule: within an epoch of N_text + N_pair steps, step
    n is paired when n mod k = 0 with k = max(1, floor(N_text / N_pair)); streams never end, so
    pairs are passed more than once an epoch, and with N_text < 2 N_pair (k = 1) text is never used.

    Attributes:
        seed: seed of both streams' orders.
        global_batch: items of one step over all ranks.
        text_items: items of the text stream; 0 when there is none.
        pair_items: items of the pair stream; 0 when there is none.
        alternation: see above.
        pair_fraction: share of paired steps (``proportional`` only); None means N_pair's share.
        tail: what happens to the last, shorter batch of a pass. ``drop`` leaves it out, ``keep``
            uses it when it has two items or more (one process only).
    """

    seed: int
    global_batch: int
    text_items: int = 0
    pair_items: int = 0
    alternation: Alternation = "proportional"
    pair_fraction: Fraction | None = None
    tail: Tail = "drop"

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

    def _check_fraction(self) -> None:
        """A configured fraction must not ask for a stream that is not there."""
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
        """Batches in one pass over the text stream."""
        return self._batches(self.text_items)

    @property
    def n_pair(self) -> int:
        """Batches in one pass over the pair stream."""
        return self._batches(self.pair_items)

    @property
    def steps_per_epoch(self) -> int:
        """N_text + N_pair, whatever the alternation and the fraction."""
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
        """Return (stream, pass over it, batch within the pass) of a step."""
        kind = self.kind(step)
        text, pair = self.batches_before(step)
        per_pass = self.n_text if kind == "text" else self.n_pair
        return (kind, *divmod(text if kind == "text" else pair, per_pass))

    def batch_ids(self, step: int) -> np.ndarray:
        """Return the global batch of a step: int64 item numbers [global_batch] of its stream.

        Rank r of W takes rows ``r * b ... (r + 1) * b - 1`` with b = global_batch / W. The batch
        is shorter only for the last batch of a pass under ``tail="keep"``.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        kind, epoch, batch = self.position(step)
        items = self.text_items if kind == "text" else self.pair_items
        order = _cached_order(self.seed, epoch, items, stream=kind)
        return order[batch * self.global_batch : (batch + 1) * self.global_batch]
