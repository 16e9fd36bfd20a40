"""Bytes that a rank sends: counted at the collectives, whoever calls them.

Every collective of torch passes torch's dispatcher, DeepSpeed's included, so a dispatch mode sees
them all. A collective counts as its ring volume, the least that any algorithm can do: of W ranks,
a gather or a reduce-scatter makes each send (W - 1) / W of the whole, an all-reduce twice that.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalr_scale.distributed.collectives import column_group

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch._ops import OpOverload

# Operator of torch.ops.c10d -> which argument holds the whole tensor, and how often it is sent.
_VOLUMES: Mapping[str, tuple[int, float]] = {
    "_allgather_base_": (0, 1.0),
    "allgather_": (0, 1.0),
    "allgather_into_tensor_coalesced_": (0, 1.0),
    "_reduce_scatter_base_": (1, 1.0),
    "reduce_scatter_": (1, 1.0),
    "reduce_scatter_tensor_coalesced_": (1, 1.0),
    "allreduce_": (0, 2.0),
    "allreduce_coalesced_": (0, 2.0),
    "broadcast_": (0, 1.0),
    "reduce_": (0, 1.0),
}
# Operators that send nothing worth counting.
_EMPTY = frozenset({"barrier", "monitored_barrier_", "wait_tensor"})
# Functional collectives reach the process group below the dispatcher, under names of their own.
_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})


class TrafficCounter(TorchDispatchMode):
    """Counts inside a ``with`` block.

    A collective whose volume is not known here ends in a RuntimeError: counted as nothing, it
    would make any comparison with a prediction worthless.

    Attributes:
        sent: bytes by (``"columns"`` or ``"engine"``, operator): the columns' process group, and
            every other one.
        calls: collectives by the same keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def total(self, group: str) -> float:
        """Bytes sent in one group."""
        return sum(value for (name, _), value in self.sent.items() if name == group)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func.namespace in _NAMESPACES:
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        if operator in _EMPTY:
            return
        if operator not in _VOLUMES:
            raise RuntimeError(f"the volume of the collective '{operator}' is not known")
        which, times = _VOLUMES[operator]
        group = next(a for a in tree_leaves(args) if isinstance(a, torch.ScriptObject))
        process_group = dist.ProcessGroup.unbox(group)
        ranks = process_group.size()
        size = sum(t.numel() * t.element_size() for t in _tensors(args[which]))
        own = column_group()
        is_columns = own is not None and process_group.group_name == own.group_name
        key = "columns" if is_columns else "engine", operator
        self.sent[key] += times * size * (ranks - 1) / ranks  # type: ignore[assignment]
        self.calls[key] += 1


def _tensors(argument: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)]
