"""The consistency task: unmatched images, kept pairs, and its normalisation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from objective_tools import ROWS, objective, views, with_unmatched
from torch import Tensor, nn

from dalr_scale.models.consistency import Aligner, GlobalBatchNorm
from dalr_scale.objective.cons import Consistency, unmatched_rows
from dalr_scale.objective.views import LossBatch, Views

if TYPE_CHECKING:
    from dalr_scale.config.schema import ConsistencyConfig


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


def consistency(
    rows: Views, cols: Views, spec: ConsistencyConfig, unmatched: np.ndarray, offset: int = 0
) -> float:
    batch = LossBatch(rows, cols, offset, unmatched=unmatched)
    return float(Consistency().loss(spec, batch))


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
        found = consistency(rows, v, spec, unmatched)
        assert found == pytest.approx(consistency_by_hand(v, unmatched, kept), rel=1e-9)
    assert (dropped > 0) == (preset == "dalr")


def test_consistency_of_two_ranks_is_that_of_one() -> None:
    """Ranks may keep different numbers of pairs; the mean of their values is the global mean."""
    spec = objective(cross_kl_weight=0.0)  # a term that ranks compute together
    unmatched = (np.arange(ROWS) - 1) % ROWS
    v = with_unmatched(views(), unmatched)
    v.ids = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
    whole = consistency(v, v, spec, unmatched)
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
        shares.append(consistency(rows, v, spec, unmatched, start))
    assert np.mean(shares) == pytest.approx(whole, rel=1e-12)


def test_rows_without_a_image_number_are_never_dropped() -> None:
    unmatched = (np.arange(ROWS) - 3) % ROWS
    spec, v = objective(), with_unmatched(views(), unmatched)
    v.ids = torch.full((ROWS,), -1)
    found = consistency(v, v, spec, unmatched)
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
