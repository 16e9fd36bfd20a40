"""Where a rank's rows stand in a global batch, and the chunks in which it encodes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dalr_scale.distributed.collectives import Share, several_ranks


@dataclass(frozen=True)
class Place:
    """One rank's place in one step.

    Attributes:
        step, rank, seed: what everything random is keyed by.
        rows: rows that each rank holds.
        global_rows: real rows of the global batch; what the ranks hold beyond them repeats its last
            row (``dalr_scale.distributed.collectives``). None: all rows are real.
    """

    step: int
    rank: int
    seed: int
    rows: int
    global_rows: int | None = None

    @classmethod
    def here(cls, step: int, seed: int, rows: int, global_rows: int | None = None) -> Place:
        """The place of this process."""
        return cls(step, dist.get_rank() if several_ranks() else 0, seed, rows, global_rows)

    @property
    def first(self) -> int:
        """This rank's first row in the global batch."""
        return self.rank * self.rows

    @property
    def share(self) -> Share:
        """Which of this rank's rows are real, and what they weigh."""
        return Share.of(self.rows, self.first, self.global_rows)


@dataclass(frozen=True)
class Chunk:
    """Rows that a rank encodes together.

    Attributes:
        number: of the chunk on this rank.
        rows: [n] int64, row numbers within this rank's batch, on the engine's device.
        slots: which part of the order of encoding they are.
        length: tokens of the longest row; None where nothing is known of lengths.
        place: of this rank in the step.
    """

    number: int
    rows: Tensor
    slots: slice
    length: int | None
    place: Place

    @property
    def key(self) -> tuple[int, int, int, int]:
        """(seed, step, rank, number): the same whenever this chunk is encoded, and in no other."""
        return self.place.seed, self.place.step, self.place.rank, self.number


def cut(
    place: Place, size: int, lengths: Tensor | None, device: torch.device, *, sort: bool
) -> tuple[Tensor, list[Chunk]]:
    """Cuts this rank's rows into chunks.

    Args:
        place: of this rank.
        size: rows of a chunk; 0: all rows in one.
        lengths: [b] int64, tokens of each row, best on the CPU: to ask a GPU for a number is to
            wait until it has caught up.
        device: of the rows' numbers.
        sort: cut the chunks from the rows sorted by length, so that less padding is encoded.

    Returns:
        The order in which the rows are encoded, [b] int64, and its pieces.
    """
    size = size or place.rows
    slots = [slice(s, min(s + size, place.rows)) for s in range(0, place.rows, size)]
    order = torch.arange(place.rows)
    longest: list[int | None] = [None] * len(slots)
    if lengths is not None:
        lengths = lengths.cpu() if lengths.is_cuda else lengths
        if sort and len(slots) > 1:
            # longest first: a chunk that does not fit the memory shows at once
            order = torch.sort(lengths, descending=True, stable=True).indices
        ordered = lengths[order].numpy()
        longest = [max(1, int(ordered[own].max())) for own in slots]
    order = order.to(device, non_blocking=True)
    pieces = zip(slots, longest, strict=True)
    return order, [Chunk(i, order[own], own, long, place) for i, (own, long) in enumerate(pieces)]
