"""Cutting the states of R ranks into those of S: every element lands once, at its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalr_scale.engines.reshard import (
    MASTER,
    Span,
    _cuts_by_group,
    _cuts_by_parameter,
    _require_complete,
    _spans,
)
from dalr_scale.errors import UserError

shapes = st.lists(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(torch.Size), min_size=1, max_size=6
).map(lambda found: {f"p{k}": shape for k, shape in enumerate(found)})
ranks = st.integers(1, 7)


@dataclass
class Address:
    """DeepSpeed's `fragment_address`."""

    numel: int
    start: int


def whole(named: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Every element of every parameter has a number of its own."""
    return {
        name: 1000.0 * k + torch.arange(math.prod(shape))
        for k, (name, shape) in enumerate(named.items())
    }


def spans_by_parameter(named: dict[str, torch.Size], count: int) -> list[list[Span]]:
    """Stage 3 on `count` ranks, filled with zeros."""
    size = sum(-(-math.prod(shape) // count) for shape in named.values())
    rows = [[{MASTER: torch.zeros(size)}] for _ in range(count)]
    return [
        list(_spans([_cuts_by_parameter(named, rank, count)], rows[rank])) for rank in range(count)
    ]


def spans_by_group(named: dict[str, torch.Size], count: int) -> list[list[Span]]:
    """Stages 1 and 2: one flat row over all parameters, in equal parts of whole length."""
    total = sum(math.prod(shape) for shape in named.values())
    part = -(-total // count)
    seen: dict[str, int] = {}
    return [
        list(
            _spans([_cuts_by_group(mapping, seen)], [{MASTER: torch.zeros(part)}]),
        )
        for mapping in _mappings(named, part, count)
    ]


def _mappings(named: dict[str, torch.Size], part: int, count: int) -> Iterator[dict[str, Address]]:
    for rank in range(count):
        mapping, position = {}, 0
        for name, shape in named.items():
            first, last = position, position + math.prod(shape)
            position = last
            start, end = max(first, rank * part), min(last, (rank + 1) * part)
            if start < end:
                mapping[name] = Address(end - start, start - rank * part)
        yield mapping


@pytest.mark.parametrize("cut", [spans_by_parameter, spans_by_group])
@given(named=shapes, before=ranks, after=ranks)
def test_every_element_arrives(cut, named: dict[str, torch.Size], before: int, after: int) -> None:
    full = whole(named)
    saved = [span for rank in cut(named, before) for span in rank]
    for span in saved:
        span.states[MASTER].copy_(full[span.name][span.start : span.start + span.length])
    assert sum(span.length for span in saved) == sum(t.numel() for t in full.values())
    for rank in cut(named, after):
        own = {span.name: span for span in rank}
        for span in saved:
            if span.name in own:
                own[span.name].take(span)
        for span in own.values():
            assert torch.equal(
                span.states[MASTER], full[span.name][span.start : span.start + span.length]
            )
        _require_complete(own, "directory")  # type: ignore[arg-type]


@given(named=shapes, before=st.integers(2, 7))
def test_a_lost_shard_is_noticed(named: dict[str, torch.Size], before: int) -> None:
    """Control: without the last rank's file something is missing, and it is said."""
    shards = spans_by_group(named, before)
    lost = next(k for k in reversed(range(before)) if shards[k])
    (own,) = spans_by_group(named, 1)
    table = {span.name: span for span in own}
    for number, rank in enumerate(shards):
        for span in rank if number != lost else ():
            table[span.name].take(span)
    with pytest.raises(UserError, match="lacks elements of p"):
        _require_complete(table, "directory")  # type: ignore[arg-type]
