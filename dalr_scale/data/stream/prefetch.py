"""Receives batches from worker processes before a step needs them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_T = TypeVar("_T")
_WARN_AFTER = 10.0  # seconds of waiting for a batch before a warning
_JOIN_TIMEOUT = 5.0  # seconds for the thread to end; it may wait for a worker
log = logging.getLogger(__name__)


def prefetch(items: Iterator[_T], count: int) -> Generator[_T, None, None]:
    """Yield ``items``, which a thread takes up to ``count`` items before they are needed.

    A batch that a worker has finished is not in this process yet: its memory is received from the
    worker, which answers when it is scheduled. On a busy host a step would wait for that. With a
    count of 0 there is no thread.
    """
    if not count:
        yield from items
        return
    ready: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()
    slots = threading.Semaphore(count)
    stopped = threading.Event()

    def take() -> None:
        try:
            while slots.acquire() and not stopped.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # StopIteration too: the user of the items raises it
            ready.put((None, error))

    thread = threading.Thread(target=take, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = _get_with_warnings(ready)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            slots.release()
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        slots.release()
        thread.join(_JOIN_TIMEOUT)


def _get_with_warnings(ready: queue.SimpleQueue[_T]) -> _T:
    """Wait for an item, and warn when it takes long; the watchdog ends the run."""
    started = time.monotonic()
    while True:
        try:
            return ready.get(timeout=_WARN_AFTER)
        except queue.Empty:
            waited = time.monotonic() - started
            log.warning("no batch for %.0f s: slow storage, or too few data.workers", waited)
