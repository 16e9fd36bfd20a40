"""A resume trains with the settings it was given: state from the checkpoint, the rest from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_tools import Small, in_world, small_engine, steps
from torch import Tensor

from dalr_scale.distributed.world import World
from dalr_scale.engines.ddp import DDPEngine
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from dalr_scale.engines.protocol import Engine

BEFORE: dict[str, Any] = {"lr": 1e-2, "clip": 1.0}
AFTER: dict[str, Any] = {
    "lr": 3e-2,
    "embedding_lr": 6e-3,
    "weight_decay": 0.1,
    "betas": [0.8, 0.95],
    "eps": 1e-3,
    "clip": 0.3,
}
TURN, END = 3, 6


def by_hand(settings: list[dict[str, Any]]) -> dict[str, Tensor]:
    """AdamW in float64, written out; `settings` are those of each step."""
    model = Small().double()
    moments = {name: [torch.zeros_like(p)] * 2 for name, p in model.named_parameters()}
    for step, optim in enumerate(settings):
        beta1, beta2 = optim.get("betas", (0.9, 0.999))
        named = list(model.named_parameters())
        grads = torch.autograd.grad(model.loss(step), [p for _, p in named])
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        factor = min(1.0, optim["clip"] / (norm + 1e-6))
        for (name, p), g in zip(named, grads, strict=True):
            g = g * factor
            m, v = moments[name]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            moments[name] = [m, v]
            lr = optim.get("embedding_lr", optim["lr"]) if name == "words.weight" else optim["lr"]
            decay = optim.get("weight_decay", 0.0) if p.ndim > 1 else 0.0
            hat = (v / (1 - beta2 ** (step + 1))).sqrt() + optim.get("eps", 1e-6)
            p.data = p.data * (1 - lr * decay) - lr * m / (1 - beta1 ** (step + 1)) / hat
    return {name: p.data.float() for name, p in model.named_parameters()}


@dataclass(frozen=True)
class Case:
    kind: str
    offload: bool
    ranks: int
    later: int
    change: str

    @property
    def name(self) -> str:
        offload = "-offload" if self.offload else ""
        return f"{self.kind}{offload}-{self.ranks}-then-{self.later}-{self.change}"

    def engine(self, world: World, optim: dict[str, Any]) -> Engine:
        own = {"kind": self.kind, "offload_optimizer": self.offload}
        return small_engine(world, {"engine": own, "optim": optim})


CHANGES = {
    "more-groups": (BEFORE, AFTER),
    "fewer-groups": (AFTER, BEFORE),
    "same-groups": (AFTER, AFTER | {"lr": 1e-2, "clip": 0.5, "eps": 1e-6}),
    "control-none": (AFTER, AFTER),
}
CASES = [
    Case(kind, offload, ranks, later, change)
    for kind, offload, ranks, later in (
        ("ddp", False, 1, 2),
        ("zero1", False, 2, 2),
        ("zero2", False, 2, 1),
        ("zero2", True, 1, 1),
        ("zero3", False, 2, 2),
        ("zero3", True, 1, 2),
    )
    for change in CHANGES
]


def save(world: World, directory: Path) -> None:
    for case in CASES:
        if case.ranks == world.size:
            optim = CHANGES[case.change][0]
            own = case.engine(world, optim)
            steps(own, range(TURN), optim["lr"])
            world.barrier()
            own.save(directory / case.name)


def go_on(world: World, directory: Path) -> None:
    for case in CASES:
        if case.later == world.size:
            optim = CHANGES[case.change][1]
            own = case.engine(world, optim)
            own.load(directory / case.name, case.ranks)
            steps(own, range(TURN, END), optim["lr"])
            state = own.full_state("")
            if world.rank == 0:
                torch.save(state, directory / f"{case.name}.pt")
    if world.size == 1:
        refuse_others(world, directory)


def refuse_others(world: World, directory: Path) -> None:
    """Loads checkpoints of a model with one column more."""
    for kind in ("ddp", "zero2", "zero3"):
        case = next(case for case in CASES if case.kind == kind)
        own = small_engine(world, {"engine": {"kind": kind}}, width=4)
        try:
            own.load(directory / case.name, case.ranks)
        except UserError as error:
            (directory / f"{kind}.refusal").write_text(str(error))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("changed")
    for ranks, action in ((1, save), (2, save), (1, go_on), (2, go_on)):
        assert not (errors := in_world(ranks, action, directory)), errors
    return directory


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_resume_trains_with_the_new_settings(case: Case, directory: Path) -> None:
    before, after = CHANGES[case.change]
    found = torch.load(directory / f"{case.name}.pt")
    wanted = by_hand([before] * TURN + [after] * (END - TURN))
    unchanged = by_hand([before] * END)
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=2e-5, atol=2e-6)
        moved = float((values - unchanged[name]).abs().max())
        assert moved > 1e-3 or before is after, "control: the settings matter"


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_other_parameters_are_refused_by_name(kind: str, directory: Path) -> None:
    found = (directory / f"{kind}.refusal").read_text()
    assert "linear.weight (5x3 there, 4x3 here), linear.bias (5 there, 4 here)" in found
    assert "--run.name" in found and "\n" not in found


def test_a_state_that_numbers_its_parameters_still_loads(tmp_path: Path) -> None:
    """As plain data parallelism wrote it before; only while the groups are the same."""
    world = World(0, 1, torch.device("cpu"))

    def plain(optim: dict[str, Any]) -> DDPEngine:
        engine = small_engine(world, {"engine": {"kind": "ddp"}, "optim": optim})
        assert isinstance(engine, DDPEngine)
        return engine

    first = plain(AFTER)
    steps(first, range(TURN), AFTER["lr"])
    state = {"model": first.module.state_dict(), "optimizer": first.optimizer.state_dict()}
    torch.save(state, tmp_path / "engine.pt")
    later = plain(AFTER | {"eps": 1e-6})
    later.load(tmp_path, 1)
    steps(later, range(TURN, END), AFTER["lr"])
    wanted = by_hand([AFTER] * TURN + [AFTER | {"eps": 1e-6}] * (END - TURN))
    for name, values in later.full_state("").items():
        torch.testing.assert_close(values, wanted[name], rtol=2e-5, atol=2e-6)
    with pytest.raises(UserError, match="numbers its parameters"):
        plain(BEFORE).load(tmp_path, 1)
