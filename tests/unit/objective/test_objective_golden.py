"""The objective on the golden inputs: the published totals, and the presets of this project."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "numerics"))

from golden_terms import Golden
from objective_tools import all_terms, all_terms_and_total, objective, terms_and_total, views

from dalr_scale.objective.views import Views

if TYPE_CHECKING:
    from dalr_scale.config import ObjectiveConfig


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


# Terms of the preset `dalr` on the same inputs, two rows per image, labels from the images.
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
    """Its caption branch is the image branch with captions in the images' place."""
    spec, v = objective("kdmcse"), views()
    terms, total = all_terms_and_total(spec, v)
    swapped = dataclasses.replace(v, image=v.caption, caption=v.image, u=v.u_caption, u_caption=v.u)
    other = all_terms(spec, swapped)
    assert terms["xce"] == other["xce_caption"] != terms["xce_caption"] == other["xce"]
    expected = terms["con"] + 0.01 * (terms["xce"] + terms["xce_caption"])
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
