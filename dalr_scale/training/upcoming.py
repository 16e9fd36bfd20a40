"""The batches of a run, each read while the step before it is computed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dalr_scale.data.stream.batch import Batch


class Upcoming:
    """Batches in order, of which the next one can be looked at before it is taken.

    Args:
        batches: from the loader.
        waiting: called before this rank may have to wait for data.
    """

    def __init__(self, batches: Iterator[Batch], waiting: Callable[[], None]) -> None:
        self._batches, self._waiting = batches, waiting
        self._next: Batch | None = None
        self._error: Exception | None = None
        self._read = False
        self._waited = 0.0

    def start(self) -> None:
        """Reads the first batch; the start of the workers is no wait for data."""
        self.peek()
        self._waited = 0.0

    def peek(self) -> Batch | None:
        """The next batch; None at the end, and where it cannot be read, which `take` tells."""
        if not self._read:
            self._waiting()
            started = time.monotonic()
            try:
                self._next = next(self._batches, None)
            except Exception as error:  # it belongs to the step that needs the batch
                self._error = error
            self._waited, self._read = time.monotonic() - started, True
        return self._next

    def take(self) -> tuple[Batch, float] | None:
        """The next batch and the seconds it kept the rank waiting; None at the end.

        Raises:
            UserError: the batch cannot be read.
        """
        batch = self.peek()
        if self._error is not None:
            raise self._error
        self._next, self._read = None, False
        return None if batch is None else (batch, self._waited)
