"""The fused kernels on a real GPU; skipped without one.

Needs torch, triton, numpy and pytest only: run ``pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
for directory in (ROOT / "kernels", ROOT / "tests" / "numerics"):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

import dalr_kernels as K  # noqa: E402
import fused_cases as cases  # noqa: E402
from dalr_kernels.fused import products  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MODES = pytest.mark.parametrize("mode", ["workspace", "stream"])
TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
LARGE = (384, 1031, 600, 97)
ALIGNED = (300, 2048, 1024, 256)


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def check(case: cases.Case, **how: object) -> float:
    return case.excess(case.run("triton", case.dtype, **how), case.eager(), case.truth())


@MODES
@TYPES
@pytest.mark.parametrize("name", cases.TERMS)
def test_against_float64(name, dtype, mode):
    assert check(cases.make(LARGE, dtype, name, "cuda"), mode=mode) < 1.0


@pytest.mark.parametrize(("name", "mode", "dtype", "shape"), cases.pairwise(), ids=str)
def test_small_shapes(shape, name, dtype, mode):
    assert check(cases.make(shape, dtype, name, "cuda"), mode=mode) < 1.0


@MODES
@TYPES
def test_aligned_shape(dtype, mode):
    case = cases.make(ALIGNED, dtype, "triple, soft by the teacher", "cuda")
    assert check(case, mode=mode) < 1.0


@MODES
@TYPES
def test_ragged_chunks(dtype, mode):
    case = cases.make(LARGE, dtype, "triple, one margin, two teachers", "cuda")
    for chunk in (1 if mode == "workspace" else 16, 100, 333):
        assert check(case, mode=mode, chunk_rows=chunk) < 1.0


@MODES
def test_mistakes_are_noticed(mode, monkeypatch):
    # Negative control: the positive is one column off.
    from dalr_kernels.fused import launch

    case = cases.make(LARGE, torch.bfloat16, "triple, plain", "cuda")
    prepare = launch.prepare

    def shifted(inputs, *rest):
        call = prepare(inputs, *rest)
        return call._replace(inputs=call.inputs._replace(col_offset=inputs.col_offset + 1))

    monkeypatch.setattr(launch, "prepare", shifted)
    assert check(case, mode=mode) > 1.0


@MODES
@TYPES
def test_same_bits_twice(dtype, mode):
    case = cases.make((700, 3001, 1500, 256), dtype, "triple, soft by the teacher", "cuda")
    how = {"mode": mode, "workspace_bytes": 2**20}
    runs = [case.run("triton", dtype, **how) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_auto_takes_the_kernels(caplog):
    from dalr_kernels.fused import tuning

    tuning.log_choice.cache_clear()
    rows, cols = torch.randn(2, 70, 64, device="cuda").unbind()
    with caplog.at_level("INFO", "dalr_kernels"):
        K.info_nce(rows, cols, temperature=0.05)
        K.info_nce(rows.double(), cols.double(), temperature=0.05)
    assert len(caplog.records) == 1


@MODES
def test_torch_compile(mode):
    rows = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cols = torch.randn(777, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    constant = torch.randn(777, 128, device="cuda")

    def loss(rows, cols):
        teacher = K.Similarity(((1.0, constant[:300], constant),))
        found = K.row_losses(
            2 * rows, cols, teacher, mode=mode, info_nce=K.InfoNCE(0.05, 0.18),
            alignment_kl=K.AlignmentKL(weight=0.2), list_net=K.ListNet(0.05, 0.05),
        )  # fmt: skip
        return found.total.sin()

    want = loss(rows, cols)
    got = torch.compile(loss, fullgraph=True)(rows, cols)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    pairs = zip(
        torch.autograd.grad(got, (rows, cols)), torch.autograd.grad(want, (rows, cols)), strict=True
    )
    for grad, expected in pairs:
        torch.testing.assert_close(grad, expected, rtol=2e-2, atol=float(expected.abs().max()) / 50)


@MODES
@pytest.mark.parametrize("num", [8192, 32768])
def test_memory_is_bounded(num, mode):
    width, workspace = 256, 64 * 2**20
    rows, cols = torch.randn(2, num, width, device="cuda", dtype=torch.bfloat16).unbind()
    rows, cols = rows.clone().requires_grad_(), cols.clone().requires_grad_()
    teacher = K.Similarity(((1.0, cols.detach(), cols.detach()),))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = K.row_losses(
        rows, cols, teacher, mode=mode, workspace_bytes=workspace,
        info_nce=K.InfoNCE(0.05, 0.18), alignment_kl=K.AlignmentKL(),
        list_net=K.ListNet(0.05, 0.05),
    )  # fmt: skip
    found.total.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # Three 16-bit copies, two float32 gradients, two gradients in the type of the inputs; a
    # temporary of 8192 rows where addmm does not add in float32; statistics of a block of rows.
    towers = num * width * (3 * 2 + 2 * 4 + 2 * 2)
    assert peak < towers + workspace + 8192 * width * 4 + 64 * 2**20
    assert peak < num * num * 2 or num < 32768  # control: less than one matrix in 16 bit


@MODES
def test_offsets_beyond_32_bits(mode):
    # R x N of the workspace passes 2^31 elements in "workspace"; columns x width in both.
    num_rows, num_cols, width = 1056, 2_100_000, 1040
    need = 2 * num_cols * (width * 4 + num_rows) + 12 * 2**30
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    cols = torch.randn(num_cols, width, device="cuda", dtype=torch.float16, generator=generator)
    offset = num_cols - num_rows
    rows = (cols[offset:] + 0.5 * torch.randn_like(cols[offset:])).requires_grad_()
    how = {"temperature": 0.05, "margin": 0.18, "col_offset": offset}
    whole = K.info_nce(rows, cols, mode=mode, workspace_bytes=2 * num_cols * (num_rows + 32), **how)
    (grad,) = torch.autograd.grad(whole, rows)
    picked = torch.tensor([0, 1, 527, num_rows - 1], device="cuda")
    few = rows.detach()[picked]
    unit = K.unit(few.float())
    cosines = torch.cat([unit @ K.unit(part.float()).T for part in cols.split(100_000)], dim=1)
    own = offset + picked
    losses = []
    for index in range(len(picked)):
        c = cosines[index].double()
        shifted = torch.cos(torch.acos(c.clamp(-1, 1)) - 0.18)
        gate = c < torch.cos(torch.tensor(0.18))
        gate[own[index]] = False
        logits = torch.where(gate, shifted, c) / 0.05
        losses.append(logits.logsumexp(0) - logits[own[index]])
    alone = [
        K.info_nce(
            rows.detach()[i : i + 1], cols, mode="stream", **(how | {"col_offset": offset + i})
        )
        for i in picked.tolist()
    ]
    torch.testing.assert_close(
        torch.stack(alone).double(), torch.stack(losses), rtol=2e-3, atol=2e-3
    )
    assert torch.isfinite(whole) and torch.isfinite(grad).all()
    assert grad[-1].abs().max() > 0 and grad[0].abs().max() > 0


def test_library_products_add_in_float32():
    left = torch.randn(64, 4096, device="cuda", dtype=torch.float16)
    right = torch.randn(4096, 128, device="cuda", dtype=torch.float16)
    for transposed in (False, True):
        a = left.T.contiguous().T if transposed else left
        total = torch.full((64, 128), 3.0, device="cuda")
        products.add_product(total, a, right)
        want = 3.0 + left.double() @ right.double()
        torch.testing.assert_close(total.double(), want, rtol=1e-4, atol=1e-2)
        products.add_product(total, a, right, first=True)
        torch.testing.assert_close(total.double(), want - 3.0, rtol=1e-4, atol=1e-2)


@TYPES
def test_edge_vectors_are_finite(dtype):
    rows = torch.randn(40, 64, device="cuda")
    rows[0] = 0.0
    cols = rows.clone()
    cols[2] = 0.0
    cols[4], cols[5] = -rows[3], rows[3]
    leaves = [t.to(dtype).requires_grad_() for t in (rows, cols)]
    for mode in ("workspace", "stream"):
        value = K.info_nce(*leaves, temperature=0.05, margin=0.18, mode=mode, impl="triton")
        grads = torch.autograd.grad(value, leaves)
        assert torch.isfinite(value)
        assert torch.isfinite(grads[0][1:]).all() and torch.isfinite(grads[1][3:]).all()
    rows[7, 3] = float("nan")
    assert torch.isnan(K.info_nce(rows, cols, temperature=0.05, margin=0.18))
    with pytest.raises(ValueError, match="the first is row 7"):
        K.info_nce(rows, cols, temperature=0.05, check_finite=True)
