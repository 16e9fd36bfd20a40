"""Whole runs of the training command against the reference trainer of ``tests/reference``.

A cover of the random rows, of which ``tests/soak`` trains hundreds; ``cd tests; python -m
reference NUMBER`` repeats one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from reference.compare import compare
from reference.cover import cover
from reference.draw import BREAKS, draw
from reference.engines import (
    BOUNDS,
    Engine,
    alternating,
    differences,
    stopped_after_every_step,
)
from reference.material import write_material
from reference.rows import try_row
from reference.runs import Stop, run
from reference.trainer import Result, train

from dalr_scale.engines import engine as engine_module
from dalr_scale.models import row_dropout
from dalr_scale.objective.g2l import GlobalToLocal
from dalr_scale.training import watch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material") / "data")


@pytest.mark.parametrize("number", cover())
def test_a_run_trains_what_the_reference_trains(number: int, data: Path, tmp_path: Path) -> None:
    result = try_row(draw(number), data, tmp_path / "row")
    assert result.good, result


@pytest.mark.parametrize(
    ("engine", "encoder"),
    [(Engine("zero3"), "pretrained"), (Engine("zero2", offload=True), "scratch")],
    ids=str,
)
def test_stops_change_no_bit(engine: Engine, encoder: str, data: Path, tmp_path: Path) -> None:
    """After a paired step, after a text step, and twice in a row."""
    config = alternating(data, engine, encoder)
    assert stopped_after_every_step(config, tmp_path, ranks=1, steps=(2, 3, 6)) == []


@pytest.mark.parametrize("engine", [Engine("zero1", offload=True), Engine("zero3")], ids=str)
def test_alternating_batches_train_alike_under_every_engine(
    engine: Engine, data: Path, tmp_path: Path
) -> None:
    found = differences(data, engine, 2, tmp_path)
    assert found.within(BOUNDS), found


@pytest.fixture(scope="module")
def expected(data: Path) -> Result:
    """The reference of the alternating run; it has no engine."""
    return train(alternating(data, Engine("zero3")))


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_run_that_goes_on_with_other_ranks_trains_alike(
    kind: str, data: Path, tmp_path: Path, expected: Result
) -> None:
    """Weight decay makes two groups of parameters, each with a step count of its own."""
    config = alternating(data, Engine(kind))
    found = compare(config, run(config, tmp_path, 1, [Stop(3, "STOP", 2)]), expected, BOUNDS)
    assert found.within(BOUNDS), found


def no_dropout() -> None:
    row_dropout._drop = lambda x, p, place, keys: x
    watch.Watch.check_means = lambda *_, **__: None  # type: ignore[method-assign]


def another_weight() -> None:
    GlobalToLocal.weight = lambda _, o: 1.01 * o.intra_weight * o.g2l_weight  # type: ignore[method-assign]


def old_gradients() -> None:
    engine_module.zero_missing_gradients = lambda *_: []
    watch.Watch.check_gradients = lambda *_: None  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [no_dropout, another_weight, old_gradients])
def test_control_a_fault_of_the_run_is_seen(
    fault: Callable[[], None], data: Path, tmp_path: Path, expected: Result
) -> None:
    config = alternating(data, Engine("zero3"))
    found = compare(config, run(config, tmp_path, 1, fault=fault), expected, BOUNDS)
    assert not found.fault
    assert found.steps > 10 * BOUNDS.steps, found


def test_every_way_to_break_a_row_is_drawn() -> None:
    drawn = {draw(number).broken for number in range(320)} - {""}
    assert drawn == set(BREAKS)
