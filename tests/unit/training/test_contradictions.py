"""Settings that contradict each other, and settings that change nothing."""

from __future__ import annotations

import dataclasses
import logging
import random
import typing
from types import SimpleNamespace
from typing import Any

import pytest
from common import as_layer
from objective_tools import terms_and_total, views, with_unmatched

from dalr_scale.config import Config, ObjectiveConfig, build_config, load_config
from dalr_scale.config.presets import PRESETS
from dalr_scale.data.stream.order import StreamPlan
from dalr_scale.errors import UserError
from dalr_scale.objective.cons import unmatched_rows
from dalr_scale.objective.registry import keys_without_effect
from dalr_scale.training.contradictions import check_contradictions, settings_without_effect
from dalr_scale.training.preflight import warn_of_streams, warn_without_effect

BASE = {
    "data.pairs": ["p.tar"],
    "data.text": ["t.tar"],
    "data.tokenizer": "vocab.txt",
    "model.architecture": {"model_type": "bert"},
    "teachers.image": "features:i",
    "teachers.text": ["features:t"],
    "teachers.tokens": ["features:k"],
    "eval.graded_dev": "dev.jsonl",
}


def config(changes: dict[str, Any] | None = None) -> Config:
    return build_config([as_layer(BASE), as_layer(changes or {})])


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"model.encoder": "x"}, "exactly one of model.encoder"),
    ({"model.architecture": {}}, "exactly one of model.encoder"),
    ({"model.architecture": {}, "model.encoder": "x"}, "model.encoder brings its own"),
    ({"data.tokenizer": ""}, "needs data.tokenizer"),
    ({"engine.kind": "ddp", "engine.ds_config": "x.json"}, "engine.kind = ddp does not use"),
    ({"engine.kind": "ddp", "engine.offload_optimizer": True}, "not with ddp"),
    ({"engine.precision": "fp64"}, "fp64 exists on --engine.kind=ddp only"),
    ({"optim.steps": 30, "optim.epochs": 2.0}, "optim.steps = 30 and optim.epochs = 2 both"),
    ({"data.pairs": [], "data.text": []}, "both empty"),
    ({"data.pairs": []}, "learns from images"),
    ({"data.pair_weights": [1, 2]}, "2 weights for 1 sources"),
    ({"data.text_weights": [1, 2]}, "2 weights for 1 sources"),
    (
        {"data.pair_fraction": 0.5, "objective.alternation": "reference"},
        "data.pair_fraction = 0.5 and objective.alternation = reference both",
    ),
    ({"eval.select": "STS12"}, "eval.select = 'STS12' is not one of the tasks graded-dev"),
    ({"eval.select": "x", "eval.graded_dev": ""}, "none: eval.tasks and eval.graded_dev"),
    ({"eval.retrieval": ["x"], "teachers.image": "open_clip:x"}, "reads stored image features"),
]


@pytest.mark.parametrize(("changes", "problem"), CONTRADICTIONS, ids=[c[1] for c in CONTRADICTIONS])
def test_settings_that_cannot_both_hold_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        check_contradictions(config(changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_control_each_preset_agrees_with_itself(preset: str) -> None:
    """A preset's own keys are not the user's settings: neither refused nor warned about."""
    both = {"objective.preset": preset, "teachers.caption": "features:c"}
    for changes in (both, both | {"data.pair_fraction": 0.5}, both | {"optim.epochs": 3.0}):
        own = config(changes)
        check_contradictions(own)
        assert not [line for line in settings_without_effect(own) if "objective." in line]


@pytest.mark.parametrize("recipe", ["quickstart", "smoke", "flickr8k_wiki"])
def test_control_recipes_have_neither(recipe: str) -> None:
    check_contradictions(load_config(recipe))
    assert settings_without_effect(load_config(recipe)) == []


IDLE: list[tuple[dict[str, Any], str]] = [
    ({"objective.soft_labels": "image", "objective.cross_weight": 0.0}, "objective.soft_labels"),
    ({"objective.rank_teacher_temperature": 0.1}, "objective.rank_teacher_temperature"),
    ({"objective.rank_loss": "listnet", "objective.listmle_eps": 1e-3}, "objective.listmle_eps"),
    ({"objective.teacher_mix": "features"}, "objective.teacher_mix"),
    ({"objective.preset": "simcse", "objective.unmatched": "roll"}, "objective.unmatched"),
    ({"objective.preset": "simcse"}, "teachers.image"),
    ({"objective.preset": "simcse", "model.grounding_width": 8}, "model.grounding_width"),
    ({"data.pair_fraction": 0.5, "objective.preset": "mcse", "objective.alternation":
      "proportional"}, "objective.alternation"),
    ({"data.builder_options": {"a": 1}}, "data.builder_options"),
    ({"data.cache": "x"}, "data.cache"),
    ({"data.crop_area": 0.5}, "data.crop_area"),
    ({"data.flip": 0.5}, "data.flip"),
    ({"teachers.caption": "features:c"}, "teachers.caption"),
    ({"teachers.text_poolers": ["mean"]}, "teachers.text_poolers"),
    ({"optim.name": "sgd", "optim.betas": [0.8, 0.9]}, "optim.betas"),
    ({"eval.graded_dev": "", "eval.every": 3}, "eval.every"),
    ({"eval.select": "graded-dev", "eval.every": 0}, "eval.select"),
    ({"objective.preset": "simcse", "eval.retrieval": ["x"]}, "eval.retrieval"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key"), IDLE, ids=[k for _, k in IDLE])
def test_a_setting_without_effect_is_named(
    changes: dict[str, Any], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_without_effect(config(changes))
    (record,) = caplog.records
    assert f"{key} (" in record.getMessage()
    assert f"{key} (" not in " ".join(settings_without_effect(config()))


def test_online_images_make_use_of_crops() -> None:
    """Control: what has an effect is not named."""
    own = config({"data.crop_area": 0.5, "data.flip": 0.5, "teachers.image": "open_clip:x"})
    assert settings_without_effect(own) == []


def random_objective(rng: random.Random) -> ObjectiveConfig:
    """A preset with a random half of its weights switched off and random choices."""
    changes: dict[str, Any] = {"preset": rng.choice(list(PRESETS))}
    for name, hint in typing.get_type_hints(ObjectiveConfig).items():
        if name.endswith("_weight") and rng.random() < 0.5:
            changes[name] = rng.choice([0.0, 0.5])
        elif typing.get_origin(hint) is typing.Literal and rng.random() < 0.3:
            changes[name] = rng.choice(typing.get_args(hint))
    if rng.random() < 0.3:
        changes["vl_margin"] = 0.0
    return build_config([{"objective": changes}]).objective


def other_value(name: str, value: Any, rng: random.Random) -> Any:
    hint = typing.get_type_hints(ObjectiveConfig)[name]
    if typing.get_origin(hint) is typing.Literal:
        return rng.choice([v for v in typing.get_args(hint) if v != value])
    return not value if isinstance(value, bool) else value / 2 + 0.11


def total(spec: ObjectiveConfig) -> float:
    v, unmatched = views(), unmatched_rows(spec, 10, 1, 2)
    filled = with_unmatched(v, unmatched)
    return float(terms_and_total(filled, filled, spec, (0.33, 0.67), 0, unmatched)[1])


@pytest.mark.parametrize("seed", range(40))
def test_what_is_said_to_change_nothing_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    spec = random_objective(rng)
    before = total(spec)
    for name in keys_without_effect(spec):
        changed = dataclasses.replace(spec, **{name: other_value(name, getattr(spec, name), rng)})
        # a weight below a group of weight 0 is idle, and so is a group without weights
        assert total(changed) == before, name


@pytest.mark.parametrize(
    ("alternation", "said"), [("reference", ["data.text is never read"]), ("proportional", [])]
)
def test_a_stream_that_is_never_read_is_warned_of(
    alternation: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer than two text batches for each paired one: the published rule pairs every step."""
    plan = StreamPlan(
        seed=1, global_batch=10, text_items=60, pair_items=60, alternation=alternation
    )
    source = SimpleNamespace(num_items=60)
    streams = SimpleNamespace(text=source, pairs=source, plan=plan, total_steps=12)
    warn_of_streams(streams)  # type: ignore[arg-type]
    assert len(caplog.messages) == len(said)
    assert all(words in message for words, message in zip(said, caplog.messages, strict=True))


def test_a_stream_that_never_fills_a_batch_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    plan = StreamPlan(seed=1, global_batch=10, text_items=7, tail="keep")
    text = SimpleNamespace(num_items=7)
    streams = SimpleNamespace(text=text, pairs=None, plan=plan, total_steps=12)
    warn_of_streams(streams)  # type: ignore[arg-type]
    (message,) = caplog.messages
    assert "data.text has 7 items: each of its batches is shorter" in message
