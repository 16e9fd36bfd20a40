"""The angular margin at its edges: gate, identical and opposite vectors, soft labels."""

from __future__ import annotations

import math

import dalr_kernels as K
import pytest
import torch
from dalr_kernels.margin import MIN_SINE_SQUARED, angular_margin
from torch import Tensor

MARGIN = 0.18


def at_angles(*angles: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors in the plane at these angles, one per row."""
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=dtype)


def shifted(angle: float, soft: float | None = None) -> tuple[float, float]:
    """Value and derivative of the margin for one negative at this angle."""
    cosines = torch.tensor([[1.0, math.cos(angle)]], dtype=torch.float64, requires_grad=True)
    labels = None if soft is None else torch.full((1, 2), soft, dtype=torch.float64)
    value = angular_margin(cosines, 0, MARGIN, labels)[0, 1]
    (grad,) = torch.autograd.grad(value, cosines)
    return float(value.detach()), float(grad[0, 1])


@pytest.mark.parametrize("angle", [0.0, 0.01, 0.1, 0.1799])
def test_close_negatives_keep_their_cosine(angle: float) -> None:
    value, grad = shifted(angle)
    assert value == math.cos(angle)
    assert grad == 1.0


@pytest.mark.parametrize("angle", [0.1801, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("soft", [None, -1.0, -0.3, 0.0, 0.4, 1.0])
def test_far_negatives_lose_the_margin(angle: float, soft: float | None) -> None:
    # A negative label makes the margin larger than m; the angle may then pass zero.
    shift = MARGIN * (1.0 - (soft or 0.0))
    value, grad = shifted(angle, soft)
    assert value == pytest.approx(math.cos(angle - shift), rel=1e-12)
    assert grad == pytest.approx(math.sin(angle - shift) / math.sin(angle), rel=1e-9)


def test_the_gate_ignores_soft_labels() -> None:
    assert shifted(0.17, soft=0.9)[0] == math.cos(0.17)
    assert shifted(0.19, soft=1.0)[0] == pytest.approx(math.cos(0.19))


def test_positives_have_no_margin() -> None:
    cosines = torch.full((2, 3), 0.2, dtype=torch.float64)
    changed = angular_margin(cosines, 1, MARGIN) != cosines
    assert changed.tolist() == [[True, False, True], [True, True, False]]


def test_gate_in_the_loss() -> None:
    # Row 0 has one negative inside the gate and one outside.
    rows, cols = at_angles(0.0), at_angles(0.02, 0.1, 1.0)
    logits = [math.cos(0.02), math.cos(0.1), math.cos(1.0 - MARGIN)]
    want = math.log(sum(math.exp(c / 0.05) for c in logits)) - logits[0] / 0.05
    for impl in ("reference", "torch"):
        value = K.info_nce(rows, cols, temperature=0.05, margin=MARGIN, impl=impl)
        assert float(value) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_identical_and_opposite_vectors(impl: str, dtype: torch.dtype) -> None:
    # c = 1 on the diagonal and off it, c = -1 off it, and both views identical.
    rows = at_angles(0.3, 0.3, 0.3 + math.pi, 2.0, dtype=dtype).requires_grad_()
    cols = rows.detach().clone().requires_grad_()
    soft = K.Similarity(((1.0, -rows, cols),))
    for labels in (None, soft):
        value = K.info_nce(
            rows, cols, temperature=0.05, margin=MARGIN, soft_labels=labels, impl=impl
        )
        grads = torch.autograd.grad(value, (rows, cols))
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() and g.abs().max() < 1e4 for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clamped_root_has_no_gradient(dtype: torch.dtype) -> None:
    cosines = torch.tensor([[1.0, -1.0]], dtype=dtype, requires_grad=True)
    value = angular_margin(cosines, 0, MARGIN)[0, 1]
    (grad,) = torch.autograd.grad(value, cosines)
    root = math.sqrt(MIN_SINE_SQUARED[dtype])
    assert float(value.detach()) == pytest.approx(-math.cos(MARGIN) + root * math.sin(MARGIN))
    assert float(grad[0, 1]) == pytest.approx(math.cos(MARGIN))


def test_the_inverse_cosine_fails_there() -> None:
    # Negative control: the published form has no finite gradient for identical views.
    cosines = torch.eye(3, dtype=torch.float64).requires_grad_()
    own = torch.eye(3, dtype=torch.bool)
    angle = torch.acos(cosines)
    value = torch.where(own, cosines, torch.cos(angle - MARGIN)).logsumexp(1).sum()
    (grad,) = torch.autograd.grad(value, cosines)
    assert not torch.isfinite(grad).all()


def test_ungated_cells_must_not_enter_the_root() -> None:
    # Negative control: selecting only the result multiplies an infinite derivative by zero.
    cosines = torch.eye(3, dtype=torch.float64).requires_grad_()
    root = (1.0 - cosines * cosines).sqrt()
    gate = ~torch.eye(3, dtype=torch.bool)
    value = torch.where(gate, cosines * math.cos(MARGIN) + root, cosines).sum()
    (grad,) = torch.autograd.grad(value, cosines)
    assert torch.isnan(grad).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_zero_vectors_are_finite(impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 5, generator=generator).to(dtype)
    cols = torch.randn(4, 5, generator=generator).to(dtype)
    rows[0] = cols[2] = 0.0
    rows.requires_grad_()
    teacher = K.Similarity(((1.0, cols, cols),))
    tokens, mask = cols[:, None, :], torch.ones(4, 1)
    student = {"temperature": 0.05, "margin": MARGIN, "impl": impl}
    values = [
        K.info_nce(rows, cols, soft_labels=teacher, **student),
        K.alignment_kl(rows, cols, teacher, **student),
        K.list_net(rows, cols, teacher, teacher_temperature=0.05, **student),
        K.list_mle(rows, cols, teacher, **student),
        K.global_to_local(rows, tokens, mask, tokens, mask, temperature=0.05, impl=impl),
    ]
    for value in values:
        (grad,) = torch.autograd.grad(value, rows)
        assert torch.isfinite(value)
        # The derivative at a zero vector is 1 / 1e-8, beyond the range of float16.
        nonzero = grad[1:] if dtype == torch.float16 else grad
        assert torch.isfinite(nonzero).all()
