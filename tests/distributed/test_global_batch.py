"""Real ranks over gloo against one process that holds the whole batch.

One launch per world size runs all its cases. The full product is in ``tests/soak``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import fork, free_port

sys.path.insert(0, str(Path(__file__).parent))

import worker
from cases import (
    FAULTS,
    WORLDS,
    Case,
    agreement,
    build,
    cover,
    global_batch,
    load,
    run,
    step_inputs,
    tails,
)
from facts import ALIKE, REPEATED, REPLAYS, TRAFFIC

from dalr_scale.distributed.world import World, leave_world, start_world
from dalr_scale.global_batch import task as global_task
from dalr_scale.global_batch.chunks import cut
from dalr_scale.training.task import VIEWS


def tolerance(case: Case) -> float:
    """ZeRO keeps fp32 gradients and master weights whatever the model's precision.

    AdamW divides a gradient by its own size: where that is rounding, so is the step. bf16 has
    eight bits, and what other chunks and ranks round is not the same numbers.
    """
    if case.option == "bf16":
        return 0.06
    if case.option == "adamw":
        return 1e-8 if case.kind == "ddp" else 1e-4
    return 1e-10 if case.kind == "ddp" else 1e-5


def launch(size: int, directory: Path, which: str, timeout: float = 400) -> None:
    """Starts `size` processes that run all cases of that world size."""
    base = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    logs = [directory / f"rank{rank}.log" for rank in range(size)]
    ranks = [
        fork(
            worker.one_rank,
            *(str(directory), which, base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log)),
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in ranks:
            process.join(timeout=timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    for process, log in zip(ranks, logs, strict=True):
        assert process.exitcode == 0, log.read_text(encoding="utf-8")[-3000:]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Results of all world sizes, one launch each."""
    directories = {size: tmp_path_factory.mktemp(f"world{size}") for size in WORLDS}
    for size, directory in directories.items():
        launch(size, directory, "cover")
    return directories


@pytest.fixture(scope="module")
def world() -> object:
    world = start_world(timeout_minutes=2, threads=1)
    yield world
    leave_world()


_references: dict[Case, dict[str, np.ndarray]] = {}


def reference(case: Case, world: World, directories: dict[int, Path]) -> dict[str, np.ndarray]:
    """One process with the whole batch; an engine other than plain DDP ran in a worker."""
    truth = case.reference
    if truth.kind != "ddp":
        return load(directories[1], truth)
    if truth not in _references:
        _references[truth] = run(truth, world)
    return _references[truth]


@pytest.mark.parametrize("case", cover(), ids=lambda c: c.name)
def test_ranks_equal_one_process(case: Case, directories: dict[int, Path], world: World) -> None:
    """Losses, embedding and parameter gradients and the weights over five steps."""
    found = load(directories[case.world], case)
    worst = agreement(found, reference(case, world, directories), norms=case.option == "bf16")
    assert max(worst.values()) < tolerance(case), worst


@pytest.mark.parametrize("case", tails(), ids=lambda c: c.name)
def test_last_batches_equal_one_process(
    case: Case, directories: dict[int, Path], world: World
) -> None:
    """A batch that ranks cannot cut equally is padded, and the padding counts nowhere."""
    worst = agreement(load(directories[case.world], case), reference(case, world, directories))
    assert max(worst.values()) < tolerance(case), worst


@pytest.mark.parametrize("case", FAULTS, ids=lambda c: c.name)
def test_control_each_guarantee_is_needed(
    case: Case, directories: dict[int, Path], world: World
) -> None:
    """With one guarantee off the same comparison fails, by far."""
    half = case.option == "bf16"
    found = agreement(
        load(directories[case.world], case), reference(case, world, directories), norms=half
    )
    assert max(found.values()) > (2 * tolerance(case) if half else 1e-3), found


@pytest.fixture(scope="module")
def facts(directories: dict[int, Path]) -> dict:
    return json.loads((directories[2] / "facts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", TRAFFIC, ids=lambda c: c.name)
def test_bytes_sent_are_those_predicted(case: Case, facts: dict) -> None:
    """Counted at the collectives, within 5 % of what the columns must cost."""
    found = facts["traffic"][case.name]
    assert found["columns"] == pytest.approx(found["columns predicted"], rel=0.05)
    # ZeRO-3 keeps small parameters whole; a text batch leaves heads without gradient
    if case.kind != "zero3" and case.batch == "pair":
        assert found["engine"] == pytest.approx(found["engine predicted"], rel=0.05)


@pytest.mark.parametrize("case", [c for c in TRAFFIC if c.chunks == "four"], ids=lambda c: c.name)
def test_gradients_are_reduced_once_whatever_the_chunks(case: Case, facts: dict) -> None:
    once = dataclasses.replace(case, chunks="one")
    four, one = facts["traffic"][case.name], facts["traffic"][once.name]
    assert reductions(four) == reductions(one)
    if case.kind == "ddp":
        assert four["engine calls"] == {"allreduce_": 1}
    if case.kind != "zero3":  # which gathers its weights for every chunk
        assert (four["engine"], four["engine calls"]) == (one["engine"], one["engine calls"])
    assert four["columns"] == one["columns"]


def reductions(found: dict) -> int:
    """Collectives that sum anything in the engine's process group; some are scalars."""
    return sum(n for operator, n in found["engine calls"].items() if "reduce" in operator)


@pytest.mark.parametrize("case", REPEATED, ids=lambda c: c.name)
def test_control_bare_backward_calls_reduce_once_for_each(case: Case, facts: dict) -> None:
    """Without the block that puts the reduction off, the loss and each of four chunks reduce."""
    once = facts["traffic"][dataclasses.replace(case, fault="").name]
    assert reductions(facts["traffic"][case.name]) >= reductions(once) + 3


def test_no_collective_is_counted_as_nothing(facts: dict) -> None:
    assert "the volume of the collective 'alltoall_base_' is not known" in facts["unlisted"]


@pytest.mark.parametrize("case", REPLAYS, ids=lambda c: c.name)
def test_both_passes_drop_alike_and_ranks_do_not(case: Case, facts: dict) -> None:
    """Dropout keyed by rank, in every engine; every rank encodes the same rows."""
    found = facts["replay"][case.name]
    assert found["second pass"] < 1e-6
    assert found["ranks"] > 1e-2
    assert found["second pass, moving key"] > 1e-2  # controls
    assert found["ranks, key without rank"] < 1e-6
    # what checkpointing recomputes in the backward pass drops alike too
    plain = facts["replay"][dataclasses.replace(case, kind="ddp", option="").name]
    assert found["gradient norm"] == pytest.approx(plain["gradient norm"], rel=1e-5)


def gathers_between(events: list[str]) -> list[int]:
    """Gathers started before each encoding of the first pass, and after the last one."""
    first_pass = events[: events.index("loss")]
    counts = [0]
    for event in first_pass:
        if event == "encode":
            counts.append(0)
        counts[-1] += event.startswith("gather")
    return counts


def test_columns_travel_while_encoders_run(facts: dict) -> None:
    """Teachers' columns start before the first chunk is encoded, a chunk's before the next one."""
    before, *after = gathers_between(facts["events"]["ColumnGather"])
    # order, image numbers, two text teachers, images; then z2, u and z1 of every chunk
    assert (before, after) == (5, [3, 3, 3, 3])
    before, *after = gathers_between(facts["events"]["LateGather"])  # control
    assert (before, after[:3]) == (1, [0, 0, 0])


@pytest.mark.parametrize(
    ("name", "facts_named"),
    [
        ("another_kind", ("rank 0: ", "kind paired", "kind text")),
        ("fewer_rows", ("rows 16", "rows 3")),
        ("no_rows", ("rows 16", "rows 0")),
        ("another_width", ("image (16, 16)", "image (16, 15)")),
        ("another_step", ("step 0", "step 7")),
    ],
)
def test_ranks_that_disagree_say_so_on_every_rank(
    name: str, facts_named: tuple[str, ...], facts: dict
) -> None:
    said = facts["disagreement"][name]
    assert len(said) == 2
    for words in said:
        assert "the ranks hold different batches in step" in words
        assert all(fact in words for fact in facts_named), words


@pytest.mark.parametrize("case", ALIKE, ids=lambda c: c.name)
def test_identical_rows_give_a_finite_step(case: Case, facts: dict) -> None:
    """Both views of all rows are one vector: every cosine is one, but for rounding."""
    found = facts["identical rows"][case.name]
    assert found["views apart"] < 1e-6
    assert np.isfinite(found["loss"]) and found["finite"] == 1.0


def gradients(case: Case, world: World, *, one_graph: bool) -> dict[str, torch.Tensor]:
    """Parameter gradients of one step with dropout: in two passes, or with all chunks alive."""
    engine, _ = build(case, world)
    inputs = step_inputs(case, world, 0)
    if not one_graph:
        inputs.backward(engine)
    else:
        step, batch = inputs.on(engine), inputs.batch
        place = step.place(batch, 0)
        order, chunks = cut(place, case.micro_rows, inputs.lengths, world.device, sort=True)
        pieces = [step.encode(step.task.take(batch, chunk), chunk) for chunk in chunks]
        back = order.argsort()
        states = {view: torch.cat([piece[view] for piece in pieces])[back] for view in VIEWS}
        with engine.gradients():
            loss, _ = engine.apply(step.task.loss, states, {}, batch, place)
            engine.backward(loss)
    return {name: p.grad.clone() for name, p in engine.module.named_parameters()}


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(
        float((one[k] - other[k]).abs().max() / other[k].abs().max().clamp(min=1e-6)) for k in one
    )


def test_the_second_pass_draws_the_dropout_of_the_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over chunks equal one graph over the same chunks, dropout keyed by rank."""
    case = Case(1, "dalr", chunks="ragged", dropout="rank")
    truth = gradients(case, world, one_graph=True)
    assert worst(gradients(case, world, one_graph=False), truth) < 1e-10
    calls = itertools.count()
    plain = global_task.seed_dropout
    monkeypatch.setattr(global_task, "seed_dropout", lambda *key: plain(*key, next(calls)))
    assert worst(gradients(case, world, one_graph=False), truth) > 1e-3  # control: other masks


def test_sorting_cuts_padding(world: World) -> None:
    """The chunks of sorted rows hold fewer padded tokens; every row is in one of them."""
    case = Case(1, "simcse", chunks="four")
    inputs = step_inputs(case, world, 0)
    step = inputs.on(build(case, world)[0])
    lengths = global_batch(case, 0)["attention_mask"].sum(1)
    tokens = {}
    for sort in (False, True):
        place = step.place(inputs.batch, 0)
        _, chunks = cut(place, case.micro_rows, inputs.lengths, world.device, sort=sort)
        rows = [chunk.rows for chunk in chunks]
        assert sorted(torch.cat(rows).tolist()) == list(range(len(lengths)))
        tokens[sort] = sum(len(r) * int(lengths[r].max()) for r in rows)
    assert tokens[True] < tokens[False]
