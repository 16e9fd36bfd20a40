"""The collectives that saving, locking and stopping need, independent of torch."""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of a run as seen by one of them; all ranks call the methods in one order.

    `dalr_scale.distributed.world.World` is the one of a training run.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def barrier(self) -> None: ...

    def all_max(self, value: int) -> int: ...

    def gather_objects(self, obj: T) -> list[T] | None:
        """All ranks' objects in rank order on rank 0, None elsewhere."""
        ...

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """The object of rank `src` on all ranks."""
        ...
