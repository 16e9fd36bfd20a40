"""Which terms a configuration switches on, what each key changes, and how the total adds up."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import dalr_kernels as kernels
import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))

from golden_terms import Golden

from dalr_scale.config import ModelConfig, ObjectiveConfig, build_config
from dalr_scale.errors import UserError
from dalr_scale.models.consistency import Aligner, GlobalBatchNorm
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec, TeacherBatch
from dalr_scale.objective import (
    Views,
    cross_terms,
    needs_of,
    rank_similarity,
    term_factors,
    text_similarity,
    text_terms,
    token_terms,
    total_loss,
    unmatched_rows,
)

ROWS, WIDTH = 10, 12


def objective(preset: str = "dalr", **changes: Any) -> ObjectiveConfig:
    return build_config([{"objective": {"preset": preset, **changes}}]).objective


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
    """Raw pictures of other rows: soft labels, L_CMA, unmatched pairs, false negatives."""
    plain: dict[str, Any] = {"consistency_weight": 0.0, "cross_kl_weight": 0.0}
    assert not needs_of(objective(**plain)).image_columns  # aligned pictures are the labels
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


def paired(rows: int = ROWS) -> TeacherBatch:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return TeacherBatch(
        ids=torch.arange(rows) // 2,
        paired=True,
        image=normal(rows, WIDTH),
        caption=normal(rows, WIDTH),
        text=[normal(rows, 6), normal(rows, 6)],
        tokens=[normal(rows, 4, WIDTH)],
        token_masks=[torch.ones(rows, 4)],
    )


def text_only(rows: int = ROWS) -> TeacherBatch:
    return TeacherBatch(ids=torch.full((rows,), -1), text=paired(rows).text)


def test_text_batches_are_distilled_only_when_asked() -> None:
    _, terms = build(objective()).loss(states(), text_only(), step=0, offset=0)
    assert set(terms) == {"con"}
    wish = objective(distil_text_batches=True)
    total, terms = build(wish).loss(states(), text_only(), step=0, offset=0)
    assert set(terms) == {"con", "ima", "rank"}
    expected = terms["con"] + 0.2 * (terms["ima"] + terms["rank"])
    torch.testing.assert_close(total.detach(), expected)


def test_the_margin_of_text_batches_is_a_key_of_its_own() -> None:
    def contrast(batch: TeacherBatch, **changes: Any) -> float:
        spec = objective(**changes)
        return float(build(spec).loss(states(), batch, step=0, offset=0)[1]["con"])

    off = {"margin_in_text_batches": False}
    assert contrast(text_only(), **off) == contrast(text_only(), margin=0.0)
    assert contrast(text_only(), **off) < contrast(text_only())
    assert contrast(paired(), **off) == contrast(paired())


def views(rows: int = ROWS) -> Views:
    """Rows and columns of one process, every field present, in float64."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z1 = normal(rows, WIDTH)
    return Views(
        z1=z1,
        z2=z1 + 0.7 * normal(rows, WIDTH),
        ids=torch.arange(rows) // 2,
        p1=normal(rows, 7),
        p2=normal(rows, 7),
        u=normal(rows, 7),
        u_caption=normal(rows, 7),
        z1_image=z1,
        aligned_text=normal(rows, 5).relu(),
        aligned_image=normal(rows, 5).relu(),
        image=normal(rows, WIDTH),
        caption=normal(rows, WIDTH),
        text=[normal(rows, 6), 3 * normal(rows, 6)],
        tokens=[normal(rows, 4, WIDTH)],
        token_masks=[(torch.arange(4) < torch.arange(rows)[:, None] % 4 + 1).double()],
        z1_tokens=[z1],
    )


def with_unmatched(v: Views, unmatched: np.ndarray) -> Views:
    """The aligned pictures of the rows that L_cons pairs rows with, as the model computes them."""
    assert v.aligned_image is not None
    return dataclasses.replace(v, aligned_unmatched=v.aligned_image[torch.as_tensor(unmatched)])


def terms_and_total(
    own: Views,
    cols: Views,
    spec: ObjectiveConfig,
    weights: tuple[float, float],
    offset: int,
    unmatched: np.ndarray,
) -> tuple[dict[str, Tensor], Tensor]:
    """Every term of a paired batch, and the total."""
    text = text_terms(own, cols, spec, weights, offset, paired=True, distil=True)
    others = {}
    if spec.cross_weight > 0:
        others |= cross_terms(own, cols, spec, weights, offset, unmatched)
    if spec.intra_weight > 0:
        others |= token_terms(own, cols, spec, weights, offset)
    return text.values | others, total_loss(text, others, spec)


def all_terms(spec: ObjectiveConfig, v: Views | None = None) -> dict[str, Tensor]:
    return all_terms_and_total(spec, v)[0]


def all_terms_and_total(
    spec: ObjectiveConfig, v: Views | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    v = v or views()
    unmatched = unmatched_rows(spec, len(v.ids), seed=1, step=4)
    v = with_unmatched(v, unmatched)
    return terms_and_total(v, v, spec, (0.33, 0.67), 0, unmatched)


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
    spec, v = objective(preset, **changes, teacher_similarity_dtype="float64"), views()
    weights, leaves = (0.33, 0.67), (v.z1.requires_grad_(), v.z2.requires_grad_())
    text = text_terms(v, v, spec, weights, 0, paired=True, distil=True)
    ids = {"row_ids": v.ids, "col_ids": v.ids} if spec.same_image == "mask" else {}
    margin, tau = spec.margin, spec.temperature
    ima, rank = text_similarity(v, v, spec, weights), rank_similarity(v, v, spec, weights)
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
        k: float(x) for k, x in text.values.items()
    }
    factors = term_factors(spec)
    total = torch.stack([factors[name] * value for name, value in separate.items()]).sum()
    for got, want in zip(
        torch.autograd.grad(text.total, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    # control: without one term's weight the gradient is another
    other = torch.autograd.grad(
        text_terms(
            v, v, dataclasses.replace(spec, rank_weight=0.0), weights, 0, paired=True, distil=True
        ).total,
        leaves,
    )
    assert not torch.allclose(other[0], got, rtol=1e-3)


# Golden vectors: the published loss on the published inputs


def golden_objective(g: Golden, preset: str, **changes: Any) -> ObjectiveConfig:
    h = g.hyper
    return objective(
        preset,
        temperature=h["temp"],
        vl_temperature=h["temp_vl"],
        margin=h["margin1"],
        vl_margin=h["margin2"],
        rank_teacher_temperature=h["tau2"],
        rank_weight=h["gamma"],
        teacher_similarity_dtype="float64",
        consistency_weight=0.0,
        **changes,
    )


def golden_views(g: Golden, rows: slice) -> Views:
    x = g.x
    return Views(
        z1=x["z1"][rows],
        z2=x["z2"][rows],
        ids=(torch.arange(g.size) // 2)[rows],
        p1=x["p1"][rows],
        p2=x["p2"][rows],
        u=x["v"][rows],
        z1_image=x["z1"][rows],
        image=x["image_teacher"][rows],
        text=[x["text_teacher_1"][rows], x["text_teacher_2"][rows]],
        tokens=[x["token_features"][rows]],
        token_masks=[x["token_mask"][rows]],
        z1_tokens=[x["z1"][rows]],
    )


def golden_terms(
    g: Golden, spec: ObjectiveConfig, rows: slice | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    rows = rows or slice(0, g.size)
    own, cols = golden_views(g, rows), golden_views(g, slice(0, g.size))
    weights = (g.hyper["alpha"], 1 - g.hyper["alpha"])
    return terms_and_total(own, cols, spec, weights, rows.start, np.zeros(0))


def golden_total(g: Golden, rows: slice | None = None, **changes: Any) -> float:
    spec = golden_objective(g, "dalr-reference", **changes)
    return golden_terms(g, spec, rows)[1].item()


TOTALS = {"a": 36.2759019590308, "b": 56.9051296223894}


@pytest.mark.parametrize("name", TOTALS)
def test_the_published_total(name: str) -> None:
    """Every term, its weight, and the preset that chooses them; L_cons is not in the files."""
    g = Golden(name)
    assert golden_total(g) == pytest.approx(TOTALS[name], rel=1e-12)
    # control: one key off, by the smallest difference between the presets
    assert golden_total(g, listmle_eps=0.0) != pytest.approx(TOTALS[name], rel=1e-9)


@pytest.mark.parametrize("name", TOTALS)
def test_the_published_total_from_rows_of_several_ranks(name: str) -> None:
    """The terms of rows alone; the two that ranks compute together are in tests/distributed."""
    g = Golden(name)
    alone = {"g2l_weight": 0.0, "cross_kl_weight": 0.0}
    shares = [slice(i, i + 1) for i in range(g.size)]  # 37 is prime: one row each
    totals = [golden_total(g, rows, **alone) for rows in shares]
    assert np.mean(totals) == pytest.approx(golden_total(g, **alone), rel=1e-12)


# Terms of the preset `dalr` on the same inputs, two rows per picture, labels from the pictures.
DALR_TERMS = {
    "a": {
        "con": 0.973455720577915,
        "xce": 0.916832603504616,
        "cma": 0.16604737511257,
        "ima": 0.138606052601937,
        "rank": 3.02379504476763,
        "g2l": 9.83003053707643,
    },
    "b": {
        "con": 1.8304340606768,
        "xce": 0.626263506682909,
        "cma": 0.117146555952462,
        "ima": 0.123805423913191,
        "rank": 3.50268746214575,
        "g2l": 7.18333662529591,
    },
}


@pytest.mark.parametrize("name", DALR_TERMS)
def test_the_default_terms_on_the_golden_inputs(name: str) -> None:
    g = Golden(name)
    terms, _ = golden_terms(g, golden_objective(g, "dalr", soft_labels="image"))
    assert {k: pytest.approx(v.item(), rel=1e-12) for k, v in terms.items()} == DALR_TERMS[name]


@pytest.mark.parametrize(
    ("preset", "name", "terms"),
    [
        ("simcse", "a", {"con": 0.139946260301651}),
        ("simcse", "b", {"con": 1.01813126312061}),
        ("mcse", "a", {"con": 0.139946260301651, "xce": 0.451443552154971}),
        ("mcse", "b", {"con": 1.01813126312061, "xce": 0.0755828738756786}),
    ],
)
def test_the_baselines_on_the_golden_inputs(preset: str, name: str, terms: dict) -> None:
    g = Golden(name)
    spec = objective(preset, temperature=g.hyper["temp"], vl_temperature=g.hyper["temp_vl"])
    found = {k: v.item() for k, v in golden_terms(g, spec)[0].items()}
    assert {k: pytest.approx(v, rel=1e-12) for k, v in terms.items()} == found


def test_kdmcse_is_two_branches_of_one_form() -> None:
    """Its caption branch is the picture branch with captions in the pictures' place."""
    spec, v = objective("kdmcse"), views()
    terms, total = all_terms_and_total(spec, v)
    swapped = dataclasses.replace(v, image=v.caption, caption=v.image, u=v.u_caption, u_caption=v.u)
    other = all_terms(spec, swapped)
    assert terms["xce"] == other["xce_caption"] != terms["xce_caption"] == other["xce"]
    expected = terms["con"] + 0.01 * (terms["xce"] + terms["xce_caption"])
    assert float(total) == pytest.approx(float(expected), rel=1e-12)


# Consistency


def test_the_unmatched_row_is_five_earlier_or_shifted() -> None:
    roll = objective("dalr-reference")
    assert unmatched_rows(roll, 12, seed=1, step=0).tolist() == [7, 8, 9, 10, 11, *range(7)]
    shift = objective()
    seen = set()
    for step in range(200):
        rows = unmatched_rows(shift, 12, seed=1, step=step)
        distances = set((np.arange(12) - rows) % 12)
        assert len(distances) == 1 and distances <= set(range(1, 12))
        seen |= distances
        assert np.array_equal(rows, unmatched_rows(shift, 12, seed=1, step=step))
    assert seen == set(range(1, 12))
    draws = [[unmatched_rows(shift, 999, seed, s)[0] for s in range(9)] for seed in (1, 2)]
    assert draws[0] != draws[1] and len(set(draws[0])) > 1
    assert unmatched_rows(shift, 2, seed=1, step=5).tolist() == [1, 0]


def test_the_shift_does_not_touch_any_generator() -> None:
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    unmatched_rows(objective(), 12, seed=1, step=0)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def consistency_by_hand(v: Views, unmatched: np.ndarray, kept: np.ndarray) -> float:
    """The definition with torch's own loss, mean over matched and kept unmatched pairs."""
    loss = nn.CosineEmbeddingLoss(margin=0.2, reduction="none")
    text, image = v.aligned_text, v.aligned_image
    assert text is not None and image is not None
    one = torch.ones(len(text), dtype=torch.float64)
    matched = loss(text, image, one)
    other = loss(text[kept], image[unmatched[kept]], -one[kept])
    return float(torch.cat([matched, other]).mean())


@pytest.mark.parametrize("preset", ["dalr", "dalr-reference"])
def test_consistency_is_the_mean_over_the_kept_pairs(preset: str) -> None:
    spec, v = objective(preset), views()
    dropped = 0
    for step in range(8):
        unmatched = unmatched_rows(spec, ROWS, seed=1, step=step)
        same = (v.ids[unmatched] == v.ids).numpy()
        kept = ~same if preset == "dalr" else np.ones(ROWS, bool)
        dropped += int((~kept).sum())
        rows = with_unmatched(v, unmatched)
        found = float(cross_terms(rows, v, spec, (0.33, 0.67), 0, unmatched)["cons"])
        assert found == pytest.approx(consistency_by_hand(v, unmatched, kept), rel=1e-9)
    assert (dropped > 0) == (preset == "dalr")


def test_consistency_of_two_ranks_is_that_of_one() -> None:
    """Ranks may keep different numbers of pairs; the mean of their values is the global mean."""
    spec = objective(cross_kl_weight=0.0)  # a term that ranks compute together
    unmatched = (np.arange(ROWS) - 1) % ROWS
    v = with_unmatched(views(), unmatched)
    v.ids = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
    whole = float(cross_terms(v, v, spec, (0.33, 0.67), 0, unmatched)["cons"])
    shares = []
    for start in (0, 5):
        own = slice(start, start + 5)
        cut = {
            f.name: getattr(v, f.name)[own]
            for f in dataclasses.fields(v)
            if isinstance(getattr(v, f.name), Tensor)
        }
        lists = {n: [t[own] for t in getattr(v, n)] for n in ("text", "tokens", "token_masks")}
        rows = dataclasses.replace(v, **cut, **lists)
        shares.append(float(cross_terms(rows, v, spec, (0.33, 0.67), start, unmatched)["cons"]))
    assert np.mean(shares) == pytest.approx(whole, rel=1e-12)


def test_rows_without_a_picture_number_are_never_dropped() -> None:
    unmatched = (np.arange(ROWS) - 3) % ROWS
    spec, v = objective(), with_unmatched(views(), unmatched)
    v.ids = torch.full((ROWS,), -1)
    found = float(cross_terms(v, v, spec, (0.33, 0.67), 0, unmatched)["cons"])
    everything = consistency_by_hand(v, unmatched, np.ones(ROWS, bool))
    assert found == pytest.approx(everything, rel=1e-9)


def test_batch_norm_of_one_process_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64) * 3 + 5
    ours, theirs = GlobalBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for module in (ours, theirs):
        module.weight.data = torch.linspace(0.5, 2, 6, dtype=torch.float64)
        module.bias.data = torch.linspace(-1, 1, 6, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    wave = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    outputs = [module(i) for module, i in zip((ours, theirs), inputs, strict=True)]
    for output in outputs:
        (output * wave).sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-12)
    assert GlobalBatchNorm(6)(x.bfloat16()).dtype == torch.bfloat16


def test_aligned_cosines_are_soft_labels_between_zero_and_one() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    text = Aligner(16, 64)(torch.randn(64, 16, generator=generator))
    image = Aligner(20, 64)(torch.randn(64, 20, generator=generator))
    cosines = nn.functional.normalize(text) @ nn.functional.normalize(image).T
    assert cosines.min() >= 0 and cosines.max() <= 1
    assert 0.25 < cosines.mean().item() < 0.4  # near 1/pi before any training
