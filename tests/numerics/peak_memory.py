"""Peak bytes of live tensors, counted exactly from the operations that ran."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts storages created inside the context while they are alive.

    Temporaries inside one operation are not seen, tensors made before the context not counted.
    Deterministic, unlike resident memory, which an allocator keeps or returns as it likes.

    Attributes:
        peak: Largest number of bytes alive at once.
        largest: Bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tree_leaves((args, kwargs))
        before = {t.data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in before:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._release, size)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        self.largest = max(self.largest, size)

    def _release(self, size: int) -> None:
        self._alive -= size
