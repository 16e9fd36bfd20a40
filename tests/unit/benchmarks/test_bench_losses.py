"""The benchmark's implementations against float64, on the CPU as far as they run there."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from bench import checking, dense, ours, peers, problems
from bench.peers import CHUNKS, COMPILED, EAGER, FUSED, OURS, Unavailable, implementations
from bench.problems import Problem, Shape, square
from torch import Tensor

CPU = torch.device("cpu")
TORCH_ROWS = (EAGER[0], CHUNKS[512], "ours, torch path", OURS[2])


def make(name: str, shape: Shape, data: str = "random", **how: Any) -> Problem:
    return problems.make(name, shape, CPU, data=data, **how)


def found(row: str, problem: Problem) -> checking.Errors:
    loss = implementations()[row].build(problem)
    return checking.errors(problem, loss, checking.exact(problem))


@pytest.mark.parametrize("row", TORCH_ROWS)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    ("shape", "data"), [(Shape(37, 90, 24), "clustered"), (square(65, 32), "random")]
)
def test_torch_rows_are_exact(row: str, name: str, shape: Shape, data: str) -> None:
    """Square and rectangular; a chunk of 16-bit factors may round like 16 bits do."""
    errors = found(row, make(name, shape, data, dtype=torch.float32))
    limit = 2e-2 if row in CHUNKS.values() else 2e-5
    assert errors.loss < limit and errors.gradient < limit


@pytest.mark.parametrize("name", ["list_mle", "global_to_local", *problems.OBJECTIVES])
def test_problems_without_a_baseline(name: str) -> None:
    shape = square(24, 16, tokens=4)
    for row in (OURS[2], "ours, torch path", peers.DENSE_REFERENCE):
        errors = found(row, make(name, shape, dtype=torch.float32))
        # the published objective rounds teacher cosines to float16, which reorders near ties
        limit = 1e-3 if "reference" in name else 1e-4
        assert errors.loss < limit and errors.gradient < limit, (row, errors)


def test_chunks_of_any_height() -> None:
    problem = make("triple", Shape(37, 50, 16))
    answer = checking.exact(problem)
    values = [
        checking.errors(problem, dense.chunked(problem, rows, compiled=False), answer)
        for rows in (1, 5, 37, 64)
    ]
    for errors in values:
        assert errors.loss < 2e-3 and errors.gradient < 2e-2


def test_no_gradient_is_made_without_one_wanted() -> None:
    problem = make("triple", square(32, 16))
    with torch.no_grad():
        value = dense.chunked(problem, 8, compiled=False)()
    assert not value.requires_grad


# What the check refuses


def scaled(loss: Callable[[], Tensor], factor: float) -> Callable[[], Tensor]:
    """Right value, gradients off by a factor: what a rescaled gradient looks like."""

    def wrong() -> Tensor:
        value = loss()
        return value.detach() + factor * (value - value.detach())

    return wrong


def test_wrong_rows_are_not_timed() -> None:
    problem = make("info_nce", square(128, 64))
    answer = checking.exact(problem)
    right = implementations()[EAGER[1]].build(problem)
    eager16 = checking.errors(problem, right, answer)
    assert not checking.verdict(eager16, eager16)
    rescaled = checking.errors(problem, scaled(right, math.sqrt(128 / 0.05)), answer)
    assert "gradient" in checking.verdict(rescaled, eager16)
    shifted = checking.errors(problem, lambda: right() + 0.1, answer)
    assert "loss" in checking.verdict(shifted, eager16)
    broken = checking.Errors(math.inf, 0.0)
    assert checking.verdict(broken, eager16)


def test_dropped_negatives_are_seen() -> None:
    """A gradient filter that keeps only the positives fails the check (diffuse negatives)."""
    problem = make("info_nce", square(256, 64))
    answer = checking.exact(problem)
    eager16 = checking.errors(problem, implementations()[EAGER[1]].build(problem), answer)

    def filtered() -> Tensor:
        q, k = (dense.unit(problem.leaves[key], torch.float32) for key in ("rows", "cols"))
        logits = (q @ k.T) / problems.TEMPERATURE
        kept = torch.where(torch.eye(256, dtype=torch.bool), logits, logits.detach())
        return (kept.logsumexp(1) - kept.diagonal()).mean()

    assert "gradient" in checking.verdict(checking.errors(problem, filtered, answer), eager16)


def test_nan_counts_as_wrong() -> None:
    problem = make("info_nce", square(8, 4))
    answer = checking.exact(problem)
    loss = implementations()[EAGER[0]].build(problem)
    errors = checking.errors(problem, lambda: loss() * math.nan, answer)
    assert errors.loss == math.inf and errors.gradient == math.inf


# Other libraries: our calls, with replacements that have their signatures and conventions


def dense_cross_entropy(q: Tensor, k: Tensor, targets: Tensor) -> Tensor:
    logits = q.double() @ k.double().T
    return logits.logsumexp(1) - logits.gather(1, targets[:, None]).squeeze(1)


def stand_ins() -> dict[str, ModuleType]:
    inf_cl = ModuleType("inf_cl")

    def cal_flash_loss(
        q: Tensor, k: Tensor, labels: Any = None, scale: Any = None, head_dim: int = 256
    ) -> Tensor:
        assert q.shape[1] % head_dim == 0
        return dense_cross_entropy(scale * q, k, torch.arange(len(q)))

    inf_cl.cal_flash_loss = cal_flash_loss  # pyright: ignore[reportAttributeAccessIssue]
    memeff = ModuleType("memeff")

    class MemoryEfficientQwen3Loss:
        def __init__(
            self, temperature: float = 0.07, margin: float = 0.1, use_qq_negatives: bool = False,
            use_dd_negatives: bool = False, normalized_inputs: bool = False, stable: bool = True,
        ) -> None:  # fmt: skip
            assert margin >= 2.0 and normalized_inputs and not stable
            assert not use_qq_negatives and not use_dd_negatives
            self.temperature = temperature

        def __call__(self, q: Tensor, d: Tensor) -> Tensor:
            assert q.dtype == torch.bfloat16
            return dense_cross_entropy(q / self.temperature, d, torch.arange(len(q))).mean()

    memeff.MemoryEfficientQwen3Loss = MemoryEfficientQwen3Loss  # pyright: ignore[reportAttributeAccessIssue]
    cut = ModuleType("cut_cross_entropy")

    def linear_cross_entropy(
        e: Tensor, c: Tensor, targets: Tensor, filter_eps: Any = "high"
    ) -> Tensor:
        assert filter_eps is None
        return dense_cross_entropy(e, c, targets).mean()

    cut.linear_cross_entropy = linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
    liger = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")

    class Function:
        @staticmethod
        def apply(
            _input: Tensor, weight: Tensor, target: Tensor, bias: Any, ce_weight: Any,
            ignore_index: int, lse_square_scale: float, label_smoothing: float, reduction: str,
            softcap: Any, return_z_loss: bool, accum_dtype: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            assert (bias, ce_weight, softcap) == (None, None, None)
            assert (lse_square_scale, label_smoothing, return_z_loss) == (0.0, 0.0, False)
            assert (ignore_index, reduction, accum_dtype) == (-100, "mean", torch.float32)
            return dense_cross_entropy(_input, weight, target).mean(), None

    liger.LigerFusedLinearCrossEntropyFunction = Function  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "inf_cl": inf_cl,
        "memeff": memeff,
        "cut_cross_entropy": cut,
        "liger_kernel": ModuleType("liger_kernel"),
        "liger_kernel.ops": ModuleType("liger_kernel.ops"),
        liger.__name__: liger,
    }


LIBRARIES = {
    "inf-cl": peers.inf_cl,
    "memeff": peers.memeff,
    "cut-cross-entropy": peers.cut_cross_entropy,
    "liger-kernel, FLCE": peers.liger,
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_calls_of_the_libraries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale, direction, reduction and labels are right if the library does what it documents."""
    for module, content in stand_ins().items():
        monkeypatch.setitem(sys.modules, module, content)
    monkeypatch.setattr(peers, "needs_gpu", lambda _: None)
    monkeypatch.setattr(peers, "needs_module", lambda *_: None)
    problem = make("info_nce", square(48, 256))
    answer = checking.exact(problem)
    errors = checking.errors(problem, LIBRARIES[name](problem), answer)
    assert errors.loss < 2e-3 and errors.gradient < 2e-2


def test_the_libraries_name_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("info_nce", square(8, 32))
    monkeypatch.setattr(peers, "needs_gpu", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for build in LIBRARIES.values():
        with pytest.raises(Unavailable, match="is not installed"):
            build(problem)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(Unavailable, match="multiple of 256"):
        peers.inf_cl(problem)
    with pytest.raises(Unavailable, match="square"):
        peers.memeff(make("info_nce", Shape(4, 8, 32)))


def test_gpu_rows_say_so_on_a_cpu() -> None:
    problem = make("triple", square(8, 16))
    for name in (OURS[0], OURS[1], COMPILED):
        with pytest.raises(Unavailable, match="needs a GPU"):
            implementations()[name].build(problem)


def test_liger_scaled_runs_its_fallback_on_a_cpu() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    problem = make("info_nce", square(64, 32))
    assert "Fallback" in peers.liger_scaled_backend(problem)
    errors = found("liger-kernel, scaled CE", problem)
    assert errors.loss < 2e-3 and errors.gradient < 2e-2


# Ours


def test_the_objective_is_called_as_the_trainer_calls_it() -> None:
    """Every implementation reaches every loss of the objective, and they agree."""
    problem = make("dalr-full", square(20, 12, tokens=3), dtype=torch.float64)
    values = [ours.loss(problem, impl=impl)() for impl in ("auto", "torch", "reference")]
    for value in values:
        torch.testing.assert_close(value, values[0], rtol=1e-9, atol=0.0)
    with pytest.raises(ValueError, match="impl='nothing'"):
        ours.loss(problem, impl="nothing")()


def test_an_unknown_option_is_a_reason_not_a_crash() -> None:
    problem = make("triple", square(8, 4))
    with pytest.raises(Unavailable, match="no argument speed"):
        peers.own("torch", speed=11)(problem)


def test_clustered_vectors_stand_on_both_sides_of_the_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    units = dense.unit(problems.vectors(400, 64, "clustered", generator, CPU), torch.float32)
    cosines = (units @ units.T).fill_diagonal_(0.0)
    near = cosines[cosines > 0.8]
    closed = (near >= math.cos(problems.MARGIN)).float().mean()
    assert len(near) > 400 and 0.02 < closed < 0.98
    lengths = problems.vectors(50, 8, "random", generator, CPU).norm(dim=1)
    assert lengths.max() > 1.5 * lengths.min()  # not normalized: that is inside the time
    with pytest.raises(ValueError, match="data='even'"):
        problems.vectors(4, 4, "even", generator, CPU)


def test_every_row_has_a_name_of_its_own_and_a_known_problem() -> None:
    rows = implementations()
    for name, row in rows.items():
        assert row.name == name and set(row.problems) <= set(problems.PROBLEMS)
        assert dataclasses.is_dataclass(row)
