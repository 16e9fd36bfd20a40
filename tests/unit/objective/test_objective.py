"""Which terms a configuration switches on, what each key changes, and how the total adds up."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import dalr_kernels as kernels
import pytest
import torch
from objective_tools import (
    ROWS,
    WIDTH,
    all_terms,
    all_terms_and_total,
    objective,
    views,
)
from torch import Tensor, nn

from dalr_scale.config import ModelConfig, ObjectiveConfig
from dalr_scale.data.stream.batch import Batch
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.objective.registry import TERMS, needs_of
from dalr_scale.objective.text_teachers import rank_similarity, text_similarity
from dalr_scale.objective.total import batch_loss
from dalr_scale.objective.views import LossBatch

# What an objective needs

DALR_NEEDS = {
    "image", "image_columns", "text", "tokens", "grounding", "image_rows", "consistency",
    "consistency_labels",
}  # fmt: skip
KDMCSE_NEEDS = {
    "image", "image_columns", "caption", "caption_columns", "grounding", "caption_grounding"
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "needs"),
    [
        ("simcse", set()),
        ("mcse", {"image", "grounding"}),
        ("kdmcse", KDMCSE_NEEDS),
        ("dalr-reference", DALR_NEEDS - {"consistency_labels"}),
        ("dalr", DALR_NEEDS),
    ],
)
def test_needs_of_each_preset(preset: str, needs: set[str]) -> None:
    found = dataclasses.asdict(needs_of(objective(preset)))
    assert {name for name, wanted in found.items() if wanted} == needs


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"intra_weight": 0.0}, {"tokens"}),  # L_CMA still reads the sentence teachers
        ({"intra_weight": 0.0, "cross_kl_weight": 0.0}, {"tokens", "text", "image_rows"}),
        ({"g2l_weight": 0.0}, {"tokens"}),
        ({"consistency_weight": 0.0}, set()),  # it still gives the soft labels
        (
            {"consistency_weight": 0.0, "soft_labels": "none"},
            {"consistency", "consistency_labels"},
        ),
        ({"image_weight": 0.0}, {"grounding", "consistency_labels"}),
        ({"cross_weight": 0.0}, DALR_NEEDS - {"text", "tokens"}),
    ],
)
def test_a_weight_of_zero_drops_what_only_its_term_needs(
    changes: dict[str, Any], gone: set[str]
) -> None:
    before = dataclasses.asdict(needs_of(objective()))
    after = dataclasses.asdict(needs_of(objective(**changes)))
    assert {name for name in before if before[name] and not after[name]} == gone
    assert not any(after[name] and not before[name] for name in before)


def test_features_travel_only_where_rows_are_compared_with_them() -> None:
    """Raw images of other rows: soft labels, L_CMA, unmatched pairs, false negatives."""
    plain: dict[str, Any] = {"consistency_weight": 0.0, "cross_kl_weight": 0.0}
    assert not needs_of(objective(**plain)).image_columns  # aligned images are the labels
    for added in (
        {"consistency_weight": 0.1},
        {"cross_kl_weight": 0.1},
        {"soft_labels": "image"},
        {"false_negative_threshold": 0.9},
    ):
        assert needs_of(objective(**plain | added)).image_columns, added
    assert not needs_of(objective("mcse")).image_columns


def test_soft_labels_and_threshold_add_their_features() -> None:
    assert needs_of(objective("mcse", soft_labels="caption")).caption_columns
    both = needs_of(objective("mcse", false_negative_threshold=0.9))
    assert both.caption and both.image_columns and not both.caption_columns
    alone = objective("kdmcse", image_weight=0.0)
    assert not needs_of(alone).image  # captions against captions
    assert needs_of(dataclasses.replace(alone, caption_soft_labels="image")).image


class FixedEncoder(nn.Module):
    """Stands for an encoder where only its width matters."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.width = width


def build(spec: ObjectiveConfig, image: int = WIDTH, tokens: int = WIDTH) -> DalrModel:
    torch.manual_seed(0)
    widths = FeatureWidths(image=image, caption=image, text=(6, 6), tokens=(tokens,))
    loss = LossSpec(spec, text_weights=(0.33, 0.67))
    encoder: Any = FixedEncoder()
    return DalrModel(encoder, ModelConfig(grounding_width=7, consistency_width=5), loss, widths)


GROUNDED = {"sentence_head", "text_grounding", "image_grounding"}
ALIGNED = GROUNDED | {"text_aligner", "image_aligner"}


@pytest.mark.parametrize(
    ("preset", "modules"),
    [
        ("simcse", {"sentence_head"}),
        ("mcse", GROUNDED),
        ("kdmcse", GROUNDED | {"caption_grounding"}),
        ("dalr-reference", ALIGNED),
        ("dalr", ALIGNED),
    ],
)
def test_absent_terms_build_no_parameters(preset: str, modules: set[str]) -> None:
    model = build(objective(preset))
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == modules
    loss, _ = model.loss(states(), paired(), step=0, offset=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_other_widths_get_a_projection_or_a_refusal() -> None:
    model = build(objective(), image=9, tokens=8)
    built = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert built == ALIGNED | {"image_projection", "token_projections"}
    for widths, key in (({"image": 9}, "image"), ({"tokens": 8}, "token")):
        with pytest.raises(UserError, match=f"{key}_projection=learned or use equal widths"):
            build(objective("dalr-reference"), **widths)


# One batch through the model


def states(rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, rows, WIDTH, generator=generator, requires_grad=True)


def paired(rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features = {"image": normal(rows, WIDTH), "caption": normal(rows, WIDTH)}
    features |= {"text0": normal(rows, 6), "text1": normal(rows, 6)}
    tokens, numbers = normal(rows, 4, WIDTH), torch.arange(rows)
    ids = torch.ones(rows, 1, dtype=torch.long)
    return Batch(
        step=0,
        kind="pair",
        item_ids=numbers,
        sentences=[],
        input_ids=ids,
        attention_mask=ids,
        image_ids=numbers // 2,
        features=features,
        token_features=[tokens],
        token_masks=[torch.ones(rows, 4)],
    )


def text_only(rows: int = ROWS) -> Batch:
    batch = paired(rows)
    texts = {role: batch.features[role] for role in ("text0", "text1")}
    none = torch.full((rows,), -1)
    return dataclasses.replace(
        batch, kind="text", image_ids=none, features=texts, token_features=(), token_masks=()
    )


def test_text_batches_are_distilled_only_when_asked() -> None:
    _, terms = build(objective()).loss(states(), text_only(), step=0, offset=0)
    assert set(terms) == {"con"}
    distilled = objective(distil_text_batches=True)
    total, terms = build(distilled).loss(states(), text_only(), step=0, offset=0)
    assert set(terms) == {"con", "ima", "rank"}
    expected = terms["con"] + 0.2 * (terms["ima"] + terms["rank"])
    torch.testing.assert_close(total.detach(), expected)


def test_the_margin_of_text_batches_is_a_key_of_its_own() -> None:
    def contrast(batch: Batch, **changes: Any) -> float:
        spec = objective(**changes)
        return float(build(spec).loss(states(), batch, step=0, offset=0)[1]["con"])

    off = {"margin_in_text_batches": False}
    assert contrast(text_only(), **off) == contrast(text_only(), margin=0.0)
    assert contrast(text_only(), **off) < contrast(text_only())
    assert contrast(paired(), **off) == contrast(paired())


CHANGES: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    ({}, {"temperature": 0.1}, {"con", "rank", "g2l"}),
    ({}, {"vl_temperature": 0.1}, {"xce"}),
    ({}, {"margin": 0.1}, {"con"}),
    ({}, {"vl_margin": 0.1}, {"xce"}),
    ({}, {"soft_labels": "none"}, {"xce"}),
    ({}, {"soft_labels": "image"}, {"xce"}),
    ({}, {"soft_labels": "caption"}, {"xce"}),
    ({"soft_labels": "image"}, {"clamp_soft_labels": False}, {"xce"}),
    ({}, {"false_negative_threshold": 0.1}, {"xce"}),
    ({}, {"same_image": "keep"}, {"con", "xce", "g2l"}),
    ({}, {"unmatched": "roll"}, {"cons"}),
    ({}, {"cross_kl_student": "margin"}, {"cma"}),
    ({}, {"intra_kl_student": "margin"}, {"ima"}),
    ({}, {"kl_student_temperature": 0.3}, {"cma", "ima"}),
    ({}, {"kl_teacher_temperature": 0.3}, {"cma", "ima"}),
    ({}, {"rank_loss": "listnet"}, {"rank"}),
    ({}, {"rank_student": "margin"}, {"rank"}),
    ({"rank_loss": "listnet"}, {"rank_student": "margin"}, {"rank"}),
    ({}, {"rank_teacher_temperature": 0.1}, set()),  # ListMLE reads the order alone
    ({"rank_loss": "listnet"}, {"rank_teacher_temperature": 0.1}, {"rank"}),
    ({}, {"listmle_reduction": "sum"}, {"rank"}),
    ({}, {"listmle_eps": 1e-7}, {"rank"}),
    ({}, {"teacher_mix": "features"}, {"cma", "ima"}),
    ({}, {"teacher_similarity_dtype": "float16"}, {"cma", "ima"}),
    ({}, {"g2l_norm": "axis"}, {"g2l"}),
    ({}, {"g2l_unit_rows": False}, {"g2l"}),
    ({}, {"caption_weight": 1.0}, {"xce_caption"}),
    ({"caption_weight": 1.0}, {"caption_soft_labels": "caption"}, {"xce_caption"}),
    ({"caption_weight": 1.0}, {"false_negative_threshold": 0.1}, {"xce", "xce_caption"}),
    ({}, {"consistency_weight": 0.0}, {"cons"}),
    ({}, {"cross_kl_weight": 0.0}, {"cma"}),
    ({}, {"image_weight": 0.0}, {"xce"}),
    ({}, {"intra_kl_weight": 0.0}, {"ima"}),
    ({}, {"rank_weight": 0.0}, {"rank"}),
    ({}, {"g2l_weight": 0.0}, {"g2l"}),
    ({}, {"cross_weight": 0.5, "intra_weight": 0.5, "rank_weight": 9.0}, set()),
]


@pytest.mark.parametrize(("base", "change", "terms"), CHANGES, ids=[str(c[1]) for c in CHANGES])
def test_each_key_changes_its_own_terms_and_no_other(
    base: dict[str, Any], change: dict[str, Any], terms: set[str]
) -> None:
    before, after = all_terms(objective(**base)), all_terms(objective(**base, **change))
    changed = {
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or before[name] != after[name]
    }
    assert changed == terms


@pytest.mark.parametrize(("base", "change", "terms"), CHANGES, ids=[str(c[1]) for c in CHANGES])
def test_each_term_declares_the_keys_that_change_it(
    base: dict[str, Any], change: dict[str, Any], terms: set[str]
) -> None:
    spec = objective(**base)
    for term in TERMS:
        if term.name in terms:
            declared = {k for k, reason in term.settings(spec).items() if not reason}
            assert set(change) <= declared | set(term.weight_keys or ()), term.name


def test_every_weight_scales_its_term_in_the_total() -> None:
    keys = {
        "cons": ("cross_weight", "consistency_weight"),
        "cma": ("cross_weight", "cross_kl_weight"),
        "xce": ("cross_weight", "image_weight"),
        "xce_caption": ("cross_weight", "caption_weight"),
        "ima": ("intra_weight", "intra_kl_weight"),
        "rank": ("intra_weight", "rank_weight"),
        "g2l": ("intra_weight", "g2l_weight"),
    }
    weights = {key: 0.5 + 0.25 * i for i, key in enumerate(sorted(sum(keys.values(), ())))}
    spec = objective(**weights)
    terms, total = all_terms_and_total(spec)
    assert set(terms) == {"con", *keys}
    expected = terms["con"] + sum(
        weights[group] * weights[own] * terms[name] for name, (group, own) in keys.items()
    )
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("dalr", {}), ("dalr", {"rank_loss": "listnet"}), ("dalr-reference", {})],
)
def test_the_shared_pass_equals_separate_terms(preset: str, changes: dict[str, Any]) -> None:
    texts_alone = {"cross_weight": 0.0, "g2l_weight": 0.0}
    spec = objective(preset, **changes, **texts_alone, teacher_similarity_dtype="float64")
    v = views()
    leaves = (v.z1.requires_grad_(), v.z2.requires_grad_())
    batch = LossBatch(v, v, text_weights=(0.33, 0.67))
    text = batch_loss(spec, batch)
    ids = {"row_ids": v.ids, "col_ids": v.ids} if spec.same_image == "mask" else {}
    margin, tau = spec.margin, spec.temperature
    ima, rank = text_similarity(spec, batch), rank_similarity(spec, batch)
    student = {"temperature": tau, "margin": margin if spec.rank_student == "margin" else 0.0}
    shape = {"temperature": tau, "margin": margin} if spec.intra_kl_student == "margin" else {}
    mle = {"reduction": spec.listmle_reduction, "eps": spec.listmle_eps}
    separate = {
        "con": kernels.info_nce(v.z1, v.z2, temperature=tau, margin=margin, **ids),
        "ima": kernels.alignment_kl(v.z1, v.z2, ima, **shape),
        "rank": kernels.list_net(v.z1, v.z2, rank, teacher_temperature=0.05, **student)
        if spec.rank_loss == "listnet"
        else kernels.list_mle(v.z1, v.z2, rank, **student, **mle),
    }
    assert {k: pytest.approx(float(x.detach()), rel=1e-12) for k, x in separate.items()} == {
        k: float(x) for k, x in text.terms.items()
    }
    factors = {term.name: term.weight(spec) for term in TERMS}
    total = torch.stack([factors[name] * value for name, value in separate.items()]).sum()
    for got, want in zip(
        torch.autograd.grad(text.total, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    # control: without one term's weight the gradient is another
    other = torch.autograd.grad(
        batch_loss(dataclasses.replace(spec, rank_weight=0.0), batch).total, leaves
    )
    assert not torch.allclose(other[0], got, rtol=1e-3)


def test_teachers_are_mixed_as_wide_as_their_similarity() -> None:
    """float64 similarities of a sum that was rounded to float32 would be float64 in name only."""
    torch.manual_seed(0)
    features = [torch.randn(4, 6).half() for _ in range(2)]
    side: Any = SimpleNamespace(text=features)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        objective = ObjectiveConfig(teacher_mix="features", teacher_similarity_dtype=name)  # type: ignore[arg-type]
        found = text_similarity(objective, LossBatch(side, side, text_weights=(0.33, 0.67)))
        mixed = found.factors[0][1]
        assert mixed.dtype == dtype
        exact = 0.33 * features[0].double() + 0.67 * features[1].double()
        assert torch.equal(mixed, exact) == (name == "float64")
