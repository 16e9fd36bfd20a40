"""What a step knows of a model: how rows are encoded, what travels, and which loss is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dalr_scale.distributed.collectives import with_gradient
from dalr_scale.global_batch.keys import seed_dropout

if TYPE_CHECKING:
    from dalr_scale.engines.protocol import AnyModule
    from dalr_scale.global_batch.chunks import Chunk, Place

B = TypeVar("B")
States: TypeAlias = dict[str, Tensor]
"""By name, [n, ...]: what the encoder makes of n rows, and all that the loss sees of it."""
Terms: TypeAlias = dict[str, Tensor]
"""Detached scalars by name, for reports."""


class Task(ABC, Generic[B]):
    """A model's part of a step over batches of type `B`. `module` is the engine's module.

    `encode`, `columns` and `loss` run inside the engine's forward, in which parameters may be used:
    sharded ones are gathered when their own module is called.
    """

    @abstractmethod
    def count(self, batch: B) -> int:
        """Rows of a rank's batch; the same on all ranks."""

    @abstractmethod
    def take(self, batch: B, chunk: Chunk) -> B:
        """The rows of a chunk, with what `encode` and `columns` read of them."""

    @abstractmethod
    def encode(self, module: AnyModule, part: B) -> States:
        """States of the rows of a chunk, with gradient."""

    @abstractmethod
    def loss(
        self,
        module: AnyModule,
        states: States,
        gathered: Mapping[str, Tensor],
        batch: B,
        place: Place,
    ) -> tuple[Tensor, Terms]:
        """The mean loss of this rank's rows, and its terms.

        Both are weighted by ``place.share.weight`` where some rows are padding.

        Args:
            module: the engine's module.
            states: of all rows of this rank.
            gathered: `columns` and `constants` of all ranks, [W * b, ...], without gradient
                (``with_gradient`` gives it to them); empty on one rank.
            batch: this rank's rows.
            place: where they stand in the global batch.
        """

    def columns(self, module: AnyModule, states: States, part: B) -> dict[str, Tensor]:
        """What the rows of all ranks are compared with, [n, ...] each, without gradient."""
        del module, part
        return states

    def constants(self, batch: B) -> dict[str, Tensor]:
        """Columns without gradient, [b, ...] each, that travel before a row is encoded."""
        del batch
        return {}

    def seed(self, chunk: Chunk) -> None:
        """Makes the dropout of a chunk a function of its key; called before each encoding of it."""
        seed_dropout(*chunk.key)

    def facts(self, batch: B) -> dict[str, str]:
        """What must be the same on all ranks, in words for an error message."""
        del batch
        return {}


Tensors: TypeAlias = Mapping[str, Any]
"""Tensors with rows on their first axis, by name; mappings of such tensors may be among them."""


class Functions(Task[Tensors]):
    """A task of two plain functions over batches that are mappings of tensors.

    Args:
        encode: ``encode(module, rows)``, the states [n, ...] by name.
        loss: ``loss(module, rows, columns, first)``, the mean loss of this rank's rows: `rows` are
            its states, `columns` those of all ranks, with gradient, and ``rows[name][i]`` is
            ``columns[name][first + i]``.
        constants: names of the batch that the loss compares too (labels, groups); they come with
            the states, in `rows` and in `columns`.
    """

    def __init__(
        self,
        encode: Callable[[AnyModule, Tensors], States],
        loss: Callable[[AnyModule, States, States, int], Tensor],
        constants: tuple[str, ...] = (),
    ) -> None:
        self._encode, self._loss, self._constants = encode, loss, constants

    def count(self, batch: Tensors) -> int:
        return len(tree_leaves(dict(batch))[0])

    def take(self, batch: Tensors, chunk: Chunk) -> Tensors:
        """The rows on the engine's device; a batch on the CPU moves there chunk by chunk."""
        device = chunk.rows.device

        def rows(tensor: Tensor) -> Tensor:
            return tensor[chunk.rows.to(tensor.device)].to(device)

        return _without_padding(tree_map_only(Tensor, rows, dict(batch)))

    def encode(self, module: AnyModule, part: Tensors) -> States:
        return self._encode(module, part)

    def constants(self, batch: Tensors) -> dict[str, Tensor]:
        return {name: batch[name] for name in self._constants}

    def loss(
        self,
        module: AnyModule,
        states: States,
        gathered: Mapping[str, Tensor],
        batch: Tensors,
        place: Place,
    ) -> tuple[Tensor, Terms]:
        share = place.share
        columns = {
            name: with_gradient(gathered[name], own) if name in gathered else own
            for name, own in states.items()
        }
        device = next(iter(states.values())).device
        for name, own in self.constants(batch).items():
            states = states | {name: own.to(device)}
            columns[name] = gathered.get(name, states[name])
        rows = {name: own[: share.kept] for name, own in states.items()}
        columns = {name: column[: share.global_rows] for name, column in columns.items()}
        return self._loss(module, rows, columns, share.offset) * share.weight, {}


def _without_padding(part: dict[str, Any]) -> dict[str, Any]:
    """Tokenized rows without the positions behind the longest of them, at every level."""
    inner = {name: cast("Tensors", v) for name, v in part.items() if isinstance(v, Mapping)}
    cut = part | {name: _without_padding(dict(tokens)) for name, tokens in inner.items()}
    mask = cut.get("attention_mask")
    if not isinstance(mask, Tensor):
        return cut
    used = torch.nonzero(mask.any(0))
    end = int(used[-1]) + 1 if len(used) else 1
    shape = mask.shape
    return {
        name: value[:, :end] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in cut.items()
    }
