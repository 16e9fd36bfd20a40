"""The shared pass against the separate losses, and the block sizes of the fused kernels."""

from __future__ import annotations

import math

import dalr_kernels as K
import fused_cases as cases
import pytest
import torch
from dalr_kernels.fused import tuning
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", cases.TERMS)
def test_one_pass_equals_separate_calls(name: str, impl: str) -> None:
    case = cases.make((7, 23, 9, 12), torch.float64, name)
    terms = case.terms(torch.float64) | {"impl": impl}
    if impl == "torch":
        terms["chunk_rows"] = 3
    mle = {"list_mle": K.ListMLE(0.05, weight=0.4)} if "triple" in name else {}
    leaves = [t.requires_grad_() for t in (case.rows, case.cols)]
    shared = K.row_losses(*leaves, **terms, **mle)
    names = [key for key in ("info_nce", "alignment_kl", "list_net") if key in terms] + [*mle]
    rest = {k: v for k, v in terms.items() if k not in names}
    alone = {k: K.row_losses(*leaves, **rest, **{k: (terms | mle)[k]}) for k in names}
    total = torch.stack([one.total for one in alone.values()]).sum()
    torch.testing.assert_close(shared.total, total, rtol=1e-12, atol=1e-12)
    for key, one in alone.items():
        component = getattr(shared, key)
        assert not component.requires_grad
        assert float(component) == pytest.approx(float(getattr(one, key)), rel=1e-12)
        weighted = (terms | mle)[key].weight * component
        assert float(weighted) == pytest.approx(float(one.total.detach()), rel=1e-12)
    for got, want in zip(
        torch.autograd.grad(shared.total, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def close_teachers() -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 features of a teacher whose cosines with row 0 differ by less than float32 holds."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 512, generator=generator, dtype=torch.float64)
    return tuple(
        (base + 1e-3 * torch.randn(150, 512, generator=generator, dtype=torch.float64)).half()
        for _ in range(2)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("out", [False, True])
def test_a_float64_teacher_is_exact_in_a_float32_loss(out: bool) -> None:
    """Cosines are those of float64, mixed in it and rounded once; float32 alone misses them."""
    one, two = close_teachers()
    factors = ((0.33, one, one), (0.67, two, two))
    cosines = [w * (K.unit(a.double()) @ K.unit(b.double()).T) for w, a, b in factors]
    exact = torch.stack(cosines).sum(0).float()

    def matrix(dtype: torch.dtype | None) -> torch.Tensor:
        similarity = K.Similarity(factors, dtype).normalized(torch.float32)
        return similarity.block(3, 140, torch.empty(137, 150) if out else None)

    wide = matrix(torch.float64)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, exact[3:140])
    for dtype in (None, torch.float32):  # control: what "float64" gave before
        assert not torch.equal(matrix(dtype), exact[3:140])


def test_a_float64_teacher_decides_the_ranking() -> None:
    """ListMLE reads the order of the teacher's cosines, which float32 puts otherwise."""
    one, two = close_teachers()
    z1, z2 = (torch.randn(150, 16, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    losses = {}
    for dtype in (torch.float32, torch.float64):
        teacher = K.Similarity(((0.5, one, one), (0.5, two, two)), dtype)
        impls = ("reference", "torch")
        losses[dtype] = [
            float(K.row_losses(z1, z2, teacher, list_mle=K.ListMLE(0.05), impl=impl).total)
            for impl in impls
        ]
        assert losses[dtype][0] == pytest.approx(losses[dtype][1], rel=1e-6)
    assert losses[torch.float64][1] != losses[torch.float32][1]


@pytest.mark.parametrize("name", ["triple, plain", "soft, mask"])
def test_under_torch_compile(name: str) -> None:
    case = cases.make((7, 23, 9, 12), torch.float32, name)
    terms = case.terms(torch.float32)
    leaves = [t.float().requires_grad_() for t in (case.rows, case.cols)]

    def loss(rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        return K.row_losses(2 * rows, cols, **terms).total.sin()

    want, got = loss(*leaves), torch.compile(loss, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for grad, expected in pairs:
        torch.testing.assert_close(grad, expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 4096), st.integers(0, 4),
    st.sampled_from([2, 4]), st.integers(2**22, 2**33),
    st.sampled_from(["auto", "workspace", "stream"]),
)  # fmt: skip
def test_blocks_fit_the_workspace(
    rows: int, more: int, width: int, matrices: int, itemsize: int, limit: int, mode: str
) -> None:
    limits = tuning.Limits(limit, None, mode)
    found = tuning.sizes(rows, rows + more, width, matrices, itemsize, limits)
    assert 1 <= found.rows <= rows
    assert found.cols <= tuning.padded(rows + more) and found.cols % tuning.PAD == 0
    used = found.rows * found.cols * itemsize * (1 + matrices)
    one_row = tuning.padded(rows + more) * itemsize * (1 + matrices)
    if found.mode == "workspace":
        assert found.cols == tuning.padded(rows + more)
        assert used <= max(limit, one_row)
    else:
        assert used <= limit * 1.1
    if mode != "auto":
        assert found.mode == mode


def test_the_mode_follows_the_memory() -> None:
    def mode(columns: int, workspace: int) -> str:
        return tuning.sizes(4096, columns, 768, 1, 2, tuning.Limits(workspace, None, "auto")).mode

    assert mode(32_768, 2**30) == mode(262_144, 2**30) == "workspace"
    assert mode(1_048_576, 2**30) == "stream"
    assert mode(1_048_576, 2**32) == "workspace"


def exponents(tau: float, weight: float = 1.0) -> tuning.Exponents:
    rows, cols = torch.randn(2, 3), torch.randn(4, 3)
    teacher = K.Similarity(((weight, rows, cols),))
    terms = [K.AlignmentKL(tau, tau, teacher=teacher)]
    scalars, layout, similarities = tuning.describe(terms)
    return tuning.exponents(scalars, layout, tuning.flatten(similarities))


@pytest.mark.parametrize(
    ("tau", "kind"),
    [(0.5, "plain"), (0.05, "plain"), (0.0245, "plain"), (0.0244, "centred"), (0.0225, "centred"),
     (0.013, "centred"), (0.0129, "online"), (0.005, "online")],
)  # fmt: skip
def test_the_offset_follows_the_temperature(tau: float, kind: str) -> None:
    found = exponents(tau)
    reach = math.log2(math.e) / tau
    largest, smallest = reach - found.kl[1], -reach - found.kl[1]
    assert found.online == (kind == "online")
    if kind == "online":
        return
    assert (largest == 0.0) == (kind == "plain")
    # Sums over 2^22 columns stay below 2^127, the best term of any row above the subnormals.
    assert largest + 22 < 127 and smallest >= -126 + tuning.GUARD_BITS
    assert exponents(tau, weight=50.0).online


def test_gradient_scale_leaves_room() -> None:
    scalars, _, _ = tuning.describe([K.InfoNCE(0.05), K.ListNet(0.01, 0.05, teacher=similar())])
    scale = tuning.gradient_scale(scalars, 2)
    bound = (1 / 0.05 + 1 / 0.01) * scale
    assert 2**11 <= bound <= 2**12 and math.log2(scale).is_integer()
    assert tuning.gradient_scale(scalars, 4) == 1.0


def similar() -> K.Similarity:
    return K.Similarity(((1.0, torch.randn(2, 3), torch.randn(4, 3)),))
