"""One rank's rows of a step, and the form in which a worker process sends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dalr_scale.data.stream.order import Kind
from dalr_scale.errors import UserError

_ALIGN = 64  # bytes; any dtype may start there


class BadRow(NamedTuple):
    """An item that could not be used, and the reason, which names shard and sample."""

    kind: Kind
    item: int
    why: str


@dataclass
class Batch:
    """The rows of one rank for one step; b rows, L tokens, T teacher tokens.

    In the last batch of an epoch the last rows may be padding (``order.rank_rows``).

    Attributes:
        step: number of the step.
        kind: ``text`` or ``pair``.
        item_ids: int64 [b], item numbers within the stream.
        sentences: b strings; empty where neither a teacher nor a tokenizer reads them.
        input_ids: int64 [b, L].
        attention_mask: int64 [b, L].
        image_ids: int64 [b]; -1 where there is no image.
        features: by role, float32 [b, dim].
        token_features: features of the teacher's tokens, float32 [b, T, dim], or None.
        token_feature_mask: bool [b, T], or None.
        images: [b, 3, H, W] as the image transform returns them, or None.
        bad: rows that could not be used, each with its item number and what was wrong with it;
            another item takes their place (``StreamPlan.replacement``).
    """

    step: int
    kind: Kind
    item_ids: Tensor
    sentences: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    features: dict[str, Tensor]
    token_features: Tensor | None = None
    token_feature_mask: Tensor | None = None
    images: Tensor | None = None
    bad: tuple[BadRow, ...] = ()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with every tensor replaced by ``change(tensor)``."""
        changed = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        features = {role: change(value) for role, value in self.features.items()}
        return replace(self, features=features, **changed)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device; the copy does not block when the batch is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (the name ``DataLoader`` looks for)."""
        return self.map_tensors(Tensor.pin_memory)


@dataclass
class PackedBatch:
    """A batch whose tensors share one block of memory.

    Every tensor that a worker sends costs the receiver a connection to that worker, and so a wait
    until it is scheduled: with ten of them a training step on a busy host waited 2 % of its time.

    Attributes:
        buffer: uint8 [bytes], the tensors one after the other, each aligned to 64 bytes.
        layout: the batch with meta tensors, which have dtype and shape and no memory.
    """

    buffer: Tensor
    layout: Batch

    def unpack(self) -> Batch:
        """Return the batch; its tensors share the buffer's memory."""
        offset = 0

        def view(meta: Tensor) -> Tensor:
            nonlocal offset
            start, size = offset, meta.numel() * meta.element_size()
            offset += _aligned(meta)
            return self.buffer[start : start + size].view(meta.dtype).view(meta.shape)

        return self.layout.map_tensors(view)

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory (the name ``DataLoader`` looks for)."""
        return replace(self, buffer=self.buffer.pin_memory())


def pack(batch: Batch | UserError) -> PackedBatch | UserError:
    """Return a ``Batch`` as a ``PackedBatch`` in shared memory, and an error unchanged."""
    if isinstance(batch, UserError):
        return batch
    tensors: list[Tensor] = []
    layout = batch.map_tensors(lambda tensor: tensors.append(tensor) or tensor.to("meta"))
    packed = PackedBatch(_shared(sum(map(_aligned, tensors))), layout)
    places = iter(tensors)
    packed.unpack().map_tensors(lambda place: place.copy_(next(places)))
    return packed


def _aligned(tensor: Tensor) -> int:
    """Return the bytes of a tensor, rounded up to the alignment."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN


def _shared(size: int) -> Tensor:
    """Return uint8 [size] in shared memory; ``share_memory_`` would copy uninitialized bytes."""
    storage = torch.UntypedStorage._new_shared(size)  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage)
