"""What a world of ranks shows besides its numbers: traffic, order, dropout, and bad batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from cases import KINDS, LENGTH, WIDTH, Case, Inputs, build, learning_rate, sabotage, step_inputs
from torch import Tensor

from dalr_scale.config import TeachersConfig
from dalr_scale.distributed.traffic import TrafficCounter
from dalr_scale.distributed.world import World
from dalr_scale.errors import UserError
from dalr_scale.estimate.predict import column_traffic, parameter_traffic
from dalr_scale.global_batch import step as global_step
from dalr_scale.global_batch import task as global_task
from dalr_scale.global_batch.columns import ColumnGather

TRAFFIC = [
    Case(2, preset, kind, batch, chunks)
    for preset in ("simcse", "dalr-reference", "dalr")
    for kind in ("zero1", "zero2", "zero3")
    for batch in ("pair", "text")
    for chunks in ("one", "four")
    if kind == "zero2" or (preset, batch) == ("dalr", "pair")
] + [Case(2, "dalr", "ddp", "pair", chunks) for chunks in ("one", "four")]
REPEATED = [
    Case(2, "dalr", kind, "pair", "four", fault="one reduction per chunk")
    for kind in ("zero1", "zero2", "zero3")
]
REPLAYS = [
    *(Case(2, "dalr", kind, "pair", "four", "rank") for kind in KINDS),
    *(Case(2, "dalr", kind, "pair", "four", "rank", "checkpoint") for kind in ("zero2", "zero3")),
]
ALIKE = [Case(2, "dalr", kind, chunks="four") for kind in ("ddp", "zero2")]


def traffic(case: Case, world: World) -> dict[str, Any]:
    """Bytes and collectives of one step, and what was predicted for it."""
    engine, config = _engine(case, world)
    teachers = TeachersConfig(
        image="features:i", caption="features:c", text=("features:a", "features:b")
    )
    config = dataclasses.replace(config, teachers=teachers)
    inputs = _stored(step_inputs(case, world, 0))
    with sabotage(case.fault), TrafficCounter() as counter:
        inputs.backward(engine)
        engine.step(learning_rate("sgd"))
    paired = case.batch == "pair"
    model: Any = engine.module
    predicted = column_traffic(config, model, world.size, paired=paired)
    return {
        "columns": counter.total("columns"),
        "columns predicted": sum(predicted.values()),
        "engine": counter.total("engine"),
        "engine predicted": parameter_traffic(config, model, world.size),
        "engine calls": {op: n for (group, op), n in counter.calls.items() if group == "engine"},
    }


def _engine(case: Case, world: World) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return build(case, world)


def changed(inputs: Inputs, **fields: Any) -> Inputs:
    """The same step with other fields of its batch."""
    return dataclasses.replace(inputs, batch=dataclasses.replace(inputs.batch, **fields))


def _stored(inputs: Inputs) -> Inputs:
    """The same batch with features as shards store them."""
    halves = {role: values.half() for role, values in inputs.batch.features.items()}
    return changed(inputs, features=halves)


def another_kind(inputs: Inputs) -> Inputs:
    ids = torch.full_like(inputs.batch.image_ids, -1)
    return changed(
        inputs, kind="text", image_ids=ids, features={}, token_features=(), token_masks=()
    )


def fewer_rows(inputs: Inputs) -> Inputs:
    return _rows(inputs, 3)


def no_rows(inputs: Inputs) -> Inputs:
    return _rows(inputs, 0)


def another_width(inputs: Inputs) -> Inputs:
    features = inputs.batch.features
    return changed(inputs, features=features | {"image": features["image"][:, 1:]})


def another_step(inputs: Inputs) -> Inputs:
    return changed(inputs, step=7)


def _rows(inputs: Inputs, rows: int) -> Inputs:
    return dataclasses.replace(inputs, batch=inputs.batch.map_tensors(lambda x: x[:rows]))


DISAGREEMENTS: dict[str, Callable[[Inputs], Inputs]] = {
    f.__name__: f for f in (another_kind, fewer_rows, no_rows, another_width, another_step)
}


def disagreement(change: Callable[[Inputs], Inputs], world: World) -> list[str] | None:
    """What every rank says when the last one holds another batch."""
    engine, _ = _engine(Case(2, "dalr", chunks="four"), world)
    inputs = step_inputs(Case(2, "dalr", chunks="four"), world, 0)
    if world.rank == world.size - 1:
        inputs = change(inputs)
    try:
        inputs.backward(engine)
        said = "no error"
    except UserError as error:
        said = str(error)
    return world.gather_objects(said)


def unlisted_collective(world: World) -> str:
    """What the counter says about a collective whose volume nobody has written down."""
    whole = torch.zeros(world.size)
    try:
        with TrafficCounter():
            dist.all_to_all_single(torch.empty(world.size), whole)
    except RuntimeError as error:
        return str(error)
    return "no error"


def replay(case: Case, world: World) -> dict[str, float]:
    """Dropout keyed by rank: how far second passes are from first ones, and ranks from each other.

    All ranks encode the same rows, so that only the masks can differ.
    """
    engine, _ = _engine(case, world)
    inputs = step_inputs(case, World(0, world.size, world.device), 0)
    plain = global_task.seed_dropout
    calls = itertools.count()

    def moving(*key: int) -> None:
        plain(*key, next(calls))

    def without_rank(seed: int, step: int, rank: int, chunk: int) -> None:
        plain(seed, step, chunk)

    passes = encoded(engine, inputs)
    found = {"second pass": _second_pass(passes), "ranks": _between_ranks(passes, world)}
    found["gradient norm"] = engine.step(0.0).grad_norm_preclip
    with mock.patch.object(global_task, "seed_dropout", moving):
        found["second pass, moving key"] = _second_pass(encoded(engine, inputs))
    with mock.patch.object(global_task, "seed_dropout", without_rank):
        found["ranks, key without rank"] = _between_ranks(encoded(engine, inputs), world)
    return found


def encoded(engine: Any, inputs: Inputs) -> list[Tensor]:
    """The states of every encoding of a step, in the order in which they are made."""
    seen: list[Tensor] = []
    plain = type(engine).apply

    def apply(self: Any, function: Any, *values: Any) -> Any:
        result = plain(self, function, *values)
        if function.__name__ == "encode":
            seen.append(torch.cat(list(result.values())).detach().clone())
        return result

    with mock.patch.object(type(engine), "apply", apply):
        inputs.backward(engine)
    return seen


def _second_pass(passes: list[Tensor]) -> float:
    """Four chunks in order, then all but the last backwards: the largest difference of a pair."""
    assert len(passes) == 7
    pairs = zip(passes[:3], reversed(passes[4:]), strict=True)
    return max(float((first - second).abs().max()) for first, second in pairs)


def _between_ranks(passes: list[Tensor], world: World) -> float:
    """The smallest, over chunks, of the largest difference between two ranks' states."""
    everyone = [torch.empty_like(torch.stack(passes[:4])) for _ in range(world.size)]
    dist.all_gather(everyone, torch.stack(passes[:4]))
    return float((everyone[0] - everyone[1]).abs().amax(dim=(1, 2)).min())


class LateGather(ColumnGather):
    """Starts every gather only when its columns are wanted."""

    def __init__(self, order: Tensor) -> None:
        super().__init__(order)
        self._late: list[Callable[[], None]] = []

    def add(self, name: str, rows: Tensor) -> None:
        self._late.append(lambda: super(LateGather, self).add(name, rows))

    def add_chunk(self, columns: dict[str, Tensor], chunk: slice) -> None:
        self._late.append(lambda: super(LateGather, self).add_chunk(columns, chunk))

    def wait(self) -> dict[str, Tensor]:
        for start in self._late:
            start()
        return super().wait()


def order_of_events(world: World, gather: type[ColumnGather]) -> list[str]:
    """Tasks of the engine, and gathers that are left running, as a step starts them."""
    case = Case(2, "dalr", chunks="four")
    engine, _ = _engine(case, world)
    inputs = step_inputs(case, world, 0)
    events: list[str] = []
    apply, all_gather = type(engine).apply, dist.all_gather_into_tensor

    def seen_apply(self: Any, function: Any, *values: Any) -> Any:
        events.append(function.__name__)
        return apply(self, function, *values)

    def seen_gather(output: Tensor, local: Tensor, **options: Any) -> Any:
        if options.get("async_op"):
            events.append(f"gather {local.numel()}")
        return all_gather(output, local, **options)

    with (
        mock.patch.object(type(engine), "apply", seen_apply),
        mock.patch.object(dist, "all_gather_into_tensor", seen_gather),
        mock.patch.object(global_step, "ColumnGather", gather),
    ):
        inputs.backward(engine)
    return events


def identical_rows(case: Case, world: World) -> dict[str, float]:
    """A batch in which all rows of all ranks are the same sentence and image, views included."""
    engine, _ = _engine(case, world)
    module: Any = engine.module
    module.encoder.perturbed = False  # cosines of exactly one
    inputs = step_inputs(case, world, 0)
    rows = inputs.batch.rows

    def same(*shape: int) -> Tensor:
        return torch.ones(rows, *shape, dtype=case.dtype)

    ids = torch.full((rows, LENGTH), 3)
    inputs = changed(
        inputs,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        image_ids=torch.zeros(rows, dtype=torch.long),
        features={role: same(WIDTH) for role in ("image", "caption", "text0", "text1")},
        token_features=[same(LENGTH - 1, WIDTH)],
        token_masks=[same(LENGTH - 1)],
    )
    loss, _ = inputs.backward(engine)
    norm = engine.step(0.0).grad_norm_preclip
    with torch.no_grad():
        states = module.encoder(ids[:2], torch.ones_like(ids[:2]))
    apart = float((states[0] - states[1]).abs().max())
    return {"loss": float(loss), "finite": float(math.isfinite(norm)), "views apart": apart}


def collect(world: World) -> dict[str, Any]:
    return {
        "traffic": {c.name: traffic(c, world) for c in TRAFFIC + REPEATED},
        "disagreement": {n: disagreement(change, world) for n, change in DISAGREEMENTS.items()},
        "identical rows": {c.name: identical_rows(c, world) for c in ALIKE},
        "unlisted": unlisted_collective(world),
        "replay": {c.name: replay(c, world) for c in REPLAYS},
        "events": {g.__name__: order_of_events(world, g) for g in (ColumnGather, LateGather)},
    }
