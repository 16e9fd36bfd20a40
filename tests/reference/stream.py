"""Which items a step takes, and what the shards hold for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dalr_scale.data.stream.order import epoch_order

if TYPE_CHECKING:
    from dalr_scale.config import Config
    from dalr_scale.data.stream.source import Source


@dataclass
class Rows:
    """The whole global batch of a step.

    ids and mask are int64 [B, L]; image_ids [B], -1 for text; features by role float64 [B, d];
    tokens float64 [B, T, d] with a bool mask [B, T], or None.
    """

    kind: str
    items: np.ndarray
    ids: Tensor
    mask: Tensor
    image_ids: Tensor
    features: dict[str, Tensor]
    tokens: tuple[Tensor, Tensor] | None


class Schedule:
    """The alternation of both streams and their batches, from the numbers of items alone."""

    def __init__(self, config: Config, text: Source | None, pairs: Source | None) -> None:
        self.config = config
        self.size = config.batch.global_size
        self.sources = {"text": text, "pair": pairs}
        weights = {"text": config.data.text_weights, "pair": config.data.pair_weights}
        self.parts = {
            kind: _parts(source, weights[kind], self.size) for kind, source in self.sources.items()
        }
        self.batches = {kind: self._batches(source) for kind, source in self.sources.items()}
        self.epoch = sum(self.batches.values())
        self.steps = config.optim.steps or math.ceil(config.optim.epochs * self.epoch)

    def _batches(self, source: Source | None) -> int:
        if source is None:
            return 0
        full, rest = divmod(source.num_items, self.size)
        return full + (self.config.objective.tail == "keep" and rest >= 2)

    def kind(self, step: int) -> str:
        fraction = self.config.data.pair_fraction
        text, pair = self.batches["text"], self.batches["pair"]
        if not pair or not text:
            return "pair" if pair else "text"
        if self.config.objective.alternation == "reference" and not fraction:
            return "pair" if step % self.epoch % max(1, text // pair) == 0 else "text"
        f = Fraction(str(fraction)) if fraction else Fraction(pair, text + pair)
        return "pair" if math.floor((step + 1) * f) > math.floor(step * f) else "text"

    def items(self, step: int) -> tuple[str, np.ndarray]:
        """Stream and item numbers of a step, in the order of the global batch."""
        kind = self.kind(step)
        done = sum(self.kind(earlier) == kind for earlier in range(step))
        parts = self.parts[kind]
        rows, places, start = [], [], 0
        for number, (count, share) in enumerate(parts):
            per_epoch = self.batches[kind] if len(parts) == 1 else count // share
            epoch, batch = divmod(done, per_epoch)
            name = kind if len(parts) == 1 else f"{kind}[{number}]"
            order = epoch_order(self.config.run.seed, epoch, count, stream=name)
            rows.append(order[batch * share : (batch + 1) * share] + start)
            places.append((np.arange(share) + 0.5) / share)
            start += count
        if len(parts) == 1:
            return kind, rows[0]
        spread = np.argsort(np.concatenate(places), kind="stable")
        return kind, np.concatenate(rows)[spread]


def _parts(source: Source | None, weights: Sequence[float], size: int) -> list[tuple[int, int]]:
    """(items, rows of a batch) of each part: whole rows by the largest remainder."""
    if source is None:
        return []
    if not weights:
        return [(source.num_items, size)]
    total = sum(Fraction(str(w)) for w in weights)
    exact = [size * Fraction(str(w)) / total for w in weights]
    rows = [math.floor(share) for share in exact]
    largest = sorted(range(len(rows)), key=lambda n: (rows[n] - exact[n], n))
    for number in largest[: size - sum(rows)]:
        rows[number] += 1
    return list(zip(source.part_items, rows, strict=True))


def read(schedule: Schedule, step: int, tokenizer: Any) -> Rows:
    kind, items = schedule.items(step)
    source = schedule.sources[kind]
    assert source is not None
    records = source.read(items, text=True)
    encoded = tokenizer(
        records.sentences,
        truncation=True,
        max_length=schedule.config.data.max_length,
        padding=True,
        return_tensors="pt",
    )
    tokens = None
    if records.token_features is not None:
        values, mask = records.token_features
        tokens = torch.from_numpy(values).double(), torch.from_numpy(mask)
    return Rows(
        kind,
        items,
        encoded["input_ids"],
        encoded["attention_mask"],
        torch.from_numpy(records.image_ids),
        {role: torch.from_numpy(rows).double() for role, rows in records.features.items()},
        tokens,
    )
