"""Several teachers: their weights, and when their tokens are added up."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny_config
from objective_tools import ROWS, WIDTH, objective, views
from torch import Tensor, nn

from dalr_scale.config import Config, ModelConfig, ObjectiveConfig, build_config
from dalr_scale.distributed.world import World
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.models.tokenizer import load_tokenizer
from dalr_scale.objective.g2l import GlobalToLocal
from dalr_scale.objective.views import LossBatch
from dalr_scale.teachers.mixing import resolve_token_mix, text_weights, token_weights
from dalr_scale.teachers.online import OnlineTeachers, OnlineText
from dalr_scale.training.build import build_model, build_streams
from dalr_scale.training.report import arithmetic


def config(preset: str = "dalr", **teachers: Any) -> Config:
    return build_config([{"objective": {"preset": preset}, "teachers": teachers}])


# Weights


@pytest.mark.parametrize("preset", ["dalr", "dalr-reference"])
@pytest.mark.parametrize(
    ("teachers", "weights"),
    [(["a"], (1.0,)), (["a", "b"], (0.33, 0.67)), (["a", "b", "c"], (1 / 3, 1 / 3, 1 / 3))],
)
def test_two_sentence_teachers_have_the_published_weights(
    preset: str, teachers: list[str], weights: tuple[float, ...]
) -> None:
    assert text_weights(config(preset, text=teachers)) == weights


def test_configured_weights_win() -> None:
    assert text_weights(config(text=["a", "b"], text_weights=[0.25, 0.75])) == (0.25, 0.75)


def test_token_teachers_are_weighted_by_position() -> None:
    assert token_weights(config(text=["a", "b"], tokens=["c"])) == (1.0,)
    assert token_weights(config(text=["a", "b"], tokens=["c", "b"])) == (0.33, 0.67)
    chosen = config(text=["a", "b"], text_weights=[0.25, 0.75], tokens=["c", "d"])
    assert token_weights(chosen) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [
        (["a"], ["a", "b"], "teachers.tokens names 2 teachers and teachers.text 1"),
        (["a", "b", "c"], ["a", "b"], "teachers.tokens names 2 teachers and teachers.text 3"),
        (["a", "b"], ["b", "a"], "teachers.tokens has 'b' at another position"),
    ],
)
def test_token_teachers_without_a_clear_weight_are_refused(
    text: list[str], tokens: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        token_weights(config(text=text, tokens=tokens))


def test_a_run_with_two_teachers_uses_and_shows_their_weights(tiny_data: Path) -> None:
    two = tiny_config(tiny_data, {"teachers.text": ["features:t0", "features:cap"]})
    streams = build_streams(two)
    model = build_model(two, streams, World(0, 1, torch.device("cpu"))).model
    assert model.spec.text_weights == (0.33, 0.67)
    assert "0.33 features:t0, 0.67 features:cap" in arithmetic(two, streams, model, 1)


# Tokens

SAME = {"tokenizer_sha256": "x", "max_length": 32, "width": 12}


def online(*kinds: dict[str, Any]) -> OnlineTeachers:
    """Token teachers known by their facts."""
    teachers = [types.SimpleNamespace(facts=kind) for kind in kinds]
    texts = [OnlineText(teacher, (f"tokens{k}",)) for k, teacher in enumerate(teachers)]
    widths = {f"tokens{k}": kind["width"] for k, kind in enumerate(kinds)}
    return OnlineTeachers(texts=texts, widths=widths, num_tokens=len(kinds))


def resolved(preset: str, *kinds: dict[str, Any]) -> str:
    names = [f"hf:{k}" for k in range(len(kinds))]
    return resolve_token_mix(config(preset, tokens=names), None, online(*kinds)).g2l_mix


@pytest.mark.parametrize("preset", ["dalr", "dalr-reference"])
def test_tokens_of_one_tokenizer_and_width_are_mixed(preset: str) -> None:
    assert resolved(preset, SAME, SAME) == "features"


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_sha256": "y"}, {"max_length": 31}, {"width": 13}
    ],
    ids=str,
)  # fmt: skip
def test_other_tokens_are_scored_apart_or_refused(change: dict[str, Any]) -> None:
    assert resolved("dalr", SAME, SAME | change) == "losses"
    with pytest.raises(UserError, match=r"cannot be mixed.*objective.g2l_mix=losses"):
        resolved("dalr-reference", SAME, SAME | change)


def test_an_unknown_tokenizer_is_not_taken_for_the_same() -> None:
    unknown = SAME | {"tokenizer_sha256": None}
    assert resolved("dalr", unknown, unknown) == "losses"
    with pytest.raises(UserError, match="not recorded"):
        resolved("dalr-reference", unknown, unknown)


def test_one_token_teacher_needs_no_decision() -> None:
    assert resolved("dalr", SAME) == "auto"


@pytest.mark.parametrize(("width", "mix", "heads"), [(12, "features", 1), (16, "losses", 2)])
def test_models_that_give_tokens_decide_by_what_they_are(
    tiny_data: Path, tmp_path: Path, width: int, mix: str, heads: int
) -> None:
    """From model directories to the loss: the second teacher is as wide as the first, or not."""
    architecture = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = load_tokenizer(tiny_data / "vocab.txt")
    for name, size in (("a", 12), ("b", width)):
        sizes = {"hidden_size": size, "intermediate_size": 16, "max_position_embeddings": 40}
        SentenceEncoder.from_config(architecture | sizes, tokenizer, "mean").save(tmp_path / name)
    specs = [f"hf:{tmp_path / name}" for name in "ab"]
    changes = {"teachers.text": specs, "teachers.tokens": specs}
    two = tiny_config(tiny_data, changes | {"teachers.text_poolers": ["mean", "mean"]})
    parts = build_model(two, build_streams(two), World(0, 1, torch.device("cpu")))
    spec = parts.model.spec
    assert (spec.objective.g2l_mix, spec.token_weights) == (mix, (0.33, 0.67))
    assert len(parts.model.token_projections) == heads


def g2l(tokens: Sequence[Tensor], weights: Sequence[float], spec: ObjectiveConfig) -> float:
    own = views()
    mask = own.token_masks[0]
    own = dataclasses.replace(
        own, tokens=tokens, token_masks=[mask] * len(tokens), z1_tokens=[own.z1] * len(tokens)
    )
    return float(GlobalToLocal().loss(spec, LossBatch(own, own, token_weights=weights)))


def test_mixed_tokens_and_added_losses() -> None:
    draw = torch.Generator().manual_seed(5)
    first, second = (
        torch.randn(ROWS, 4, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    mixing, adding = objective(g2l_mix="features"), objective(g2l_mix="losses")
    alone = [g2l([tokens], (1.0,), adding) for tokens in (first, second)]
    added = g2l([first, second], (0.33, 0.67), adding)
    assert added == pytest.approx(0.33 * alone[0] + 0.67 * alone[1], rel=1e-12)
    mixed = g2l([first, second], (0.33, 0.67), mixing)
    assert mixed == pytest.approx(g2l([0.33 * first + 0.67 * second], (1.0,), adding), rel=1e-12)
    assert mixed != pytest.approx(added, rel=1e-3)
    assert mixed != pytest.approx(g2l([second, first], (0.33, 0.67), mixing), rel=1e-3)


@pytest.mark.parametrize(("mix", "heads"), [("features", 1), ("losses", 2)])
def test_mixed_tokens_have_one_projection(mix: str, heads: int) -> None:
    """A second one would never get a gradient."""
    encoder: Any = nn.Module()
    encoder.width = WIDTH
    spec = LossSpec(objective(g2l_mix=mix), (0.33, 0.67), token_weights=(0.33, 0.67))
    widths = FeatureWidths(WIDTH, WIDTH, (6, 6), (8, 8))
    model = DalrModel(encoder, ModelConfig(grounding_width=7, consistency_width=5), spec, widths)
    assert len(model.token_projections) == heads
