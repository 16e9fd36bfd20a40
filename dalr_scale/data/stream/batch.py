"""One rank's rows of a step, and the form in which a worker process sends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalr_scale.data.stream.order import Kind

_ALIGN = 64  # bytes; any dtype may start there


class BadRow(NamedTuple):
    """An item that could not be used, and why, in words that name shard and sample."""

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
        sentences: b strings; empty where nothing reads them.
        input_ids: int64 [b, L].
        attention_mask: int64 [b, L].
        image_ids: int64 [b]; -1 where there is no image.
        features: by role, float32 [b, dim].
        tokens: float32 [b, T, dim] or None.
        token_mask: bool [b, T] or None.
        images: [b, 3, H, W] as the image transform gives them, or None.
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
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    images: Tensor | None = None
    bad: tuple[BadRow, ...] = ()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with every tensor replaced by ``change(tensor)``."""
        changed: dict[str, Any] = {
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
    """A batch whose tensors lie in one block of shared memory.

    Every tensor that a worker sends costs the receiver a connection to that worker, and so a wait
    until it is scheduled: with ten of them a training step on a busy host waited 2 % of its time.

    Attributes:
        buffer: uint8 [bytes].
        slots: field, or (``features``, role) -> offset in bytes, dtype and shape.
        rest: the fields that are no tensors.
    """

    buffer: Tensor
    slots: dict[tuple[str, str], tuple[int, torch.dtype, torch.Size]]
    rest: dict[str, Any]

    def unpack(self) -> Batch:
        """Return the batch; its tensors share the buffer's memory."""
        fields: dict[str, Any] = {**self.rest, "features": {}}
        for (name, role), (offset, dtype, shape) in self.slots.items():
            size = shape.numel() * dtype.itemsize
            tensor = self.buffer[offset : offset + size].view(dtype).view(shape)
            if role:
                fields["features"][role] = tensor
            else:
                fields[name] = tensor
        return Batch(**fields)

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory (the name ``DataLoader`` looks for)."""
        return replace(self, buffer=self.buffer.pin_memory())


def pack(batch: Any) -> Any:
    """Return a ``Batch`` as a ``PackedBatch``, and anything else (an error) as it is."""
    if not isinstance(batch, Batch):
        return batch
    fields = vars(batch)
    tensors = {(name, ""): value for name, value in fields.items() if isinstance(value, Tensor)}
    tensors |= {("features", role): value for role, value in batch.features.items()}
    slots, end = {}, 0
    for key, tensor in tensors.items():
        slots[key] = end, tensor.dtype, tensor.shape
        end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    left = {name: v for name, v in fields.items() if (name, "") not in tensors}
    left.pop("features")
    packed = PackedBatch(_shared(end), slots, left)
    places = packed.unpack()
    for (name, role), tensor in tensors.items():
        place = places.features[role] if role else getattr(places, name)
        place.copy_(tensor)
    return packed


def _shared(size: int) -> Tensor:
    """Return uint8 [size] in shared memory; ``share_memory_`` would copy what is not there yet."""
    storage = torch.UntypedStorage._new_shared(size)  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage)
