"""Closed forms in place: orders, spreads and shared memory that whole losses rarely meet."""

from __future__ import annotations

import math

import dalr_kernels as K
import pytest
import torch
from dalr_kernels import reference
from dalr_kernels.eager import closed_form
from dalr_kernels.eager.closed_form import BufferPool, GradientSink
from torch import Tensor


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_cols", [1, 2, 33, 64, 1000])
def test_the_order_is_the_reference_order_backwards(dtype: torch.dtype, num_cols: int) -> None:
    scores = (draw(5, num_cols, dtype=dtype) * 20).round() / 40  # many ties
    scores += reference.RANK_GRID[dtype] / 8  # less than the grid: still ties
    grid = reference.RANK_GRID[dtype]
    want = (scores / grid).round().argsort(dim=1, descending=True, stable=True)
    got = closed_form.ascending_order(scores, torch.empty_like(scores))
    assert torch.equal(got.flip(1), want)


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("temperature", [0.5, 0.034, 0.02, 0.0034, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_list_mle_on_both_sides_of_the_spread(
    dtype: torch.dtype, temperature: float, eps: float
) -> None:
    # Opposite vectors: the spread of the logits is as large as it can be.
    rows, teacher = draw(4, 6, seed=1), draw(40, 6, seed=2)
    cols = torch.cat([rows, -rows, draw(32, 6, seed=3)])
    same = K.Similarity(((1.0, teacher[:4], teacher),))

    def run(kind: torch.dtype, impl: str) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (rows, cols)]
        value = K.list_mle(*leaves, same, temperature=temperature, eps=eps, impl=impl)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    limit = 1e-9 if dtype == torch.float64 else 2e-5
    for got, want in zip(run(dtype, "torch"), run(torch.float64, "reference"), strict=True):
        scale = float(want.abs().max())
        assert torch.isfinite(got).all()
        assert float((got.double() - want).abs().max()) < limit * scale


def test_beyond_the_spread_the_sums_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative control of the switch to logarithms.
    monkeypatch.setitem(closed_form.LARGEST_SPREAD, torch.float32, math.inf)
    rows = draw(3, 4, seed=1, dtype=torch.float32)
    cols = torch.cat([rows, -rows]).requires_grad_()
    same = K.Similarity(((1.0, rows, cols),))
    value = K.list_mle(rows, cols, same, temperature=0.002)
    (gradient,) = torch.autograd.grad(value, cols)
    assert not (torch.isfinite(value) and torch.isfinite(gradient).all())


def test_equal_largest_cells_share_the_slope_of_the_maximum() -> None:
    rows = draw(3, 4, seed=1)
    cols = torch.cat([rows, rows, draw(2, 4, seed=2)])  # every maximum twice
    teacher = K.Similarity(((1.0, draw(3, 5, seed=3), draw(8, 5, seed=4)),))
    found = []
    for impl in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in (rows, cols)]
        value = K.list_mle(*leaves, teacher, temperature=0.3, eps=0.01, impl=impl)
        found.append(torch.autograd.grad(value, leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_matrices_are_used_again() -> None:
    buffers = BufferPool(torch.empty(0), 4, 3)
    with buffers.borrow(2, 3) as (a, b), buffers.borrow(1, 2) as (c,):
        assert a.shape == b.shape == (3, 3) and c.shape == (2, 3)
        first = {a.data_ptr(), b.data_ptr(), c.data_ptr()}
        assert len(first) == 3
    with buffers.borrow(3, 4) as again:
        assert {t.data_ptr() for t in again} == first


@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("clamp", [False, True])
def test_results_do_not_depend_on_what_spare_matrices_hold(margin: float, clamp: bool) -> None:
    # Every function must write before it reads: NaN in fresh memory would come through.
    rows, cols, constant = draw(4, 5), draw(9, 5, seed=1), draw(9, 6, seed=2)
    ids = torch.tensor([0, 1, 0, -1, 1, -1, 2, 3, 0])
    labels = K.Similarity(((1.0, constant[:4], constant), (-0.5, rows, cols)))
    teacher = K.Similarity(((1.0, constant[:4], constant),), torch.float16)

    def run() -> list[Tensor]:
        leaves = [rows.clone().requires_grad_(), cols.clone().requires_grad_()]
        found = K.row_losses(
            *leaves,
            teacher,
            info_nce=K.InfoNCE(
                0.1, margin, soft_labels=labels, clamp_soft_labels=clamp, row_ids=ids[:4],
                col_ids=ids, mask_above=(labels, 0.4),
            ),
            alignment_kl=K.AlignmentKL(margin=margin),
            list_net=K.ListNet(0.1, 0.05, margin),
            list_mle=K.ListMLE(0.1, 0.1),
            chunk_rows=3,
        )  # fmt: skip
        return [found.total.detach(), *torch.autograd.grad(found.total, leaves)]

    plain = run()
    acquire = BufferPool.acquire

    def spoiled(buffers: BufferPool) -> Tensor:
        return acquire(buffers).fill_(math.nan)

    BufferPool.acquire = spoiled  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for got, want in zip(run(), plain, strict=True):
            assert torch.equal(got, want)
    finally:
        BufferPool.acquire = acquire


def test_a_sink_without_matrix_takes_nothing() -> None:
    GradientSink(None, 2.0).add(torch.ones(2, 2), 3.0)
    grad = torch.ones(2, 2)
    GradientSink(grad, 2.0).add(torch.ones(2, 2), 3.0)
    assert torch.equal(grad, torch.full((2, 2), 7.0))


def test_local_rows_inside_the_columns_are_not_copied() -> None:
    cols = draw(9, 4)
    views = {"slice": cols[3:7], "whole": cols, "first": cols[:1]}
    for rows in views.values():
        ((_, unit_rows, unit_cols),) = (
            K.Similarity(((1.0, rows, cols),)).normalized(cols.dtype).factors
        )
        assert unit_rows.untyped_storage().data_ptr() == unit_cols.untyped_storage().data_ptr()
        torch.testing.assert_close(unit_rows, K.unit(rows))
    others = {
        "copy": cols[3:7].clone(), "every second": cols[::2], "other columns": draw(9, 8)[:, ::2],
        "longer than the columns": draw(12, 4)[3:12],
    }  # fmt: skip
    for name, rows in others.items():
        ((_, unit_rows, unit_cols),) = (
            K.Similarity(((1.0, rows, cols),)).normalized(cols.dtype).factors
        )
        assert unit_rows.untyped_storage().data_ptr() != unit_cols.untyped_storage().data_ptr(), (
            name
        )
        torch.testing.assert_close(unit_rows, K.unit(rows))
    # the columns are a part of the storage of the rows
    base = draw(9, 4)
    ((_, unit_rows, _),) = (
        K.Similarity(((1.0, base[1:4], base[2:9]),)).normalized(base.dtype).factors
    )
    torch.testing.assert_close(unit_rows, K.unit(base[1:4]))
