"""Row chunks against the dense specification: shapes, types, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dalr_kernels as K
import pytest
import torch
from dalr_kernels.eager import closed_form
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import PeakMemory
from torch import Tensor

NAMES = ("info_nce", "soft_info_nce", "alignment_kl", "list_net", "list_mle", "global_to_local")


class Problem:
    """Random inputs of one shape and every loss on them as ``loss(name, **how)``."""

    def __init__(
        self, rows: int, cols: int, width: int, *, offset: int = 0, tokens: int = 3, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.rows, self.cols = draw(rows, width), draw(cols, width)
        self.constant = draw(cols, width + 1)
        self.tokens = draw(cols, tokens, width)
        self.mask = torch.rand(cols, tokens, generator=generator) < 0.7
        self.ids = torch.randint(-1, max(2, cols // 2), (cols,), generator=generator)
        self.own = slice(offset, offset + rows)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another type."""
        for key in ("rows", "cols", "constant", "tokens"):
            setattr(self, key, getattr(self, key).to(dtype))
        return self

    def leaves(self) -> tuple[Tensor, Tensor]:
        self.rows, self.cols = (t.detach().requires_grad_() for t in (self.rows, self.cols))
        return self.rows, self.cols

    def loss(self, name: str, **how: Any) -> Tensor:
        own = self.own
        teacher = K.Similarity(((0.4, self.constant[own], self.constant),))
        how = {"temperature": 0.1, "col_offset": own.start, **how}
        ids = {"row_ids": self.ids[own], "col_ids": self.ids}
        pair = self.rows, self.cols
        match name:
            case "info_nce":
                return K.info_nce(*pair, margin=0.2, **ids, **how)
            case "soft_info_nce":
                return K.info_nce(
                    *pair, margin=0.2, soft_labels=teacher, mask_above=(teacher, 0.3), **how
                )
            case "alignment_kl":
                return K.alignment_kl(*pair, teacher, margin=0.2, **how)
            case "list_net":
                return K.list_net(*pair, teacher, teacher_temperature=0.05, **how)
            case "list_mle":
                return K.list_mle(*pair, teacher, eps=1e-7, margin=0.2, **how)
        local = self.tokens[own], self.mask[own]
        return K.global_to_local(self.rows, *local, self.tokens, self.mask, **ids, **how)

    def value_and_gradients(self, name: str, **how: Any) -> list[Tensor]:
        leaves = self.leaves()
        value = self.loss(name, **how)
        grads = torch.autograd.grad(value, leaves, allow_unused=name == "global_to_local")
        return [value.detach(), *(g for g in grads if g is not None)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, dict[str, int]]:
    rows, extra = draw(st.integers(1, 7)), draw(st.integers(0, 6))
    problem = Problem(
        rows,
        rows + extra,
        draw(st.integers(2, 6)),
        offset=draw(st.integers(0, extra)),
        tokens=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    how = {"chunk_rows": draw(st.integers(1, 9))}
    if draw(st.booleans()):
        how["workspace_bytes"] = draw(st.integers(1, 4000))
    return problem, how


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(NAMES))
def test_chunks_equal_the_dense_specification(
    case: tuple[Problem, dict[str, int]], name: str
) -> None:
    problem, how = case
    dense = problem.value_and_gradients(name, impl="reference")
    chunked = problem.value_and_gradients(name, impl="torch", **how)
    for got, want in zip(chunked, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, impl: str) -> None:
    problem = Problem(3, 5, 3, offset=1, seed=4)

    def function(rows: Tensor, cols: Tensor) -> Tensor:
        problem.rows, problem.cols = rows, cols
        how = {} if impl == "reference" else {"chunk_rows": 2}
        return problem.loss(name, impl=impl, temperature=0.5, **how)

    torch.autograd.gradcheck(function, problem.leaves(), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_upstream_gradient(name: str) -> None:
    problem = Problem(5, 8, 4, offset=2)
    leaves = problem.leaves()[:1] if name == "global_to_local" else problem.leaves()
    value = problem.loss(name, chunk_rows=2)
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    # Twice through one graph, with another factor: the stored gradient must stay untouched.
    scaled = torch.autograd.grad(-3.5 * value + value**2, leaves)
    for got, grad in zip(scaled, plain, strict=True):
        torch.testing.assert_close(got, grad * (2.0 * value.detach() - 3.5))


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_inputs(name: str) -> None:
    problem = Problem(5, 8, 4, offset=2)
    want = problem.value_and_gradients(name, impl="reference")
    for key in ("rows", "cols", "constant", "tokens"):
        tensor = getattr(problem, key).detach()
        padded = torch.stack([tensor, torch.full_like(tensor, 9.0)], dim=-1)
        setattr(problem, key, padded.transpose(0, -2)[..., 0].transpose(0, -1))
        assert not getattr(problem, key).is_contiguous()
        assert torch.equal(getattr(problem, key), tensor)
    for got, expected in zip(problem.value_and_gradients(name, chunk_rows=2), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs(name: str, dtype: torch.dtype) -> None:
    # The same half-precision numbers in float64 are the truth. Computing in float32 must be no
    # worse than the bound of one rounding of the gradient to the input type.
    problem = Problem(6, 9, 16, offset=1, seed=2).to(dtype)
    got = problem.value_and_gradients(name)
    want = problem.to(torch.float64).value_and_gradients(name)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=1e-7)
    for grad, exact in zip(got[1:], want[1:], strict=True):
        assert grad.dtype == dtype
        limit = torch.finfo(dtype).eps * exact.abs().max()
        assert (grad.double() - exact).abs().max() < limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_beats_the_same_type_eager(dtype: torch.dtype) -> None:
    problem = Problem(32, 32, 64, seed=3).to(dtype)
    rows, cols = K.unit(problem.rows), K.unit(problem.cols)
    eager = torch.nn.functional.cross_entropy((rows @ cols.T) / 0.05, torch.arange(32))
    ours = K.info_nce(problem.rows, problem.cols, temperature=0.05)
    exact = K.info_nce(problem.rows.double(), problem.cols.double(), temperature=0.05)
    assert abs(float(ours - exact)) < 0.01 * abs(float(eager - exact))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_lower_precision(name: str, impl: str) -> None:
    problem = Problem(6, 9, 16, offset=1).to(torch.float32)
    want = problem.value_and_gradients(name, impl=impl)
    leaves = problem.leaves()[:1] if name == "global_to_local" else problem.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Negative control: inside this context a plain product is rounded.
        assert (problem.rows @ problem.cols.T).dtype == torch.bfloat16
        value = problem.loss(name, impl=impl)
    for got, expected in zip([value, *torch.autograd.grad(value, leaves)], want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_reproducible(name: str) -> None:
    problem = Problem(17, 31, 8, offset=5).to(torch.float32)
    first = problem.value_and_gradients(name, chunk_rows=4)
    for got, again in zip(first, problem.value_and_gradients(name, chunk_rows=4), strict=True):
        assert torch.equal(got, again)


def test_no_gradient_work_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(5, 8, 4)
    wanted = {name: float(problem.loss(name, impl="reference")) for name in NAMES}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gradient computed")

    def refuse_gradient(sink: closed_form.GradientSink, *_: Any) -> None:
        assert sink.grad is None, "gradient computed"

    monkeypatch.setattr(closed_form.GradientSink, "add", refuse_gradient)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    for name in NAMES:
        assert float(problem.loss(name, chunk_rows=2)) == pytest.approx(wanted[name], rel=1e-12)
    problem.leaves()
    contexts: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode]
    for context in contexts:
        with context():
            value = problem.loss("info_nce", chunk_rows=2)
        assert float(value) == pytest.approx(wanted["info_nce"], rel=1e-12)
    with pytest.raises(AssertionError, match="gradient computed"):
        problem.loss("info_nce", chunk_rows=2)


def test_only_the_wanted_side_gets_a_gradient() -> None:
    for side in (0, 1):
        problem = Problem(5, 8, 4)
        pair = problem.rows, problem.cols
        pair[side].requires_grad_()
        problem.loss("alignment_kl", chunk_rows=2).backward()
        assert pair[side].grad is not None and pair[1 - side].grad is None


def test_second_derivatives_are_refused() -> None:
    problem = Problem(5, 8, 4)
    rows, _ = problem.leaves()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(problem.loss("info_nce"), rows, create_graph=True)


BIG, WORKSPACE = 4096, 8 * 2**20


@pytest.mark.parametrize("name", ["soft_info_nce", "list_mle", "global_to_local"])
def test_memory_is_linear_in_the_batch(name: str) -> None:
    problem = Problem(BIG, BIG, 8, tokens=2).to(torch.float32)
    # A narrow share of the rows keeps this quick; the columns decide the size of a chunk.
    problem.rows, problem.own = problem.rows[:512], slice(0, 512)
    problem.leaves()
    with PeakMemory() as memory:
        problem.loss(name, workspace_bytes=WORKSPACE).backward()
    operands = sum(t.nbytes for t in (problem.rows, problem.cols, problem.constant, problem.tokens))
    assert memory.peak < WORKSPACE + 8 * operands
    assert memory.peak < 512 * BIG * 4 * 2, "not even two matrices of 512 rows"


@pytest.mark.parametrize("name", NAMES)
def test_dense_memory_is_quadratic(name: str) -> None:
    # Negative control: the same meter sees the dense matrices.
    problem = Problem(256, 256, 4).to(torch.float32)
    problem.leaves()
    with PeakMemory() as memory:
        problem.loss(name, impl="reference").backward()
    assert memory.peak > 5 * 256 * 256 * 4
    assert memory.largest >= 256 * 256 * 4
