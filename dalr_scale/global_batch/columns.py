"""Columns of the global batch, gathered in the background while the encoders run.

Teacher features start first, since they do not depend on the student; the student's columns
follow chunk by chunk. Ranks encode their rows in an order of their own (by length); the pieces
are put in their places on arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dalr_scale.distributed.collectives import column_group

# Small enough that the encoder's own collectives are not held up, large enough for the wire.
PIECE_BYTES = 16 * 2**20


@dataclass
class _Piece:
    name: str
    start: int
    stop: int
    ordered: bool
    values: Tensor
    work: dist.Work


class ColumnGather:
    """The gather of one step. All ranks add the same names in the same order.

    Args:
        order: [b] int64, the rows of this rank in the order in which they are encoded.
    """

    def __init__(self, order: Tensor) -> None:
        self._ranks, self._rows = dist.get_world_size(), len(order)
        self._columns: dict[str, Tensor] = {}
        self._pieces: list[_Piece] = []
        self._orders: Tensor | None = None
        self._start("order", order, 0, self._rows, ordered=False)

    def add(self, name: str, rows: Tensor) -> None:
        """Starts to gather all rows [b, ...] of this rank, in their natural order."""
        bytes_per_row = max(rows[:1].numel() * rows.element_size() * self._ranks, 1)
        step = max(1, PIECE_BYTES // bytes_per_row)
        for start in range(0, self._rows, step):
            stop = min(start + step, self._rows)
            self._start(name, rows[start:stop], start, stop, ordered=False)

    def add_chunk(self, columns: dict[str, Tensor], chunk: slice) -> None:
        """Starts to gather the rows that this rank encodes at ``order[chunk]``."""
        for name, rows in columns.items():
            self._start(name, rows, chunk.start, chunk.stop, ordered=True)
        self._land(only_completed=True)

    def settle(self) -> None:
        """Before collectives of another process group: lands all pieces, where NCCL needs that.

        Kernels of two NCCL communicators that run at the same time may each hold what the other
        needs (see "safe concurrent usage" of ``torch.distributed.new_group``).
        """
        if self._pieces and self._pieces[0].values.is_cuda:
            self._land(only_completed=False)

    def wait(self) -> dict[str, Tensor]:
        """All columns by name, [W * b, ...], rows in the order of the global batch."""
        self._land(only_completed=False)
        return self._columns

    def _start(self, name: str, rows: Tensor, start: int, stop: int, *, ordered: bool) -> None:
        local = rows.detach().contiguous()
        shape = self._ranks, *local.shape
        values = torch.empty(shape, dtype=local.dtype, device=local.device)
        work = dist.all_gather_into_tensor(
            values.flatten(0, 1), local, group=column_group(), async_op=True
        )
        assert work is not None
        self._pieces.append(_Piece(name, start, stop, ordered, values, work))

    def _land(self, *, only_completed: bool) -> None:
        """Moves pieces into their columns and frees them, first come first served."""
        while self._pieces and not (only_completed and not self._pieces[0].work.is_completed()):
            piece = self._pieces.pop(0)
            piece.work.wait()
            self._place(piece)

    def _place(self, piece: _Piece) -> None:
        if piece.name == "order":
            first = torch.arange(self._ranks, device=piece.values.device) * self._rows
            self._orders = piece.values + first[:, None]
            return
        shape = self._ranks * self._rows, *piece.values.shape[2:]
        if piece.name not in self._columns:
            self._columns[piece.name] = piece.values.new_empty(shape)
        column = self._columns[piece.name]
        if piece.ordered:
            assert self._orders is not None
            places = self._orders[:, piece.start : piece.stop].flatten()
            column[places] = piece.values.flatten(0, 1)
        else:
            by_rank = column.view(self._ranks, self._rows, *piece.values.shape[2:])
            by_rank[:, piece.start : piece.stop] = piece.values
