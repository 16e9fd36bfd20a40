"""Dropout masks keyed by row: what they depend on, and what they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModel

from dalr_scale.errors import UserError
from dalr_scale.models.row_dropout import RowKeys, install_row_dropout


def keys(rows: list[int], seed: int = 1, step: int = 0, views: int = 1) -> RowKeys:
    result = RowKeys()
    result.set(seed, step, torch.tensor(rows), views)
    return result


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 10**6), min_size=2, max_size=6, unique=True),
    short=st.integers(1, 5),
    place=st.integers(0, 400),
    data=st.data(),
)
def test_a_mask_belongs_to_its_row(rows: list[int], short: int, place: int, data) -> None:
    """The mask of a row depends neither on the order, nor on other rows, nor on padding."""
    whole = keys(rows).keep(place, torch.Size((len(rows), 3, 6, 8)), 0.3)
    order = data.draw(st.permutations(range(len(rows))))
    moved = keys([rows[i] for i in order]).keep(place, torch.Size((len(rows), 3, 6, 8)), 0.3)
    assert torch.equal(moved, whole[list(order)])
    alone = keys(rows[:1]).keep(place, torch.Size((1, 3, short, short)), 0.3)
    assert torch.equal(alone[0], whole[0, :, :short, :short])


def test_seed_step_view_row_and_place_draw_other_masks() -> None:
    shape = torch.Size((1, 16, 64))
    first = keys([5]).keep(7, shape, 0.5)
    others = [
        keys([5], seed=2).keep(7, shape, 0.5),
        keys([5], step=1).keep(7, shape, 0.5),
        keys([6]).keep(7, shape, 0.5),
        keys([5]).keep(8, shape, 0.5),
        keys([5], views=2).keep(7, torch.Size((2, 16, 64)), 0.5)[1:],
    ]
    for other in others:  # as many agreements as of independent fair coins, within six sigmas
        assert abs((first == other).float().mean().item() - 0.5) < 6 * 0.5 / 1024**0.5


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_elements_are_dropped_independently_at_the_rate_asked_for(probability: float) -> None:
    kept = keys(list(range(256))).keep(3, torch.Size((256, 16, 64)), probability).double()
    sigma = (probability * (1 - probability)) ** 0.5
    assert abs(kept.mean().item() - (1 - probability)) < 5 * sigma / kept.numel() ** 0.5
    centred = (kept - kept.mean()) / sigma
    for one, other in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):
        assert abs((one * other).mean().item()) < 5 / one.numel() ** 0.5
    assert abs(centred.mean((1, 2)).std().item() * 1024**0.5 - 1) < 0.25


def model(kind: str = "bert", **changes) -> nn.Module:
    config = AutoConfig.for_model(
        kind, vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, **changes,
    )  # fmt: skip
    return AutoModel.from_config(config).train()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_a_model_repeats_a_row_in_any_batch(kind: str) -> None:
    backbone = model(kind)
    row_keys = install_row_dropout(backbone)
    ids, mask = torch.randint(3, 30, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    mask[3, 5:] = 0

    def encode(rows: list[int], length: int, step: int) -> torch.Tensor:
        row_keys.set(1, step, torch.tensor(rows), views=1)
        output = backbone(input_ids=ids[rows, :length], attention_mask=mask[rows, :length])
        return output.last_hidden_state

    together = encode([0, 1, 2, 3], 7, step=4)
    torch.testing.assert_close(encode([3], 5, step=4)[0], together[3, :5], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encode([3], 5, step=5)[0], together[3, :5], atol=1e-2)
    backbone.eval()
    torch.testing.assert_close(encode([3], 5, step=4), encode([3], 5, step=5))


def test_a_model_that_draws_masks_elsewhere_is_refused() -> None:
    backbone = model()
    plain = backbone.embeddings.forward  # type: ignore[union-attr]
    backbone.embeddings.forward = lambda *a, **k: nn.functional.dropout(plain(*a, **k), 0.1)  # type: ignore
    with pytest.raises(UserError, match=r"bert model .* cannot be keyed by row.*dropout_keys=rank"):
        install_row_dropout(backbone)


def test_rows_without_keys_are_an_error() -> None:
    backbone = model()
    install_row_dropout(backbone)
    ids = torch.ones(3, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="row keys are set for 2 rows and 3 are encoded"):
        backbone(input_ids=ids, attention_mask=ids)
