"""One rank's rows of a step, from the loader to the loss, and how a worker process sends them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

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
        features: frozen features [b, dim] by role: ``image``, ``caption``, ``text0`` ... The loader
            gives the stored ones in float32; online teachers fill in the others.
        tokens: token features [b, T, dim] with
        token_masks: [b, T]: of the loader the stored set, if the run has one; completed, one for
            each token teacher.
        images: [b, 3, H, W] as the image transform gives them, or None.
        bad: rows that could not be used, each with its item number and what was wrong with it;
            another item stands in their place (``StreamPlan.substitute``).
    """

    step: int
    kind: Kind
    item_ids: Tensor
    sentences: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    features: dict[str, Tensor]
    tokens: Sequence[Tensor] = ()
    token_masks: Sequence[Tensor] = ()
    images: Tensor | None = None
    bad: tuple[BadRow, ...] = ()

    @property
    def rows(self) -> int:
        """Return the rows of this rank."""
        return len(self.input_ids)

    @property
    def paired(self) -> bool:
        """Return whether this is a batch of captions, whatever features the objective reads."""
        return self.kind == "pair"

    @property
    def image(self) -> Tensor | None:
        """Return the features of the images."""
        return self.features.get("image")

    @property
    def caption(self) -> Tensor | None:
        """Return the features of the captions in the space of the images."""
        return self.features.get("caption")

    @property
    def text(self) -> list[Tensor]:
        """Return the sentence teachers' features, in the teachers' order."""
        roles = itertools.takewhile(
            self.features.__contains__, map("text{}".format, itertools.count())
        )
        return [self.features[role] for role in roles]

    def take(self, rows: Tensor, length: int | None = None) -> Batch:
        """Return what encoder and heads read of some rows: not text and tokens of teachers.

        Args:
            rows: int64, numbers of rows of this batch, on its device.
            length: positions kept of the token ids; None: all.
        """
        read = {role: self.features[role] for role in ("image", "caption") if role in self.features}
        return replace(
            self,
            item_ids=self.item_ids[rows],
            sentences=[],
            input_ids=self.input_ids[rows, :length],
            attention_mask=self.attention_mask[rows, :length],
            image_ids=self.image_ids[rows],
            features={role: values[rows] for role, values in read.items()},
            tokens=(),
            token_masks=(),
            images=None,
        )

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with every tensor replaced by ``change(tensor)``."""
        return replace(
            self, **{name: tree_map_only(Tensor, change, vars(self)[name]) for name in _TENSORS}
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device; the copy does not block when the batch is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (the name ``DataLoader`` looks for)."""
        return self.map_tensors(Tensor.pin_memory)


_TENSORS = (
    *("item_ids", "input_ids", "attention_mask", "image_ids", "features"),
    *("tokens", "token_masks", "images"),
)


@dataclass
class PackedBatch:
    """A batch whose tensors lie in one block of shared memory.

    Every tensor that a worker sends costs the receiver a connection to that worker, and so a wait
    until it is scheduled: with ten of them a training step on a busy host waited 2 % of its time.

    Attributes:
        buffer: uint8 [bytes].
        slots: offset in bytes, dtype and shape of every tensor, in the order of
        layout: the batch's fields with tensors, as ``torch.utils._pytree`` describes them.
        rest: the fields that hold no tensors.
    """

    buffer: Tensor
    slots: list[tuple[int, torch.dtype, torch.Size]]
    layout: TreeSpec
    rest: dict[str, Any]

    def unpack(self) -> Batch:
        """Return the batch; its tensors share the buffer's memory."""
        tensors = []
        for offset, dtype, shape in self.slots:
            size = shape.numel() * dtype.itemsize
            tensors.append(self.buffer[offset : offset + size].view(dtype).view(shape))
        return Batch(**tree_unflatten(tensors, self.layout), **self.rest)

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory (the name ``DataLoader`` looks for)."""
        return replace(self, buffer=self.buffer.pin_memory())


def pack(batch: Any) -> Any:
    """Return a ``Batch`` as a ``PackedBatch``, and anything else (an error) as it is."""
    if not isinstance(batch, Batch):
        return batch
    fields = dict(vars(batch))
    held = {name: fields.pop(name) for name in _TENSORS if fields[name] is not None}
    tensors, layout = tree_flatten(held)
    slots, end = [], 0
    for tensor in tensors:
        slots.append((end, tensor.dtype, tensor.shape))
        end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    packed = PackedBatch(_shared(end), slots, layout, fields)
    copies = packed.unpack()
    places = tree_leaves({name: vars(copies)[name] for name in held})
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    return packed


def _shared(size: int) -> Tensor:
    """Return uint8 [size] in shared memory; ``share_memory_`` would copy what is not there yet."""
    storage = torch.UntypedStorage._new_shared(size)  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage)
