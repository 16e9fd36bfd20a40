"""Weighted sources, replacements of bad rows, and random changes that belong to a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_tools import jpeg, write_pairs
from test_data_loader import digest, small_tokenizer, to_tensor

from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards
from dalr_scale.data.stream import order as order_module
from dalr_scale.data.stream.augment import Augment, sample_rng
from dalr_scale.data.stream.bad_rows import BadRows
from dalr_scale.data.stream.batch import BadRow, Batch
from dalr_scale.data.stream.loader import LoaderOptions, make_loader
from dalr_scale.data.stream.order import Part, StreamPlan, epoch_order, share_rows
from dalr_scale.data.stream.source import Source, Sources
from dalr_scale.errors import UserError

weights_lists = st.lists(st.floats(0.05, 10), min_size=1, max_size=5)


@settings(deadline=None)
@given(weights=weights_lists, batch=st.integers(1, 512))
def test_rows_follow_the_weights(weights: list[float], batch: int) -> None:
    exact = [batch * weight / sum(weights) for weight in weights]
    try:
        rows = share_rows(batch, weights)
    except UserError:
        assert min(exact) < 1
        return
    assert sum(rows) == batch and min(rows) >= 1
    assert all(abs(row - share) < 1 for row, share in zip(rows, exact, strict=True))


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0, 2.0], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="must be a number above 0"):
        share_rows(8, weights)


def mixed_plan(seed: int = 1) -> StreamPlan:
    parts = (Part(50, 9), Part(31, 3))
    return StreamPlan(seed=seed, global_batch=12, pair_items=81, pair_parts=parts)


def test_each_source_is_passed_once_at_its_own_pace() -> None:
    plan = mixed_plan()
    steps = 40
    ids = [plan.batch_ids(step) for step in range(steps)]
    for start, part in ((0, Part(50, 9)), (50, Part(31, 3))):
        mine = [batch[(batch >= start) & (batch < start + part.items)] for batch in ids]
        assert {len(rows) for rows in mine} == {part.rows}
        per_epoch = part.items // part.rows
        for first in range(0, steps - per_epoch, per_epoch):
            one_pass = np.concatenate(mine[first : first + per_epoch])
            assert len(set(one_pass.tolist())) == per_epoch * part.rows
    assert all(len(set(batch.tolist())) == 12 for batch in ids)
    assert plan.sources_before(13) == {
        "pair": divmod(13, 6),
        "pair[0]": divmod(13, 5),
        "pair[1]": divmod(13, 10),
    }


def test_sources_are_spread_over_the_ranks() -> None:
    ids = mixed_plan().batch_ids(0)
    assert [int((ids[rank * 4 : rank * 4 + 4] >= 50).sum()) for rank in range(3)] == [1, 1, 1]


def test_a_mixture_reads_from_every_source(tmp_path: Path) -> None:
    first = write_text_shards((f"image {n}" for n in range(60)), tmp_path, "a", per_member=8)
    second = write_text_shards((f"caption {n}" for n in range(20)), tmp_path, "b", per_member=8)
    source = Source([*second, *first], part_sizes=[len(second), len(first)])
    assert source.part_items == (20, 60)
    parts = tuple(Part(n, r) for n, r in zip((20, 60), share_rows(8, (1, 3)), strict=True))
    plan = StreamPlan(seed=1, global_batch=8, text_items=80, text_parts=parts)
    for step in range(20):
        words = [text.split()[0] for text in source.read(plan.batch_ids(step)).sentences]
        assert (words.count("caption"), words.count("image")) == (2, 6)
    with pytest.raises(UserError, match="source 1 of the text stream has 20 items"):
        StreamPlan(seed=1, global_batch=80, text_items=80, text_parts=(Part(20, 70), Part(60, 10)))
    with pytest.raises(UserError, match="cannot be kept of weighted sources"):
        StreamPlan(seed=1, global_batch=8, text_items=80, text_parts=parts, tail="keep")


def test_the_order_of_one_pass_is_all_that_is_kept() -> None:
    order_module._latest.clear()
    plan = StreamPlan(seed=9, global_batch=2, text_items=20)
    expected = [epoch_order(9, epoch, 20, stream="text") for epoch in range(3)]
    for step in (0, 9, 10, 25, 3):
        start = step % 10 * 2
        assert plan.batch_ids(step).tolist() == expected[step // 10][start : start + 2].tolist()
    assert len(order_module._latest) == 1


plans = st.builds(
    StreamPlan,
    seed=st.integers(0, 99),
    global_batch=st.integers(1, 12),
    text_items=st.integers(24, 90),
    pair_items=st.integers(24, 90),
)


@settings(deadline=None)
@given(plan=plans, step=st.integers(0, 60))
def test_replacements_are_never_in_the_batch_and_never_the_same(
    plan: StreamPlan, step: int
) -> None:
    used = plan.batch_ids(step).tolist()
    for attempt in range(1, plan.num_replacements(plan.kind(step)) + 1):
        found = [plan.replacement(step, row, attempt) for row in range(plan.global_batch)]
        assert len(set(found)) == len(found)
        assert not set(found) & set(used)


# -- bad rows while training --------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Source:
    """40 items; the captions of one image changed after indexing, one image is torn."""
    with ShardSetWriter(tmp_path, "p", samples_per_shard=20) as writer:
        for number in range(40):
            data = jpeg(number)[:-200] if number == 7 else jpeg(number)
            writer.write(f"{number:03d}", {"jpg": data, "txt": b"caption of image"})
    source = Source(writer.shards, with_images=True)
    shard = writer.shards[1]
    content = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(content.index(b"caption"))
        file.write(b"C")
    return source


def batches(source: Source, rank: int = 0, world: int = 1, **options: object) -> list[Batch]:
    plan = StreamPlan(seed=1, global_batch=8, pair_items=40)
    settings_: dict = {"num_workers": 0, "image_transform": to_tensor} | options
    chosen = LoaderOptions(10, 8, rank=rank, world_size=world, **settings_)
    return list(make_loader(plan, Sources(None, source), small_tokenizer(), chosen))


def test_bad_rows_are_replaced_alike_at_any_number_of_ranks(broken: Source) -> None:
    alone = batches(broken)
    bad = sorted({row.item for batch in alone for row in batch.bad})
    assert len(bad) == 2  # each met in both passes
    assert sum(len(batch.bad) for batch in alone) == 4
    reasons = " ".join(row.why for batch in alone for row in batch.bad)
    assert "differs from what was indexed" in reasons
    assert "sample '007', line 1: the image cannot be decoded" in reasons
    for batch in alone:
        ids = batch.item_ids.tolist()
        assert len(set(ids)) == len(ids) == 8 and not set(ids) & set(bad)
        assert batch.images is not None and len(batch.images) == 8
    for world in (2, 4):
        parts = [batches(broken, rank, world) for rank in range(world)]
        for whole, *ranks in zip(alone, *parts, strict=True):
            assert [n for part in ranks for n in part.item_ids.tolist()] == whole.item_ids.tolist()
            assert [row for part in ranks for row in part.bad] == list(whole.bad)
    assert digest(batches(broken, num_workers=2)) == digest(alone)
    assert digest(batches(broken, start_step=6)) == digest(alone[6:])


class TwoRanks:
    """The first of two ranks; the other one has met `theirs`."""

    rank, size = 0, 2

    def __init__(self, theirs: list[BadRow]) -> None:
        self.theirs = theirs

    def barrier(self) -> None: ...

    def all_max(self, value: int) -> int:
        return max(value, len(self.theirs))

    def gather_objects(self, obj: list[BadRow]) -> list[list[BadRow]]:
        return [obj, self.theirs]

    def broadcast_object(self, obj: object, src: int = 0) -> object:
        return obj


def bad(item: int) -> BadRow:
    return BadRow("pair", item, f"x.tar: sample 'k{item}' differs")


def test_bad_items_count_once_over_all_ranks_up_to_the_limit() -> None:
    rows = BadRows({"pair": 400}, {}, 0.01)
    for _ in range(3):
        rows.count([bad(1), bad(2)], TwoRanks([bad(2), bad(3)]))
    rows.count([], TwoRanks([]))
    assert rows.state() == {"pair": [1, 2, 3]}
    rows.count([bad(4)], TwoRanks([]))  # 4 of 400 is the limit itself
    again = BadRows({"pair": 400}, {}, 0.01)
    again.restore(rows.state())
    with pytest.raises(UserError, match=r"5 of 400 items of the pair stream") as raised:
        again.count([], TwoRanks([bad(9)]))
    assert "x.tar: sample 'k9' differs" in str(raised.value)
    again = BadRows({"pair": 400}, {}, 1.0)
    again.count([bad(n) for n in range(399)], TwoRanks([]))  # control: without a limit


def test_what_is_quarantined_counts_from_the_start() -> None:
    lines = [f"x.tar: sample 'k{n}' is not UTF-8" for n in range(30)]
    with pytest.raises(UserError, match=r"30 of 1030 items of the text(.|\n)*'k9'(.|\n)*20 more"):
        BadRows({"text": 1000}, {"text": lines}, 0.02)
    BadRows({"text": 1000}, {"text": lines}, 0.03)


# -- augmentation -------------------------------------------------------------------------------


def test_random_changes_belong_to_the_sample(tmp_path: Path) -> None:
    source = Source(write_pairs(tmp_path, 8, per_shard=4), with_images=True)

    def pixels(**options: object) -> dict[tuple[int, int], bytes]:
        found = {}
        for batch in batches(source, augment=Augment(0.3, 0.5), **options):
            assert batch.images is not None
            for item, image in zip(batch.item_ids.tolist(), batch.images, strict=True):
                found[batch.step // 5, item] = image.numpy().tobytes()
        return found

    alone = pixels()
    assert pixels(num_workers=2) == alone
    halves = pixels(rank=0, world=2) | pixels(rank=1, world=2)
    assert halves == alone
    assert pixels(start_step=5) == {key: v for key, v in alone.items() if key[0] == 1}
    changed = [alone[0, item] != alone[1, item] for item in range(40)]
    assert sum(changed) > 30  # another pass, other changes


def test_crops_stay_inside_and_keep_their_area() -> None:
    image = Image.new("RGB", (60, 40))
    for item in range(200):
        cropped = Augment(0.25)(image, sample_rng(1, "pair", 0, item))
        assert 0.2 * 2400 <= cropped.width * cropped.height <= 2400
    plain = Augment()(image, sample_rng(1, "pair", 0, 0))
    assert plain.tobytes() == image.tobytes()
    for wrong in ({"min_area": 0}, {"min_area": 1.1}, {"flip": -0.1}):
        with pytest.raises(UserError):
            Augment(**wrong)
