"""The order over whole epochs: the same at any ranks and workers, and after any resume."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.data.stream.loader import LoaderOptions, Sources, make_loader
from dalr_scale.data.stream.order import Part, StreamPlan, share_rows
from dalr_scale.data.stream.source import Source

BATCH, EPOCHS = 12, 4
TEXT, PAIRS = 125, 64  # 10 and 5 batches a pass, tails of 5 and 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    directory = tmp_path_factory.mktemp("order")
    sizes = {"text": TEXT, "first": 24, "second": 40}
    shards = {
        name: write_text_shards(
            (f"{name} {n}" for n in range(size)), directory, name, per_member=6, members_per_shard=3
        )
        for name, size in sizes.items()
    }
    parts = [len(shards["first"]), len(shards["second"])]
    pairs = Source([*shards["first"], *shards["second"]], part_sizes=parts)
    return Source(shards["text"]), pairs


def plan_of(sources: tuple[Source, Source], *, mixed: bool = False) -> StreamPlan:
    text, pairs = sources
    shares = share_rows(BATCH, (1, 2))
    parts = tuple(Part(n, rows) for n, rows in zip(pairs.part_items, shares, strict=True))
    return StreamPlan(
        seed=5,
        global_batch=BATCH,
        text_items=text.num_items,
        pair_items=pairs.num_items,
        pair_parts=parts if mixed else (),
    )


def read(
    sources: tuple[Source, Source],
    plan: StreamPlan,
    *,
    world: int = 1,
    workers: int = 0,
    start: int = 0,
    stop: int | None = None,
) -> list[str]:
    """Hash of stream, items and sentences of each step, the ranks' rows put together again."""
    core = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    ranks = [
        make_loader(
            plan,
            Sources(*sources),
            tokenizer,
            LoaderOptions(
                total_steps=EPOCHS * plan.steps_per_epoch,
                max_length=8,
                num_workers=workers,
                start_step=start,
                rank=rank,
                world_size=world,
            ),
        )
        for rank in range(world)
    ]
    found = []
    for parts in zip(*ranks, strict=True):
        items = [item for part in parts for item in part.item_ids.tolist()]
        sentences = [text for part in parts for text in part.sentences]
        content = repr((parts[0].step, parts[0].kind, items, sentences))
        found.append(hashlib.sha256(content.encode()).hexdigest())
        if stop is not None and parts[0].step + 1 == stop:
            break
    return found


@pytest.fixture(scope="module")
def reference(sources: tuple[Source, Source]) -> list[str]:
    return read(sources, plan_of(sources))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ranks_and_workers_do_not_change_four_epochs(
    world: int, workers: int, sources, reference: list[str]
) -> None:
    assert len(set(reference)) == len(reference) == 60
    assert read(sources, plan_of(sources), world=world, workers=workers) == reference


@pytest.mark.parametrize("every", [1, 2, 7, 13])
@pytest.mark.parametrize("world", [1, 3])
def test_a_run_resumed_again_and_again_sees_the_same_order(
    every: int, world: int, sources, reference: list[str]
) -> None:
    """Stopped after every 1st, 2nd, 7th and 13th step, each time with new loaders."""
    plan = plan_of(sources)
    found: list[str] = []
    while len(found) < len(reference):
        stop = min(len(found) + every, len(reference))
        found += read(sources, plan, world=world, start=len(found), stop=stop)
    assert found == reference


def test_workers_that_read_ahead_do_not_count(sources, reference: list[str]) -> None:
    """Stopped while four workers have batches in their queues: what was used is what counts."""
    plan = plan_of(sources)
    first = read(sources, plan, workers=4, stop=9)
    assert first + read(sources, plan, world=2, workers=1, start=9) == reference


@pytest.mark.parametrize("mixed", [False, True])
def test_every_item_once_over_the_full_batches_of_each_epoch(mixed: bool, sources) -> None:
    plan = plan_of(sources, mixed=mixed)
    steps = range(EPOCHS * plan.steps_per_epoch)
    text = [plan.batch_ids(step) for step in steps if plan.kind(step) == "text"]
    epochs = [np.concatenate(text[n : n + 10]) for n in range(0, 40, 10)]
    assert [len(set(ids.tolist())) for ids in epochs] == [TEXT // BATCH * BATCH] * EPOCHS
    left_out = [set(range(TEXT)) - set(ids.tolist()) for ids in epochs]
    assert len({frozenset(tail) for tail in left_out}) > 1  # another tail in each pass
    if not mixed:
        pairs = [plan.batch_ids(step) for step in steps if plan.kind(step) == "pair"]
        epochs = [np.concatenate(pairs[n : n + 5]) for n in range(0, 20, 5)]
        assert [len(set(ids.tolist())) for ids in epochs] == [PAIRS // BATCH * BATCH] * EPOCHS


def test_mixtures_are_as_exact(sources) -> None:
    plan = plan_of(sources, mixed=True)
    whole = read(sources, plan)
    assert read(sources, plan, world=3, workers=1) == whole
    assert read(sources, plan, world=2, start=17) == whole[17:]


def test_the_comparison_can_fail(sources, reference: list[str]) -> None:
    """Control: one step too far after a resume, as when batches read ahead are counted."""
    assert read(sources, plan_of(sources), start=10) != reference[9:-1]
    other = StreamPlan(seed=6, global_batch=BATCH, text_items=TEXT, pair_items=PAIRS)
    assert not set(read(sources, other)) & set(reference)


def test_renamed_shards_keep_the_order(sources, reference: list[str], tmp_path: Path) -> None:
    def moved(source: Source, directory: str) -> Source:
        (tmp_path / directory).mkdir()
        for number, shard in enumerate(reversed(source.shards)):
            (tmp_path / directory / f"{number:02d}.tar").write_bytes(shard.read_bytes())
        shards = sorted((tmp_path / directory).glob("*.tar"))
        if directory == "text":
            return Source(shards)
        sizes = len(shards) - 2, 2  # the parts stand the other way round now
        return Source([*shards[sizes[0] :], *shards[: sizes[0]]], part_sizes=sizes[::-1])

    text, pairs = sources
    assert len(pairs.shards) == 5 and pairs.part_items == (24, 40)
    again = moved(text, "text"), moved(pairs, "pairs")
    assert read(again, plan_of(again)) == reference
