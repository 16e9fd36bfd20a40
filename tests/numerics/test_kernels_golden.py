"""The losses against the values and gradients of the published DALR code, and derived variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dalr_kernels as K
import golden_terms as terms
import pytest
import torch
from golden_terms import Golden
from torch import Tensor

# Largest relative error of a loss, and of a gradient relative to the largest entry of its array.
TOLERANCES = {torch.float64: (1e-10, 1e-8), torch.float32: (2e-6, 2e-5)}

HOW: dict[str, dict[str, Any]] = {
    "reference": {"impl": "reference"},
    "auto": {},
    "one-row-chunks": {"impl": "torch", "chunk_rows": 1},
    "ragged-chunks": {"impl": "torch", "chunk_rows": 5},
    "chunk-above-batch": {"impl": "torch", "chunk_rows": 100},
    "tiny-workspace": {"impl": "torch", "workspace_bytes": 1},
    "small-workspace": {"impl": "torch", "workspace_bytes": 30_000},
}


def loss_error(g: Golden, term: str, value: Tensor) -> float:
    """Relative deviation from the stored value."""
    return abs(float(value.detach()) / float(g.arrays[f"loss.{term}"]) - 1.0)


def gradient_errors(g: Golden, term: str) -> dict[str, float]:
    """Relative deviation of every stored gradient of a term."""
    errors = {}
    for leaf, tensor in g.leaves.items():
        key = f"grad.{term}.{leaf}"
        if key not in g.arrays:
            assert tensor.grad is None, f"{term} must not depend on {leaf}"
            continue
        want = torch.tensor(g.arrays[key])
        assert tensor.grad is not None
        errors[leaf] = float((tensor.grad.double() - want).abs().max() / want.abs().max())
    return errors


def test_all_stored_values_are_used() -> None:
    arrays = [terms.load(name)[0] for name in "ab"]
    assert sum(key.startswith("loss.") for a in arrays for key in a) == 14 == 2 * len(terms.TERMS)
    assert sum(key.startswith("grad.") for a in arrays for key in a) == 26


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("dtype", TOLERANCES.keys(), ids=str)
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("term", terms.TERMS)
def test_published_values_and_gradients(
    term: str, name: str, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    g = Golden(name, dtype)
    value = terms.PUBLISHED[term](g, **how)
    value.backward()
    assert value.dtype == dtype and value.shape == ()
    assert loss_error(g, term, value) < TOLERANCES[dtype][0]
    assert max(gradient_errors(g, term).values()) < TOLERANCES[dtype][1]


@pytest.mark.parametrize(
    ("name", "constant", "wrong"),
    [
        ("a", "margin1", 0.2),
        ("a", "alpha", 0.5),
        *(("b", key, terms.load("a")[1][key]) for key in ("temp", "temp_vl", "margin1", "margin2")),
        ("b", "alpha", 0.33),
        ("b", "tau2", 0.05),
    ],
)
def test_a_wrong_constant_is_noticed(name: str, constant: str, wrong: float) -> None:
    # Negative control: the tolerances tell apart every hyper-parameter from its default.
    g = Golden(name)
    g.hyper = g.hyper | {constant: wrong}
    errors = [loss_error(g, term, terms.PUBLISHED[term](g)) for term in terms.TERMS]
    assert max(errors) > 1e-4


def shards(size: int, world: int) -> list[slice]:
    """Contiguous rows of each rank; the first ranks hold one more when it does not divide."""
    ends = [size * (rank + 1) // world for rank in range(world)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def on_ranks(
    g: Golden, term: str, world: int, weight: Callable[[int], float], **how: Any
) -> Tensor:
    """Sum over simulated ranks of weight(rows) * local loss; gradients add up in the leaves."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in shards(g.size, world):
        g.rows = rows
        value = terms.PUBLISHED[term](g, col_offset=rows.start, **how)
        local = value * weight(rows.stop - rows.start)
        local.backward()
        total += local.detach()
    return total


@pytest.mark.parametrize("how", [HOW["reference"], HOW["auto"], HOW["ragged-chunks"]], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("term", terms.TERMS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_rows_split_over_ranks(name: str, term: str, world: int, how: dict[str, Any]) -> None:
    g = Golden(name)
    total = on_ranks(g, term, world, lambda rows: rows / g.size, **how)
    assert loss_error(g, term, total) < 1e-10
    assert max(gradient_errors(g, term).values()) < 1e-8


def test_other_ways_to_merge_ranks_are_wrong() -> None:
    # Negative control: a sum over ranks is W times too large, and one rank's columns alone miss
    # the gradient that the gather's backward has to add up.
    g = Golden("a")
    total = on_ranks(g, "contrastive", 4, lambda rows: 1.0)
    assert loss_error(g, "contrastive", total / 4) < 1e-10 < loss_error(g, "contrastive", total)
    g = Golden("a")
    g.rows = slice(0, 3)
    terms.contrastive(g).backward()
    assert min(gradient_errors(g, "contrastive").values()) > 0.1


PLAIN = {"margin": 0.0}


def plain_student(g: Golden) -> dict[str, float]:
    return {"temperature": g.hyper["temp"], **PLAIN}


def plain_kl(g: Golden, **how: Any) -> Tensor:
    images = K.alignment_kl(g.x["image_teacher"], g.x["z1"], g.s_vv(), **how)
    texts = K.alignment_kl(g.x["z1"], g.x["image_teacher"], g.ranking(), **how)
    return (images + texts) / 2


# Values of variants on the same inputs, from an implementation of the equations other than ours:
# (file a, file b, function).
VARIANTS: dict[str, tuple[float, float, Callable[..., Tensor]]] = {
    "contrastive without margin": (
        0.139946260301651,
        1.01813126312061,
        lambda g, **how: K.info_nce(g.x["z1"], g.x["z2"], **plain_student(g), **how),
    ),
    "cross-modal without margin": (
        0.451443552154971,
        0.0755828738756786,
        lambda g, **how: terms.cross_modal_contrastive(g, **PLAIN, **how),
    ),
    "contrastive, same images masked": (
        0.973455720577915,
        1.8304340606768,
        lambda g, **how: terms.contrastive(g, **g.image_ids(), **how),
    ),
    "cross-modal, clamped labels": (
        0.950900045101015,
        0.626598976452094,
        lambda g, **how: terms.cross_modal_contrastive(g, clamp_soft_labels=True, **how),
    ),
    "cross-modal, clamped labels, same images masked": (
        0.916832603504616,
        0.626263506682909,
        lambda g, **how: terms.cross_modal_contrastive(
            g, clamp_soft_labels=True, **g.image_ids(), **how
        ),
    ),
    "cross-modal KL on plain cosines": (0.16604737511257, 0.117146555952462, plain_kl),
    "intra-modal KL on plain cosines": (
        0.138606052601937,
        0.123805423913191,
        lambda g, **how: K.alignment_kl(g.x["z1"], g.x["z2"], g.ranking(), **how),
    ),
    "ListMLE, plain, mean": (
        3.02379504476763,
        3.50268746214575,
        lambda g, **how: K.list_mle(g.x["z1"], g.x["z2"], g.ranking(), **plain_student(g), **how),
    ),
    "ListNet, plain": (
        4.08275017835959,
        4.56568174296985,
        lambda g, **how: K.list_net(
            g.x["z1"],
            g.x["z2"],
            g.ranking(),
            teacher_temperature=g.hyper["tau2"],
            **plain_student(g),
            **how,
        ),
    ),
    "global-to-local per token": (
        9.95283518680315,
        7.20707665912367,
        lambda g, **how: terms.global_to_local(g, norm="token", unit_rows=True, **how),
    ),
    "global-to-local per token, same images masked": (
        9.83003053707643,
        7.18333662529591,
        lambda g, **how: terms.global_to_local(
            g, norm="token", unit_rows=True, **g.image_ids(), **how
        ),
    ),
}


@pytest.mark.parametrize("how", [HOW["reference"], HOW["ragged-chunks"]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, how: dict[str, Any]) -> None:
    *wanted, function = VARIANTS[variant]
    for name, want in zip("ab", wanted, strict=True):
        value = function(Golden(name), **how)
        assert float(value.detach()) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("name", "want"), [("a", 36.2759019590308), ("b", 56.9051296223894)])
def test_published_total(name: str, want: float) -> None:
    # L_con + lambda (L_CMA + L_xce) + mu (L_IMA + L_rank + L_g2l), lambda 0.1 and mu 0.2.
    g = Golden(name)
    value = {term: float(terms.PUBLISHED[term](g).detach()) for term in terms.TERMS}
    cross = value["cross_modal_kl"] + value["cross_modal_contrastive"]
    intra = value["intra_modal_kl"] + value["rank_listmle"] + value["global_to_local"]
    total = value["contrastive"] + 0.1 * cross + 0.2 * intra
    assert total == pytest.approx(want, rel=1e-12)
