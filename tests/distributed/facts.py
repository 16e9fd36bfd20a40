"""What a world of ranks shows besides its numbers: traffic, and how bad batches end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from cases import LENGTH, WIDTH, Case, build, learning_rate, step_inputs
from torch import Tensor

from dalr_scale.config import TeachersConfig
from dalr_scale.dist.gradcache import StepInputs, backward_global_batch
from dalr_scale.dist.traffic import TrafficCounter
from dalr_scale.dist.world import World
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import TeacherBatch
from dalr_scale.predict import column_traffic, parameter_traffic

TRAFFIC = [
    Case(2, preset, kind, batch, chunks)
    for preset in ("simcse", "dalr-reference", "dalr")
    for kind in ("zero1", "zero2", "zero3")
    for batch in ("pair", "text")
    for chunks in ("one", "four")
    if kind == "zero2" or (preset, batch) == ("dalr", "pair")
]


def traffic(case: Case, world: World) -> dict[str, Any]:
    """Bytes and collectives of one step, and what was predicted for it."""
    engine, config = _engine(case, world)
    teachers = TeachersConfig(
        image="features:i", caption="features:c", text=("features:a", "features:b")
    )
    config = dataclasses.replace(config, teachers=teachers)
    inputs = _stored(step_inputs(case, config, world, 0, engine.module))
    with TrafficCounter() as counter:
        backward_global_batch(engine, inputs)
        engine.step(learning_rate("sgd"))
    paired = case.batch == "pair"
    model: Any = engine.module
    predicted = column_traffic(config, model, world.size, paired=paired)
    return {
        "columns": counter.total("columns"),
        "columns predicted": sum(predicted.values()),
        "engine": counter.total("engine"),
        "engine predicted": parameter_traffic(config, model, world.size),
        "engine calls": sum(n for (group, _), n in counter.calls.items() if group == "engine"),
    }


def _engine(case: Case, world: World) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return build(case, world)


def _stored(inputs: StepInputs) -> StepInputs:
    """The same batch with features as shards store them."""

    def half(features: Tensor | None) -> Tensor | None:
        return None if features is None else features.half()

    t = inputs.teachers
    teachers = dataclasses.replace(
        t, image=half(t.image), caption=half(t.caption), text=[e.half() for e in t.text]
    )
    return dataclasses.replace(inputs, teachers=teachers)


def another_kind(inputs: StepInputs) -> StepInputs:
    ids = torch.full_like(inputs.teachers.ids, -1)
    return dataclasses.replace(inputs, teachers=TeacherBatch(ids))


def fewer_rows(inputs: StepInputs) -> StepInputs:
    return _rows(inputs, 3)


def no_rows(inputs: StepInputs) -> StepInputs:
    return _rows(inputs, 0)


def another_width(inputs: StepInputs) -> StepInputs:
    assert inputs.teachers.image is not None
    image = inputs.teachers.image[:, 1:]
    return dataclasses.replace(inputs, teachers=dataclasses.replace(inputs.teachers, image=image))


def another_step(inputs: StepInputs) -> StepInputs:
    return dataclasses.replace(inputs, step=7)


def _rows(inputs: StepInputs, rows: int) -> StepInputs:
    own = slice(0, rows)
    t = inputs.teachers
    assert t.image is not None and t.caption is not None
    teachers = TeacherBatch(
        t.ids[own], True, t.image[own], t.caption[own], [e[own] for e in t.text],
        [e[own] for e in t.tokens], [m[own] for m in t.token_masks],
    )  # fmt: skip
    return dataclasses.replace(
        inputs, input_ids=inputs.input_ids[own], attention_mask=inputs.attention_mask[own],
        teachers=teachers,
    )  # fmt: skip


DISAGREEMENTS: dict[str, Callable[[StepInputs], StepInputs]] = {
    f.__name__: f for f in (another_kind, fewer_rows, no_rows, another_width, another_step)
}


def disagreement(change: Callable[[StepInputs], StepInputs], world: World) -> list[str] | None:
    """What every rank says when the last one holds another batch."""
    engine, config = _engine(Case(2, "dalr", chunks="four"), world)
    inputs = step_inputs(Case(2, "dalr", chunks="four"), config, world, 0, engine.module)
    if world.rank == world.size - 1:
        inputs = change(inputs)
    try:
        backward_global_batch(engine, inputs)
        said = "no error"
    except UserError as error:
        said = str(error)
    return world.gather_objects(said)


def identical_rows(world: World) -> dict[str, float]:
    """A batch in which all rows of all ranks are the same sentence and picture."""
    case = Case(2, "dalr", chunks="four")
    engine, config = _engine(case, world)
    inputs = step_inputs(case, config, world, 0, engine.module)
    rows = inputs.rows

    def same(*shape: int) -> Tensor:
        return torch.ones(rows, *shape, dtype=torch.float64)

    teachers = TeacherBatch(
        torch.zeros(rows, dtype=torch.long), True, same(WIDTH), same(WIDTH),
        [same(WIDTH), same(WIDTH)], [same(LENGTH - 1, WIDTH)], [same(LENGTH - 1)],
    )  # fmt: skip
    ids = torch.full((rows, LENGTH), 3)
    inputs = dataclasses.replace(
        inputs, input_ids=ids, attention_mask=torch.ones_like(ids), teachers=teachers
    )
    loss, _ = backward_global_batch(engine, inputs)
    norm = engine.step(0.0).grad_norm_preclip
    return {"loss": float(loss), "finite": float(math.isfinite(norm))}


def collect(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"traffic": {c.name: traffic(c, world) for c in TRAFFIC}}
    said = {name: disagreement(change, world) for name, change in DISAGREEMENTS.items()}
    return found | {"disagreement": said, "identical rows": identical_rows(world)}
