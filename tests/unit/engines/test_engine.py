"""In which precision the engines run losses and add up gradients."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from dalr_kernels.precision import multiplies_in_half
from torch import nn

from dalr_scale.distributed.world import World
from dalr_scale.engines.ddp import DDPEngine
from dalr_scale.engines.deepspeed import DeepSpeedEngine
from dalr_scale.engines.gradients import FP32GradAccumulator
from dalr_scale.engines.protocol import Engine, RunsFunctions
from dalr_scale.errors import UserError


class Recorder(RunsFunctions):
    """A model that says whether products in 16 bits are wanted while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def loss(self, states: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return states, multiplies_in_half()

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear(states)


def engine(kind: str, precision: str) -> Engine:
    model = Recorder()
    if kind == "ddp":
        optimizer = torch.optim.SGD(model.parameters())
        world = World(0, 1, torch.device("cpu"))
        return DDPEngine(model, optimizer, world, precision=precision)  # type: ignore[arg-type]
    # DeepSpeed itself is left out: what matters is what happens around its call
    found = DeepSpeedEngine.__new__(DeepSpeedEngine)
    vars(found).update(vars(SimpleNamespace(engine=model, bf16=precision == "bf16")))
    return found


@pytest.mark.parametrize("kind", ["ddp", "zero"])
@pytest.mark.parametrize(("precision", "wanted"), [("bf16", True), ("fp32", False)])
def test_a_bf16_run_multiplies_in_half_precision(kind: str, precision: str, wanted: bool) -> None:
    ran = engine(kind, precision)
    assert ran.apply(Recorder.loss, torch.ones(1, 2))[1] == wanted
    assert not multiplies_in_half(), "only inside the call"


def test_the_plain_engine_encodes_in_bf16_and_hands_on_float32() -> None:
    # The loss therefore sees float32, which says nothing about how it came about.
    states = engine("ddp", "bf16").encode(Recorder.encode, torch.full((1, 2), 0.1))
    exact = engine("ddp", "fp32").encode(Recorder.encode, torch.full((1, 2), 0.1))
    assert states.dtype == exact.dtype == torch.float32
    assert torch.equal(states, states.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())


def summed_in_chunks(count: int, *, wide: bool) -> float:
    """Gradient of a bf16 weight after `count` chunks that each say 1."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    sums = FP32GradAccumulator(layer) if wide else None
    for _ in range(count):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        if sums is not None:
            sums.add()
    if sums is not None:
        sums.write_back()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
    return float(layer.weight.grad)


def test_many_chunks_add_up_in_float32() -> None:
    assert summed_in_chunks(512, wide=True) == 512
    assert summed_in_chunks(512, wide=False) == 256  # control: bfloat16 counts no further


def test_a_parameter_without_gradient_is_left_alone() -> None:
    layers = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]).bfloat16()
    sums = FP32GradAccumulator(layers)
    layers[0](torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    sums.add()
    sums.write_back()
    assert [layer.weight.grad is None for layer in layers] == [False, True]


@pytest.mark.parametrize(
    ("stage", "aligned", "refused"), [(1, True, True), (2, False, False), (3, True, False)]
)
def test_another_layout_of_the_weights_goes_on_with_its_own_ranks_only(
    stage: int, aligned: bool, refused: bool
) -> None:
    found = DeepSpeedEngine.__new__(DeepSpeedEngine)
    found.world = World(0, 1, torch.device("cpu"))
    found.engine = SimpleNamespace(
        zero_parameter_alignment=lambda: aligned, zero_optimization_stage=lambda: stage
    )
    refusal = pytest.raises(UserError, match=r"parameter_alignment.*its 2 processes.*here are 1")
    with refusal if refused else contextlib.nullcontext():
        found._refuse_other_layout(2)
