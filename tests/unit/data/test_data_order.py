"""The order of items: a pure function, exactly once per pass, at any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalr_scale.data.stream.order import StreamPlan, epoch_order, exact_fraction
from dalr_scale.errors import UserError

seeds = st.integers(-(2**40), 2**70)
PINNED = [
    [6, 2, 8, 3, 5, 0, 7, 9, 4, 1],
    [4, 1, 8, 7, 3, 0, 9, 6, 5, 2],
    [9, 6, 5, 8, 1, 0, 7, 4, 2, 3],
]


@settings(deadline=None)
@given(seed=seeds, epoch=st.integers(0, 10**6), items=st.integers(0, 2000))
def test_order_is_a_repeatable_permutation(seed: int, epoch: int, items: int) -> None:
    order = epoch_order(seed, epoch, items, stream="text")
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(items))
    assert np.array_equal(order, epoch_order(seed, epoch, items, stream="text"))


def test_order_is_pinned() -> None:
    """A change here breaks every run that is resumed: raise ORDER_VERSION instead."""
    assert epoch_order(1, 0, 10, stream="text").tolist() == PINNED[0]
    assert epoch_order(1, 0, 10, stream="pair").tolist() == PINNED[1]
    assert epoch_order(1, 1, 10, stream="text").tolist() == PINNED[2]


def test_seed_epoch_and_stream_give_unrelated_orders() -> None:
    items = 5000
    base = epoch_order(1, 0, items, stream="text")
    for other in (
        epoch_order(2, 0, items, stream="text"),
        epoch_order(1, 1, items, stream="text"),
        epoch_order(1, 0, items, stream="pair"),
        np.arange(items),
    ):
        # Fixed points of a random permutation are Poisson(1); neighbours stay together as rarely.
        assert (base == other).sum() < 10
        assert (np.diff(base) == np.diff(other)).sum() < 12


def test_every_place_is_equally_likely() -> None:
    """First place of 6 items over 6000 epochs: chi-square with 5 degrees of freedom."""
    first = [epoch_order(3, epoch, 6, stream="text")[0] for epoch in range(6000)]
    counts = np.bincount(first, minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # p = 0.001


def _published(plan: StreamPlan) -> bool:
    return plan.alternation == "reference"


def assert_exactly_once(plan: StreamPlan, epochs: int = 2) -> None:
    """Each item of floor(N / B) * B occurs once per pass, another tail is left out each pass."""
    for kind, items in (("text", plan.text_items), ("pair", plan.pair_items)):
        if not items or (kind == "text" and plan.reference_period == 1 and _published(plan)):
            continue  # k = 1: the published rule never reaches the text stream
        full = items // plan.global_batch
        seen: list[np.ndarray] = []
        step = 0
        while len(seen) < epochs * full:
            if plan.kind(step) == kind:
                seen.append(plan.batch_ids(step))
            step += 1
        for number in range(epochs):
            used = np.concatenate(seen[number * full : (number + 1) * full])
            assert len(used) == len(np.unique(used)) == full * plan.global_batch


plans = st.builds(
    StreamPlan,
    seed=seeds,
    global_batch=st.integers(1, 24),
    text_items=st.integers(24, 300),
    pair_items=st.integers(24, 300),
    alternation=st.sampled_from(["proportional", "reference"]),
)


@settings(deadline=None)
@given(plan=plans)
def test_each_item_once_per_pass(plan: StreamPlan) -> None:
    assert_exactly_once(plan)


@dataclass(frozen=True)
class _Overlapping(StreamPlan):
    """A plan with a fault: batches overlap by one item."""

    def batch_ids(self, step: int) -> np.ndarray:
        _, epoch, batch = self.position(step)
        order = epoch_order(self.seed, epoch, self.text_items, stream="text")
        start = batch * self.global_batch - (batch > 0)
        return order[start : start + self.global_batch]


def test_the_once_per_pass_check_can_fail() -> None:
    assert_exactly_once(StreamPlan(seed=1, global_batch=4, text_items=21))
    with pytest.raises(AssertionError):
        assert_exactly_once(_Overlapping(seed=1, global_batch=4, text_items=21))


@settings(deadline=None)
@given(plan=plans, start=st.integers(0, 10**9))
def test_counts_agree_with_the_kinds(plan: StreamPlan, start: int) -> None:
    """batches_before is the running count of kind, anywhere in a run, without walking there."""
    text, pair = plan.batches_before(start)
    assert text + pair == start
    for step in range(start, start + 40):
        assert plan.batches_before(step) == (text, pair)
        text, pair = text + (plan.kind(step) == "text"), pair + (plan.kind(step) == "pair")


@settings(deadline=None)
@given(plan=plans)
def test_reference_rule_word_by_word(plan: StreamPlan) -> None:
    n_text, n_pair = plan.text_items // plan.global_batch, plan.pair_items // plan.global_batch
    plan = StreamPlan(**{**vars(plan), "alternation": "reference"})
    k = max(1, n_text // n_pair)
    epoch = n_text + n_pair
    kinds = ["pair" if (n % epoch) % k == 0 else "text" for n in range(min(3 * epoch, 300))]
    assert [plan.kind(n) for n in range(len(kinds))] == kinds


@settings(deadline=None)
@given(plan=plans)
def test_proportional_passes_each_stream_once_per_epoch(plan: StreamPlan) -> None:
    plan = StreamPlan(**{**vars(plan), "alternation": "proportional"})
    steps = plan.steps_per_epoch
    assert plan.batches_before(steps) == (plan.n_text, plan.n_pair)
    assert plan.batches_before(3 * steps) == (3 * plan.n_text, 3 * plan.n_pair)


# Pairs, k, steps per epoch, paired steps per epoch under both rules; the last batch is counted.
FIGURES = [
    (29_783 * 5, 6, 8977, 1497, 1164),
    (29_783, 33, 8046, 244, 233),
    (82_783 * 5, 2, 11_047, 5524, 3234),
    (82_783, 12, 8460, 705, 647),
]


@pytest.mark.parametrize(("pairs", "k", "steps", "reference", "proportional"), FIGURES)
def test_published_step_counts(
    pairs: int, k: int, steps: int, reference: int, proportional: int
) -> None:
    common = {"seed": 1, "global_batch": 128, "text_items": 10**6, "pair_items": pairs}
    published = StreamPlan(**common, tail="keep", alternation="reference")
    default = StreamPlan(**common, tail="keep")
    assert published.n_text == 7813
    assert published.reference_period == k
    assert published.steps_per_epoch == default.steps_per_epoch == steps
    assert published.batches_before(steps)[1] == reference
    assert default.batches_before(steps)[1] == proportional
    assert StreamPlan(**common).n_text == 7812  # the tail is dropped by default


def test_tail_is_kept_only_on_request_and_from_two_items_on() -> None:
    def sizes(items: int, tail: str) -> list[int]:
        plan = StreamPlan(seed=1, global_batch=4, text_items=items, tail=tail)  # type: ignore[arg-type]
        return [len(plan.batch_ids(step)) for step in range(plan.n_text)]

    assert sizes(11, "drop") == [4, 4]
    assert sizes(11, "keep") == [4, 4, 3]
    assert sizes(9, "keep") == [4, 4]


def test_configured_fraction_is_exact() -> None:
    plan = StreamPlan(
        seed=1, global_batch=2, text_items=20, pair_items=20, pair_fraction=exact_fraction(0.1)
    )
    for step in (10, 1000, 10**15):
        assert plan.batches_before(step)[1] == step // 10
    assert exact_fraction("1/3") == Fraction(1, 3)
    for bad in (-0.1, 1.5, "x", "1/0", float("nan")):
        with pytest.raises(UserError, match="pair fraction"):
            exact_fraction(bad)


def test_single_streams() -> None:
    for alternation in ("proportional", "reference"):
        text = StreamPlan(seed=1, global_batch=2, text_items=9, alternation=alternation)
        pairs = StreamPlan(seed=1, global_batch=2, pair_items=9, alternation=alternation)
        assert {text.kind(step) for step in range(20)} == {"text"}
        assert {pairs.kind(step) for step in range(20)} == {"pair"}
        assert_exactly_once(text)
        assert_exactly_once(pairs)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"text_items": 7}, "text stream has 7 items, fewer than one global batch of 8"),
        ({"text_items": 8, "pair_items": 7}, "pair stream has 7 items"),
        ({}, "neither a text nor a pair stream"),
        ({"text_items": 8, "pair_fraction": Fraction(1, 2)}, "no pair stream"),
        ({"pair_items": 8, "pair_fraction": Fraction(1, 2)}, "no text stream"),
        ({"text_items": 8, "alternation": "other"}, "alternation"),
        ({"text_items": 8, "tail": "other"}, "tail"),
        ({"text_items": 8, "global_batch": 0}, "global batch is 0"),
        (
            {"text_items": 8, "pair_items": 8, "alternation": "reference", "pair_fraction": 0.5},
            "cannot be set with the reference",
        ),
    ],
)
def test_impossible_plans_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamPlan(**{"seed": 1, "global_batch": 8, **settings_})


@settings(deadline=None)
@given(plan=plans, step=st.integers(0, 500), world=st.sampled_from([1, 2, 3, 4]))
def test_rank_slices_are_the_global_batch(plan: StreamPlan, step: int, world: int) -> None:
    plan = StreamPlan(**{**vars(plan), "global_batch": 12})
    whole = plan.batch_ids(step)
    rows = 12 // world
    parts = [whole[rank * rows : (rank + 1) * rows] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole, StreamPlan(**vars(plan)).batch_ids(step))
