"""Batches that are read one step ahead: the same batches, waits and errors at the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dalr_scale.errors import UserError
from dalr_scale.training.upcoming import Upcoming


def numbers(count: int, fails_at: int | None = None) -> Iterator[Any]:
    for number in range(count):
        if number == fails_at:
            raise UserError("torn")
        yield number


def test_a_look_ahead_changes_no_batch() -> None:
    calls: list[int] = []
    upcoming = Upcoming(numbers(3), lambda: calls.append(1))
    upcoming.start()
    seen = []
    while (taken := upcoming.take()) is not None:
        seen.append((taken[0], upcoming.peek()))
    assert seen == [(0, 1), (1, 2), (2, None)]
    assert len(calls) == 4, "each batch is waited for once, and the end"


def test_the_first_batch_is_no_wait_for_data() -> None:
    upcoming = Upcoming(numbers(1), lambda: None)
    upcoming.start()
    assert upcoming.take() == (0, 0.0)


def test_a_batch_that_cannot_be_read_is_told_by_the_step_that_needs_it() -> None:
    upcoming = Upcoming(numbers(3, fails_at=1), lambda: None)
    upcoming.start()
    assert upcoming.take() is not None
    assert upcoming.peek() is None, "the step before goes on"
    with pytest.raises(UserError, match="torn"):
        upcoming.take()
