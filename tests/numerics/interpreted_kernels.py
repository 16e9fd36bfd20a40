"""Tests of the fused kernels under Triton's interpreter; `test_kernels_triton.py` runs them.

The interpreter has to be chosen before Triton is imported, hence a process of its own. All
operands of a kernel are float16 or float32, so the interpreter's wrong products of bfloat16 (it
multiplies bit patterns, Triton 3.9) are never reached.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dalr_kernels as K
import fused_cases as cases
import golden_terms
import pytest
import torch
from dalr_kernels.fused import call, launch, stream, tuning
from dalr_kernels.fused.row_kernel import row_kernel
from golden_terms import Golden
from torch import Tensor

if TYPE_CHECKING:
    from dalr_kernels.fused.call import Inputs, PreparedCall

MODES = pytest.mark.parametrize("mode", ["workspace", "stream"])
TAU = {"temperature": 0.05}


def test_the_interpreter_runs() -> None:
    assert type(row_kernel).__name__ == "InterpretedFunction"


def check(case: cases.Case, **how: Any) -> float:
    return case.excess(case.run("triton", case.dtype, **how), case.eager(), case.truth())


@pytest.mark.parametrize(
    ("name", "mode", "dtype", "shape"), cases.pairwise(), ids=lambda value: str(value)
)
def test_against_float64(
    name: str, mode: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    assert check(cases.make(shape, dtype, name), mode=mode) < 1.0


@pytest.mark.soak
@MODES
@pytest.mark.parametrize("shape", [*cases.SHAPES, (127, 131, 4, 96)], ids=str)
@pytest.mark.parametrize("dtype", cases.TOLERANCES, ids=str)
@pytest.mark.parametrize("name", cases.TERMS)
def test_every_combination(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int, int], mode: str
) -> None:
    assert check(cases.make(shape, dtype, name), mode=mode) < 1.0
    assert check(cases.make(shape, dtype, name), mode=mode, chunk_rows=17) < 1.0


@MODES
@pytest.mark.parametrize("chunk", [5, 48])
def test_ragged_chunks(mode: str, chunk: int) -> None:
    case = cases.make((7, 83, 60, 20), torch.float32, "triple, one margin, two teachers")
    assert check(case, mode=mode, chunk_rows=chunk) < 1.0


@MODES
def test_float32_that_was_16_bit_before(mode: str) -> None:
    # Heads of a bf16 run return float32: multiplied in float16, within its tolerances.
    case = cases.make((9, 83, 60, 40), torch.float32, "triple, one margin, two teachers")
    with K.half_operands():
        got = case.run("triton", torch.float32, mode=mode)
    assert all(x.dtype == torch.float32 for x in got)
    eager, truth = case.eager(), case.truth()
    assert case.excess(got, eager, truth) > 1.0  # control: not the float32 products
    case.dtype = torch.float16
    assert case.excess(got, eager, truth) < 1.0
    assert check(cases.make((9, 83, 60, 40), torch.float32, "triple, plain"), mode=mode) < 1.0


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Inputs], Inputs]) -> None:
    """Let the kernels see other inputs than the caller gave."""
    prepare = launch.prepare

    def changed(inputs: Inputs, *rest: Any) -> PreparedCall:
        prepared = prepare(inputs, *rest)
        return prepared._replace(inputs=change(prepared.inputs))

    monkeypatch.setattr(launch, "prepare", changed)


MISTAKES: dict[str, Callable[[Inputs], Inputs]] = {
    "the positive is one column off": lambda x: x._replace(col_offset=x.col_offset + 1),
    "the last column is dropped": lambda x: x._replace(cols=x.cols[:-1]),
    "ids are ignored": lambda x: x._replace(
        row_ids=x.row_ids - 2 if x.row_ids is not None else None
    ),
}


@MODES
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative controls of every comparison with float64 above.
    dtype = torch.float32 if mode == "workspace" else torch.bfloat16
    case = cases.make((6, 67, 20, 24), dtype, "triple, one margin, two teachers")
    assert check(case, mode=mode) < 1.0
    spoil(monkeypatch, MISTAKES[mistake])
    assert check(case, mode=mode) > 1.0


PUBLISHED = (
    "contrastive", "cross_modal_contrastive", "cross_modal_kl", "intra_modal_kl", "rank_listnet",
)  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), [("a", "stream"), ("b", "workspace")])
@pytest.mark.parametrize("term", PUBLISHED)
def test_published_values(term: str, name: str, mode: str) -> None:
    g = Golden(name, torch.float32)
    value = golden_terms.PUBLISHED[term](g, impl="triton", mode=mode)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(g.arrays[f"loss.{term}"]), rel=1e-5)
    for leaf, tensor in g.leaves.items():
        if (key := f"grad.{term}.{leaf}") in g.arrays:
            want = torch.tensor(g.arrays[key])
            assert tensor.grad is not None
            error = float((tensor.grad.double() - want).abs().max() / want.abs().max())
            assert error < 2e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@MODES
def test_non_contiguous_inputs(mode: str) -> None:
    def gradients(rows: Tensor, cols: Tensor, constant: Tensor, impl: str) -> list[Tensor]:
        leaves = [rows.requires_grad_(), cols.requires_grad_()]
        teacher = K.Similarity(((1.0, constant[:5], constant),))
        value = K.alignment_kl(*leaves, teacher, impl=impl, mode=mode)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    rows, cols, constant = draw(6, 5).T, draw(9, 12)[:, ::2], draw(7, 9).T
    assert not (rows.is_contiguous() or cols.is_contiguous() or constant.is_contiguous())
    want = gradients(rows, cols, constant, "reference")
    for got, expected in zip(gradients(rows, cols, constant, "triton"), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@MODES
def test_no_gradient_work_without_need(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gradient computed")

    rows, cols = draw(5, 8, seed=1), draw(9, 8, seed=2)
    want = K.info_nce(rows, cols, **TAU, impl="reference")
    monkeypatch.setattr(stream, "launch_gradients", refuse)
    monkeypatch.setattr(call, "add_product", refuse)
    found = [K.info_nce(rows, cols, **TAU, impl="triton", mode=mode)]
    rows.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found.append(K.info_nce(rows, cols, **TAU, impl="triton", mode=mode))
    assert all(float(value) == pytest.approx(float(want), rel=1e-5) for value in found)
    assert not any(value.requires_grad for value in found)
    with pytest.raises(AssertionError, match="gradient computed"):
        K.info_nce(rows, cols, **TAU, impl="triton", mode=mode)


@MODES
def test_only_the_wanted_side_gets_a_gradient(mode: str) -> None:
    for side in (0, 1):
        pair = draw(5, 8, seed=1), draw(9, 8, seed=2)
        pair[side].requires_grad_()
        K.info_nce(*pair, **TAU, impl="triton", mode=mode).backward()
        assert pair[side].grad is not None and pair[1 - side].grad is None


def test_one_graph_serves_several_upstream_gradients() -> None:
    rows, cols = draw(5, 8, seed=1).requires_grad_(), draw(9, 8, seed=2)
    value = K.info_nce(rows, cols, **TAU, impl="triton")
    (plain,) = torch.autograd.grad(value, rows, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3.5 * value + value**2, rows)
    torch.testing.assert_close(scaled, plain * (2.0 * value.detach() - 3.5))


def test_second_derivatives_are_refused() -> None:
    rows, cols = draw(5, 8, seed=1).requires_grad_(), draw(9, 8, seed=2)
    value = K.info_nce(rows, cols, **TAU, impl="triton")
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(value, rows, create_graph=True)


def test_autocast_changes_nothing() -> None:
    rows, cols = draw(5, 8, seed=1), draw(9, 8, seed=2)
    want = K.info_nce(rows, cols, **TAU, impl="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(K.info_nce(rows, cols, **TAU, impl="triton"), want)


@MODES
@pytest.mark.parametrize("dtype", cases.TOLERANCES, ids=str)
def test_edge_vectors_are_finite(dtype: torch.dtype, mode: str) -> None:
    # Zero vectors, identical and opposite ones: |cos| = 1 on and off the diagonal.
    rows = draw(6, 5, seed=3)
    rows[0] = 0.0
    cols = rows.clone()
    cols[2] = 0.0
    cols[4], cols[5] = -rows[3], rows[3]
    leaves = [t.to(dtype).requires_grad_() for t in (rows, cols)]
    teacher = K.Similarity(((1.0, cols.to(dtype), cols.to(dtype)),))
    found = K.row_losses(
        *leaves, teacher, impl="triton", mode=mode,
        info_nce=K.InfoNCE(0.05, 0.18, soft_labels=teacher),
        alignment_kl=K.AlignmentKL(margin=0.18, temperature=0.05),
        list_net=K.ListNet(0.05, 0.05, margin=0.18),
    )  # fmt: skip
    grads = torch.autograd.grad(found.total, leaves)
    assert torch.isfinite(found.total)
    # The derivative at a zero vector is 1 / 1e-8, beyond the range of float16.
    short = dtype == torch.float16
    assert torch.isfinite(grads[0][1:] if short else grads[0]).all()
    assert torch.isfinite(grads[1][[1, 3, 4, 5]] if short else grads[1]).all()


@MODES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity(bad: float, mode: str) -> None:
    rows, cols = draw(5, 8, seed=1), draw(9, 8, seed=2)
    rows[3, 2] = bad
    loss = K.info_nce(rows, cols, **TAU, margin=0.18, impl="triton", mode=mode, check_finite=False)
    assert torch.isnan(loss)
    with pytest.raises(ValueError, match="1 of 5 rows hold NaN or infinity, the first is row 3"):
        K.info_nce(rows, cols, **TAU, impl="triton", mode=mode, check_finite=True)


def test_float64_is_left_to_torch() -> None:
    rows, cols = draw(5, 8).double(), draw(9, 8).double()
    with pytest.raises(ValueError, match=r"rows are torch.float64; use impl='auto'"):
        K.info_nce(rows, cols, **TAU, impl="triton")
    assert K.info_nce(rows, cols, **TAU).dtype == torch.float64


def test_rounded_teachers() -> None:
    rows, cols, constant = draw(5, 8, seed=1), draw(9, 8, seed=2), draw(9, 6, seed=3)
    for dtype in (torch.float16, torch.bfloat16):
        factors = tuple((w, draw(5, 6, seed=4), constant) for w in (0.3, 0.7))
        teacher = K.Similarity(factors, dtype)
        want = K.alignment_kl(rows, cols, teacher, teacher_temperature=0.01, impl="reference")
        got = K.alignment_kl(rows, cols, teacher, teacher_temperature=0.01, impl="triton")
        plain = K.Similarity(factors)
        other = K.alignment_kl(rows, cols, plain, teacher_temperature=0.01, impl="triton")
        assert float(got) == pytest.approx(float(want), rel=1e-5)
        assert abs(float(other) - float(want)) > 1e-5 * float(want)  # control


def test_terms_of_different_margins_pass_apart() -> None:
    case = cases.make((5, 19, 2, 16), torch.float32, "triple, plain")
    terms = case.terms(torch.float32)
    terms["info_nce"] = K.InfoNCE(0.05, 0.3)
    terms["list_net"] = K.ListNet(0.05, 0.05, 0.2, teacher=terms["teacher"])
    terms["list_mle"] = K.ListMLE(0.05, weight=0.1)
    groups = tuning.groups([terms["info_nce"], terms["list_net"], terms["list_mle"]])
    assert groups == [[0], [1], [2]]
    rows, cols = case.rows.float(), case.cols.float()
    want = K.row_losses(rows, cols, **terms, impl="reference")
    for got, expected in zip(K.row_losses(rows, cols, **terms, impl="triton"), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@MODES
def test_torch_compile(mode: str) -> None:
    rows, cols = draw(5, 8, seed=1).requires_grad_(), draw(9, 8, seed=2).requires_grad_()
    constant, ids = draw(9, 6, seed=3), torch.arange(9) // 2

    def loss(rows: Tensor, cols: Tensor) -> Tensor:
        teacher = K.Similarity(((1.0, constant[:5], constant),))
        found = K.row_losses(
            2.0 * rows, cols, teacher, impl="triton", mode=mode,
            info_nce=K.InfoNCE(0.05, 0.18, row_ids=ids[:5], col_ids=ids),
            alignment_kl=K.AlignmentKL(weight=0.2), list_net=K.ListNet(0.05, 0.05),
        )  # fmt: skip
        return found.total.sin() + found.info_nce

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    want = loss(rows, cols)
    got = compiled(rows, cols)
    torch.testing.assert_close(got, want)
    pairs = zip(
        torch.autograd.grad(got, (rows, cols)), torch.autograd.grad(want, (rows, cols)), strict=True
    )
    for grad, expected in pairs:
        torch.testing.assert_close(grad, expected)


def test_the_operator_is_registered_rightly() -> None:
    from dalr_kernels.fused.operator import row_losses, scaled

    rows, cols = draw(3, 4, seed=1).requires_grad_(), draw(5, 4, seed=2).requires_grad_()
    scalars, layout, _ = tuning.describe([K.InfoNCE(0.05, 0.18)])
    arguments = (
        rows, cols, [], list(scalars), list(layout), None, None, 0, 2**20, None, "auto", False,
        True, True,
    )  # fmt: skip
    torch.library.opcheck(row_losses, arguments)
    torch.library.opcheck(scaled, (draw(3, 4), torch.tensor(2.0), torch.float16))


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    rows, cols = draw(5, 8), draw(11, 8)
    tuning.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "dalr_kernels"):
        for _ in range(3):
            K.info_nce(rows, cols, **TAU, impl="triton")
        K.info_nce(rows, cols, **TAU, impl="triton", mode="stream", chunk_rows=16)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "row losses 5 x 11, width 8, torch.float32: mode workspace, R = 5, C = 16",
        "row losses 5 x 11, width 8, torch.float32: mode stream, R = 5, C = 16",
    ]
