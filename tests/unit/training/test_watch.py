"""The invariant watch: what it stops, what it warns of, and what it leaves alone."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dalr_scale.errors import TrainingError
from dalr_scale.training.watch import (
    MIN_STEPS,
    STATE_STATISTICS,
    WINDOW,
    Watch,
    state_statistics,
    strongest_dropout,
)

LEARNED = {"con": 0.5}
GOOD = {"view_gap": 0.3, "neighbor_cosine": 0.4}


def encoder(dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout))


def messages(
    caplog: pytest.LogCaptureFixture,
    values: dict,
    found: dict,
    *,
    steps: int = MIN_STEPS,
    dropout: float = 0.1,
) -> list[str]:
    watch = Watch(encoder(dropout), prints_warnings=True)
    with caplog.at_level(logging.WARNING, "dalr_scale.training.watch"):
        for step in range(1, steps + 1):
            watch.check_means(values, found, columns=64, step=step)
        watch.finish(steps)
    return [record.getMessage() for record in caplog.records]


def test_signs_tell_equal_views_and_one_vector() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 6, 8)
    found = state_statistics(states)
    assert set(found) == set(STATE_STATISTICS)
    assert found["view_gap"] == (states[0] - states[1]).abs().max()
    assert found["neighbor_cosine"] < 0.9
    same = states[:1, :1].expand(2, 6, 8)
    assert state_statistics(same)["view_gap"] == 0
    assert state_statistics(same)["neighbor_cosine"] == pytest.approx(1.0)
    assert state_statistics(states[:, :1])["neighbor_cosine"] == 0, "a single row has no neighbor"


def test_equal_views_stop_a_run_that_is_configured_with_dropout(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(TrainingError, match=r"step 1: both views .* dropout 0.1: it is not appl"):
        messages(caplog, LEARNED, GOOD | {"view_gap": 0.0})


def test_an_encoder_without_dropout_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = messages(caplog, LEARNED, GOOD | {"view_gap": 0.0}, dropout=0.0)
    assert "the encoder has no dropout" in message


def test_a_collapsed_encoder_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    stuck = {"con": math.log(64)}
    (message,) = messages(caplog, stuck, GOOD | {"neighbor_cosine": 0.99999})
    assert "all sentences get nearly the same vector" in message
    assert "ln N = 4.159" in message


def test_a_loss_that_stays_at_chance_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = messages(caplog, {"con": math.log(64)}, GOOD, steps=3 * MIN_STEPS)
    assert f"step {MIN_STEPS}" in message
    assert "has not left ln N" in message


def test_a_run_shorter_than_the_patience_is_judged_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(messages(caplog, {"con": math.log(64)}, GOOD, steps=WINDOW)) == 1
    caplog.clear()
    assert not messages(caplog, {"con": math.log(64)}, GOOD, steps=WINDOW - 1), "too few to judge"


def test_a_loss_that_is_back_at_chance_is_called_diverged(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(encoder(), prints_warnings=True)
    for step in range(1, 2 * MIN_STEPS):
        loss = 1.0 if step < 5 else math.log(64)
        watch.check_means({"con": loss}, GOOD, columns=64, step=step)
    (record,) = caplog.records
    assert f"step {WINDOW + 4}:" in record.getMessage(), (
        "without waiting: there was something to lose"
    )
    assert "was 1.000 at step 1 and is back at ln N" in record.getMessage()
    assert "lower optim.lr" in record.getMessage()


def test_a_run_that_learns_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert not messages(caplog, LEARNED, GOOD, steps=2 * MIN_STEPS)


def test_other_ranks_do_not_repeat_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(encoder(0.0), prints_warnings=False)
    watch.check_means(LEARNED, GOOD | {"view_gap": 0.0}, columns=4, step=1)
    assert not caplog.records


def test_a_part_in_evaluation_mode_is_refused_by_name() -> None:
    module = encoder().train()
    watch = Watch(module, prints_warnings=True)
    watch.require_training_mode(module, 1)
    module[1].eval()
    with pytest.raises(TrainingError, match="step 7: 1 is in evaluation mode"):
        watch.require_training_mode(module, 7)


def test_gradients_are_looked_at_when_the_terms_change_and_not_again() -> None:
    calls: list[int] = []

    def unused_gradients() -> dict[str, float]:
        calls.append(1)
        return {"head.weight": 0.0}

    engine = SimpleNamespace(module=encoder(), unused_gradients=unused_gradients)
    watch = Watch(encoder(), prints_warnings=True)
    for step, kind in enumerate(("text", "text", "pair", "pair", "text", "text", "pair")):
        watch.check_gradients(engine, kind, step + 1)  # type: ignore[arg-type]
    assert len(calls) == 3, "two paired steps before the first text step that follows one"


def test_a_gradient_from_an_earlier_step_is_refused_by_name() -> None:
    engine = SimpleNamespace(module=encoder(), unused_gradients=lambda: {"a": 0.0, "b": 0.25})
    watch = Watch(encoder(), prints_warnings=True)
    watch.check_gradients(engine, "pair", 1)
    with pytest.raises(TrainingError, match=r"step 2: no term of this text batch reaches b.*0\.25"):
        watch.check_gradients(engine, "text", 2)


def test_dropout_of_attention_alone_is_found() -> None:
    config = SimpleNamespace(attention_probs_dropout_prob=0.2)
    module = nn.Sequential(nn.Linear(2, 2))
    assert strongest_dropout(module) == 0.0
    module.backbone = SimpleNamespace(config=config)  # type: ignore[assignment]
    assert strongest_dropout(module) == 0.2
