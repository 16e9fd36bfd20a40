"""The losses against scalar loops, and the cases the golden vectors do not reach."""

from __future__ import annotations

import math
from typing import Any

import dalr_kernels as K
import loss_oracle as oracle
import pytest
import torch
from dalr_kernels.reference import list_mle_rows
from torch import Tensor

ROWS, COLS, OFFSET, WIDTH = 4, 9, 3, 6
TAU = 0.05


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def rows() -> Tensor:
    return draw(ROWS, WIDTH, seed=1)


@pytest.fixture
def cols() -> Tensor:
    return draw(COLS, WIDTH, seed=2)


def constants(seed: int, width: int = 5) -> tuple[Tensor, Tensor]:
    """Rows and columns of one teacher."""
    cols = draw(COLS, width, seed=seed)
    return cols[OFFSET : OFFSET + ROWS], cols


def mixed_teacher() -> tuple[K.Similarity, Any]:
    """Two teachers of different width, and their matrix by loops."""
    first, second = constants(3), constants(4, width=7)
    matrix = 0.33 * oracle.cosines(first[0].numpy(), first[1].numpy())
    matrix += 0.67 * oracle.cosines(second[0].numpy(), second[1].numpy())
    return K.Similarity(((0.33, *first), (0.67, *second))), matrix


IMPLS = pytest.mark.parametrize(
    "how", [{"impl": "reference"}, {"impl": "torch"}, {"chunk_rows": 3}], ids=str
)


@IMPLS
@pytest.mark.parametrize("margin", [0.0, 0.15, 0.9])
def test_rectangular_losses_match_scalar_loops(
    rows: Tensor, cols: Tensor, margin: float, how: dict[str, Any]
) -> None:
    teacher, scores = mixed_teacher()
    c = oracle.cosines(rows.numpy(), cols.numpy())
    a = oracle.margin_similarity(c, OFFSET, margin, TAU)
    student = {"temperature": TAU, "margin": margin, "col_offset": OFFSET, **how}
    values = {
        K.info_nce(rows, cols, **student): oracle.info_nce(a, OFFSET),
        K.alignment_kl(rows, cols, teacher, **student): oracle.alignment_kl(a, scores, 0.45, 0.5),
        K.list_net(rows, cols, teacher, teacher_temperature=0.1, **student): oracle.list_net(
            a, scores, 0.1, OFFSET
        ),
        K.list_mle(rows, cols, teacher, **student): oracle.list_mle(a, scores, mean=True, eps=0),
        K.list_mle(
            rows, cols, teacher, reduction="sum", eps=1e-3, **student
        ): oracle.list_mle(a, scores, mean=False, eps=1e-3),
    }  # fmt: skip
    for value, want in values.items():
        assert float(value) == pytest.approx(want, rel=1e-12)


@IMPLS
@pytest.mark.parametrize("clamp", [False, True])
def test_caption_branch_of_kdmcse(
    rows: Tensor, cols: Tensor, clamp: bool, how: dict[str, Any]
) -> None:
    # L_t: columns are projected captions, soft labels the caption-caption cosines.
    captions = constants(5)
    soft = oracle.cosines(captions[0].numpy(), captions[1].numpy())
    assert (soft < 0).any()
    a = oracle.margin_similarity(
        oracle.cosines(rows.numpy(), cols.numpy()),
        OFFSET, 0.15, TAU, soft.clip(0, 1) if clamp else soft,
    )  # fmt: skip
    value = K.info_nce(
        rows, cols, temperature=TAU, margin=0.15, soft_labels=K.Similarity(((1.0, *captions),)),
        clamp_soft_labels=clamp, col_offset=OFFSET, **how,
    )  # fmt: skip
    assert float(value) == pytest.approx(oracle.info_nce(a, OFFSET), rel=1e-12)


@IMPLS
def test_mask_above_drops_similar_negatives(
    rows: Tensor, cols: Tensor, how: dict[str, Any]
) -> None:
    scores = constants(6)
    matrix = oracle.cosines(scores[0].numpy(), scores[1].numpy())
    dropped = matrix > 0.1
    assert dropped[range(ROWS), range(OFFSET, OFFSET + ROWS)].all(), "positives lie above it too"
    a = oracle.margin_similarity(oracle.cosines(rows.numpy(), cols.numpy()), OFFSET, 0.15, TAU)
    above = (K.Similarity(((1.0, *scores),)), 0.1)
    student = {"temperature": TAU, "margin": 0.15, "col_offset": OFFSET, **how}
    value = K.info_nce(rows, cols, mask_above=above, **student)
    assert float(value) == pytest.approx(oracle.info_nce(a, OFFSET, dropped), rel=1e-12)
    assert float(value) < float(K.info_nce(rows, cols, **student))


@IMPLS
def test_same_image_columns_leave_the_denominator(
    rows: Tensor, cols: Tensor, how: dict[str, Any]
) -> None:
    ids = torch.tensor([7, -1, 2, 7, -1, -1, 2, 2, 7])
    row_ids = ids[OFFSET : OFFSET + ROWS]
    dropped = (row_ids[:, None] == ids) & (row_ids[:, None] >= 0)
    a = oracle.margin_similarity(oracle.cosines(rows.numpy(), cols.numpy()), OFFSET, 0.1, TAU)
    student = {"temperature": TAU, "margin": 0.1, "col_offset": OFFSET, **how}
    value = K.info_nce(rows, cols, row_ids=row_ids, col_ids=ids, **student)
    assert float(value) == pytest.approx(oracle.info_nce(a, OFFSET, dropped.numpy()), rel=1e-12)
    # Rows without an image equal nobody: masking with -1 everywhere changes nothing.
    none = {"row_ids": torch.full((ROWS,), -1), "col_ids": torch.full((COLS,), -1)}
    unmasked = K.info_nce(rows, cols, **student)
    assert float(K.info_nce(rows, cols, **none, **student)) == float(unmasked) != float(value)


def test_masked_columns_get_no_gradient(rows: Tensor, cols: Tensor) -> None:
    cols.requires_grad_()
    ids = torch.zeros(COLS, dtype=torch.int64)
    value = K.info_nce(rows[:1], cols, temperature=TAU, row_ids=ids[:1], col_ids=ids)
    value.backward()
    assert float(value.detach()) == 0.0
    assert cols.grad is not None and not cols.grad[1:].any()


@IMPLS
@pytest.mark.parametrize("ids", [[-1] * COLS, [0, 1, 1, 0, 0, -1, -1, 2, 1]], ids=str)
def test_global_to_local_matches_scalar_loops(
    rows: Tensor, ids: list[int], how: dict[str, Any]
) -> None:
    tokens = draw(COLS, 4, WIDTH, seed=7)
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 0, 4, 1, 2, 3])[:, None]
    own = slice(OFFSET, OFFSET + ROWS)
    labels = torch.tensor(ids)
    values = [
        K.global_to_local(
            rows, tokens[own], mask[own].to(kind), tokens, mask.to(kind), temperature=TAU,
            row_ids=labels[own], col_ids=labels, col_offset=OFFSET, **how, **blocks,
        )
        for kind in (torch.bool, torch.int64, torch.float32)
        for blocks in ({}, {"workspace_bytes": 2000})
    ]  # fmt: skip
    want = oracle.global_to_local(rows.numpy(), tokens.numpy(), mask.numpy(), TAU, OFFSET, ids)
    for value in values:
        assert float(value) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_global_to_local_does_not_overflow(impl: str) -> None:
    # Un-normalised rows give logits of any size; padding holds garbage of any size too.
    rows = (draw(3, WIDTH, seed=8) * 1e5).float().requires_grad_()
    tokens = draw(3, 4, WIDTH, seed=9).float()
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    tokens[:, 3] = 1e30
    value = K.global_to_local(
        rows, tokens, mask, tokens, mask, temperature=TAU, unit_rows=False, impl=impl
    )
    value.backward()
    assert torch.isfinite(value) and rows.grad is not None and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_batch_of_one(impl: str) -> None:
    row, col = (draw(1, WIDTH, seed=s).requires_grad_() for s in (1, 2))
    teacher = K.Similarity(((1.0, row, row),))
    tokens, mask = draw(1, 3, WIDTH, seed=3), torch.ones(1, 3)
    student = {"temperature": TAU, "margin": 0.2, "impl": impl}
    values = [
        K.info_nce(row, col, **student),
        K.alignment_kl(row, col, teacher, **student),
        K.list_net(row, col, teacher, teacher_temperature=TAU, **student),
        K.list_mle(row, col, teacher, **student),
        K.global_to_local(row, tokens, mask, tokens, mask, temperature=TAU, impl=impl),
    ]
    for value in values:
        (grad,) = torch.autograd.grad(value, row)
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
        assert not torch.isnan(grad).any() and grad.abs().max() < 1e-12


@IMPLS
def test_ranking_ties_keep_column_order(rows: Tensor, cols: Tensor, how: dict[str, Any]) -> None:
    teacher = torch.eye(COLS, 5, dtype=torch.float64)  # columns 5.. are zero: all tied at 0
    similarity = K.Similarity(((1.0, teacher[OFFSET : OFFSET + ROWS], teacher),))
    scores = similarity.normalized(torch.float64).block(0, ROWS).numpy()
    a = oracle.cosines(rows.numpy(), cols.numpy()) / TAU
    value = K.list_mle(rows, cols, similarity, temperature=TAU, col_offset=OFFSET, **how)
    assert float(value) == pytest.approx(oracle.list_mle(a, scores, mean=True, eps=0), rel=1e-12)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_equal_sentences_rank_the_same_on_every_split(world: int) -> None:
    # Repeated sentences have equal scores, but matrix products of different shapes round them
    # differently; the order must not follow that noise.
    size, width = 48, 33
    sentences = draw(8, width, seed=11).float().repeat(6, 1)
    z1, z2 = draw(size, width, seed=12).float(), draw(size, width, seed=13).float()
    whole = K.list_mle(z1, z2, K.Similarity(((1.0, sentences, sentences),)), temperature=TAU)
    parts = [
        K.list_mle(
            z1[r : r + size // world], z2,
            K.Similarity(((1.0, sentences[r : r + size // world], sentences),)),
            temperature=TAU, col_offset=r, chunk_rows=5,
        )
        for r in range(0, size, size // world)
    ]  # fmt: skip
    assert float(sum(parts) / world) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "noise", "gap"), [(torch.float32, 1e-7, 1e-5), (torch.float64, 1e-15, 1e-9)], ids=str
)
def test_ranking_ignores_rounding_noise_only(
    rows: Tensor, cols: Tensor, dtype: torch.dtype, noise: float, gap: float
) -> None:
    cosines = (K.unit(rows) @ K.unit(cols).T).to(dtype)
    tied = torch.tensor([[0.5, 0.25, 0.5, 0.0, 0.25, 0.5, 1.0, 0.0, 1.0]], dtype=dtype).repeat(4, 1)
    rising = torch.arange(COLS, dtype=dtype)  # would reverse the order of every tie

    def loss(step: float) -> float:
        scores = tied + step / COLS * rising
        return float(list_mle_rows(cosines, OFFSET, scores, temperature=TAU).mean())

    assert loss(noise) == loss(0.0) != loss(COLS * gap)


def test_similarity_rounds_each_cosine() -> None:
    first, second = constants(3), constants(4)
    parts = K.Similarity(((0.5, *first), (0.5, *second)), dtype=torch.float16)
    got = parts.normalized(torch.float64).block(1, 3)
    exact = [
        K.Similarity(((1.0, *t),)).normalized(torch.float64).block(1, 3) for t in (first, second)
    ]
    want = sum(0.5 * e.half().double() for e in exact)
    assert torch.equal(got, want)
    assert not torch.equal(got, sum(0.5 * e for e in exact))


@pytest.mark.parametrize("loss", [K.alignment_kl, K.list_net])
def test_a_perfect_student_has_no_slope(loss: Any) -> None:
    # At the teacher's own cosines and equal temperatures the divergence is at its minimum.
    cols = draw(COLS, WIDTH, seed=2).requires_grad_()
    teacher = K.Similarity(((1.0, cols, cols),))
    if loss is K.alignment_kl:
        value = loss(cols, cols, teacher, student_temperature=0.5)
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
    else:
        value = loss(cols, cols, teacher, teacher_temperature=TAU, temperature=TAU)
    (grad,) = torch.autograd.grad(value, cols)
    assert grad.abs().max() < 1e-12


def test_uninformative_student_costs_log_factorial() -> None:
    same = torch.ones(7, 3, dtype=torch.float64)
    teacher = K.Similarity(((1.0, *(2 * (draw(7, 4, seed=3),))),))
    total = K.list_mle(same, same, teacher, temperature=TAU, reduction="sum")
    assert float(total) == pytest.approx(math.lgamma(8))
    mean = K.list_mle(same, same, teacher, temperature=TAU)
    assert float(mean) == pytest.approx(math.lgamma(8) / 7)


def test_consistency_against_torch() -> None:
    text, image = (draw(12, WIDTH, seed=s).abs().requires_grad_() for s in (1, 2))
    unmatched = image.roll(5, 0)
    total, count = K.consistency(text, image, unmatched)
    criterion = torch.nn.CosineEmbeddingLoss(margin=0.2)
    target = torch.ones(12).repeat(2)
    target[12:] = -1
    want = criterion(torch.cat([text, text]), torch.cat([image, unmatched]), target)
    assert float(count) == 24
    assert (total / count).item() == pytest.approx(want.item(), rel=1e-10)
    got_grads = torch.autograd.grad(total / count, (text, image), retain_graph=True)
    for got, grad in zip(got_grads, torch.autograd.grad(want, (text, image)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_consistency_of_ranks_with_dropped_pairs(world: int) -> None:
    text, image = (draw(12, WIDTH, seed=s).relu() for s in (1, 2))
    unmatched, keep = image.roll(5, 0), torch.arange(12) > 3
    cosine = torch.nn.functional.cosine_similarity
    terms = [*(1 - cosine(text, image)), *(cosine(text, unmatched) - 0.2).relu()[keep]]
    parts = [
        K.consistency(*(t.chunk(world)[r] for t in (text, image, unmatched, keep)))
        for r in range(world)
    ]
    count = sum(c for _, c in parts)
    assert float(count) == len(terms) == 20
    # The rule for uneven counts: local sum * W / global count, then the average over ranks.
    averaged = sum(s * world / count for s, _ in parts) / world
    assert float(averaged) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-12)
    if world == 4:  # negative control: the mean of the ranks' own means is something else
        naive = sum(s / c for s, c in parts) / world
        assert abs(float(naive - averaged)) > 1e-3
