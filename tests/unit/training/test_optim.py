"""Learning rate as a function of the step, parameter groups, and the optimizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from dalr_scale.config import OptimConfig
from dalr_scale.data.stream.order import StreamPlan
from dalr_scale.engines.protocol import set_learning_rate
from dalr_scale.errors import UserError
from dalr_scale.training.optim import (
    build_optimizer,
    count_steps,
    learning_rate,
    parameter_groups,
)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_the_rate_falls_in_a_line_to_zero_after_the_last_step(total: int) -> None:
    optim = OptimConfig(lr=0.5)
    rates = [learning_rate(optim, step, total) for step in range(total)]
    assert rates == [pytest.approx(0.5 * (total - step) / total) for step in range(total)]
    assert rates[0] == 0.5 and rates[-1] > 0
    assert learning_rate(optim, total, total) == 0


@pytest.mark.parametrize(("warmup", "total"), [(1, 10), (4, 10), (9, 10)])
def test_the_rate_climbs_through_the_warm_up_first(warmup: int, total: int) -> None:
    optim = OptimConfig(lr=0.5, warmup=warmup)
    rates = [learning_rate(optim, step, total) for step in range(total)]
    assert rates[:warmup] == [pytest.approx(0.5 * (s + 1) / warmup) for s in range(warmup)]
    assert rates[warmup] == 0.5 == max(rates)
    falling = [0.5 * (total - s) / (total - warmup) for s in range(warmup, total)]
    assert rates[warmup:] == [pytest.approx(rate) for rate in falling]
    assert rates[-1] > 0


@pytest.mark.parametrize(("warmup", "steps"), [(12, 12), (13, 12), (10**9, 12), (1, 1)])
def test_a_warm_up_to_the_end_is_refused(warmup: int, steps: int) -> None:
    """The rate would be reached in the last step at best, and never fall."""
    problem = f"optim.warmup = {warmup} leaves none of the run's {steps} steps"
    with pytest.raises(UserError, match=problem):
        count_steps(OptimConfig(steps=steps, warmup=warmup), 5)
    with pytest.raises(UserError, match=problem):
        count_steps(OptimConfig(epochs=1, warmup=warmup), steps)
    optim = OptimConfig(steps=steps, warmup=steps - 1)
    rates = [learning_rate(optim, step, count_steps(optim, 5)) for step in range(steps)]
    assert max(rates) == optim.lr == rates[-1]  # control: one step of decay, from the peak


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 10), (1.1, 11), (0.3, 3), (0.31, 4), (2.7, 27), (1e-300, 1)]
)
def test_epochs_are_counted_as_written(epochs: float, steps: int) -> None:
    """1.1 x 10 is 11.000000000000002 in binary, which is no twelfth step."""
    assert count_steps(OptimConfig(epochs=epochs), 10) == steps
    assert count_steps(OptimConfig(epochs=epochs, steps=7), 10) == 7


@pytest.mark.parametrize("alternation", ["proportional", "reference"])
def test_an_epoch_has_the_batches_of_one_pass_over_each_stream(alternation: Any) -> None:
    """As the help says: 6 text and 4 paired batches; `reference` with k = 1 pairs all ten."""
    plan = StreamPlan(
        seed=1, global_batch=5, text_items=30, pair_items=20, alternation=alternation
    )  # fmt: skip
    steps = count_steps(OptimConfig(epochs=1), plan.steps_per_epoch)
    text, pair = plan.batches_before(steps)
    assert (steps, text + pair) == (10, 10)
    assert (text, pair) == ((6, 4) if alternation == "proportional" else (0, 10))


def test_the_rate_equals_the_scheduler_that_the_recipes_name() -> None:
    """The published scripts use transformers' linear schedule without warm-up."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 20)
    for step in range(20):
        assert learning_rate(OptimConfig(lr=0.3), step, 20) == pytest.approx(
            schedule.get_last_lr()[0]
        )
        optimizer.step()
        schedule.step()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def names(model: nn.Module, group: dict) -> set[str]:
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Small()
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    found = {group["weight_decay"]: names(model, group) for group in groups}
    assert found == {
        0.1: {"words.weight", "linear.weight"},
        0.0: {"linear.bias", "norm.weight", "norm.bias"},
    }


def test_without_decay_there_is_one_group_of_all_trainable_parameters() -> None:
    model = Small()
    (group,) = parameter_groups(model, OptimConfig())
    assert names(model, group) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_embeddings_have_their_own_rate_at_every_step() -> None:
    model = Small()
    optim = OptimConfig(lr=1e-3, embedding_lr=4e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, optim)
    for step in range(5):
        rate = learning_rate(optim, step, 5)
        set_learning_rate(optimizer, rate)
        for group in optimizer.param_groups:
            times = 4 if "words.weight" in names(model, group) else 1
            assert group["lr"] == pytest.approx(times * rate)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 5


def test_settings_reach_the_optimizer() -> None:
    optim = OptimConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.2)
    adam = build_optimizer(Small(), optim)
    assert isinstance(adam, torch.optim.AdamW)
    for group in adam.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-5, 0.1)
    sgd = build_optimizer(Small(), dataclasses.replace(optim, name="sgd"))
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0
