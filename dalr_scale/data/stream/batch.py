"""One rank's rows of a step, from the loader to the loss, and how a worker process sends them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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
        features: frozen features [b, dim] by role: ``image``, ``caption``, ``text0`` ... The loader
            gives the stored ones in float32; online teachers add the others.
        token_features: features of the teachers' tokens, [b, T, dim], with
        token_masks: [b, T]: from the loader the stored set, if the run has one; completed, one for
            each token teacher.
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
    token_features: Sequence[Tensor] = ()
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
        roles = map("text{}".format, itertools.count())
        return [self.features[r] for r in itertools.takewhile(self.features.__contains__, roles)]

    def take(self, rows: Tensor, length: int | None = None) -> Batch:
        """Return what encoder and heads read of some rows: no features that only the loss reads.

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
            token_features=(),
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
    *("token_features", "token_masks", "images"),
)


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
