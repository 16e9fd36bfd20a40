"""Every implementation in one place: who it is, what it can do, how it is called fairly.

One that is not installed, cannot do a problem, is wrong or runs out of memory is a named row with
the reason. Calls were read in inf-cl 1.2.1, memeff 0.3.1, liger-kernel 0.8.5 and
cut-cross-entropy 25.1.1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import dense, ours
from bench.dense import unit
from bench.problems import OBJECTIVES, PROBLEMS, ROW_LOSSES, TEMPERATURE, Problem

Loss = Callable[[], Tensor]
CHUNK_ROWS = (512, 1024, 2048, 4096)


class Unavailable(Exception):
    """The implementation cannot run this problem here; the message is the reason in the table."""


@dataclass(frozen=True)
class Implementation:
    """One row of the benchmark.

    Attributes:
        name: Row label.
        problems: What it computes.
        build: Makes the loss of a problem as a function of its current leaves; raises
            `Unavailable` with the reason where it cannot.
        backend: What really runs, where a library chooses by itself.
        family: Implementations that are checked as one.
        checked: Compared with float64 before it is timed (the plain products are not a loss).
    """

    name: str
    problems: tuple[str, ...]
    build: Callable[[Problem], Loss]
    backend: Callable[[Problem], str] = lambda _: ""
    family: str = ""
    checked: bool = True


def needs_module(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def needs_gpu(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Unavailable("needs a GPU")


def needs_square(problem: Problem) -> None:
    if problem.shape.rows != problem.shape.cols:
        raise Unavailable("square problems only")


# Ours


def own(impl: str, mode: str | None = None, **how: Any) -> Callable[[Problem], Loss]:
    """``dalr_kernels`` with one implementation and mode."""

    def build(problem: Problem) -> Loss:
        if impl == "triton":
            needs_gpu(problem)
        chosen = {"impl": impl, **({"mode": mode} if mode else {}), **how}
        try:
            return ours.loss(problem, **chosen)
        except (TypeError, ValueError) as error:
            raise Unavailable(str(error)) from error

    return build


# Libraries, plain InfoNCE


def inf_cl(problem: Problem) -> Loss:
    """One direction, float32 in TF32 (its kernels cast); the width in heads of 256."""
    needs_module("inf_cl", "inf-cl")
    needs_gpu(problem)
    needs_square(problem)
    if problem.shape.width % 256:
        raise Unavailable("its width must be a multiple of 256")
    from inf_cl import cal_flash_loss  # pyright: ignore[reportMissingImports]

    def loss() -> Tensor:
        q, k = (unit(problem.leaves[key], torch.float32) for key in ("rows", "cols"))
        return cal_flash_loss(q, k, scale=1.0 / TEMPERATURE, head_dim=256).mean()

    return loss


def memeff(problem: Problem) -> Loss:
    """Row InfoNCE: no false-negative mask (margin 2), gradients not rescaled (stable off)."""
    needs_module("memeff", "memeff")
    needs_gpu(problem)
    needs_square(problem)
    from memeff import MemoryEfficientQwen3Loss  # pyright: ignore[reportMissingImports]

    module = MemoryEfficientQwen3Loss(
        temperature=TEMPERATURE, margin=2.0, stable=False, normalized_inputs=True
    )

    def loss() -> Tensor:
        q, k = (unit(problem.leaves[key], torch.bfloat16) for key in ("rows", "cols"))
        return module(q, k)

    return loss


def memeff_backend(problem: Problem) -> str:
    """Which backward kernel its width selects."""
    needs_module("memeff", "memeff")
    needs_gpu(problem)
    from memeff._common import fa_ok  # pyright: ignore[reportMissingImports]

    registers = fa_ok(problem.shape.width, problem.device)
    return "triton, backward in registers" if registers else "triton, atomic backward"


def cut_cross_entropy(problem: Problem) -> Loss:
    """Rows as embeddings, columns as classifier; no gradient filter, rows scaled by 1/tau."""
    needs_module("cut_cross_entropy", "cut-cross-entropy")
    needs_gpu(problem)
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    targets = positives(problem)

    def loss() -> Tensor:
        q, k = scaled_pair(problem)
        return linear_cross_entropy(q, k, targets, filter_eps=None)

    return loss


def liger(problem: Problem) -> Loss:
    """Triton fused linear cross-entropy, gradient sums in float32."""
    needs_module("liger_kernel", "liger-kernel")
    needs_gpu(problem)
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction,
    )

    targets = positives(problem)

    def loss() -> Tensor:
        q, k = scaled_pair(problem)
        fixed = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
        return LigerFusedLinearCrossEntropyFunction.apply(q, k, targets, *fixed)[0]

    return loss


def liger_scaled(problem: Problem) -> Loss:
    """Fused scaled cross-entropy: CuTe kernels on sm_90 with the ``cutedsl`` extra."""
    needs_module("liger_kernel", "liger-kernel")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    liger_scaled_backend(problem)
    targets = positives(problem)

    def loss() -> Tensor:
        q, k = (unit(problem.leaves[key], torch.bfloat16) for key in ("rows", "cols"))
        nll = LigerFusedLinearScaledCrossEntropyFunction.apply(q, k, targets, TEMPERATURE)
        return nll.mean()

    return loss


def liger_scaled_backend(problem: Problem) -> str:
    """The class it picks for the device; CuTe and its 512-row torch chunks look alike."""
    from liger_kernel.ops import (  # pyright: ignore[reportMissingImports]
        fused_linear_scaled_cross_entropy as module,
    )

    try:
        chosen = module._resolve_implementation(problem.device)
    except ImportError as error:
        raise Unavailable(f"its CuTe kernels need the cutedsl extra: {error}") from error
    return f"{chosen.__module__.rpartition('.')[2]}.{chosen.__name__}"


def positives(problem: Problem) -> Tensor:
    """Column of each row's positive, the class label of a cross-entropy."""
    start = problem.shape.offset
    return torch.arange(start, start + problem.shape.rows, device=problem.device)


def scaled_pair(problem: Problem) -> tuple[Tensor, Tensor]:
    """16-bit unit vectors, the rows divided by the temperature before they are rounded."""
    rows = unit(problem.leaves["rows"], torch.float32) / TEMPERATURE
    return rows.to(torch.bfloat16), unit(problem.leaves["cols"], torch.bfloat16)


# torch


def eager(dtype: torch.dtype) -> Callable[[Problem], Loss]:
    return lambda problem: dense.dense(problem, dtype)


def compiled(problem: Problem) -> Loss:
    """The dense loss in one graph, products and all chosen by inductor's autotuner."""
    needs_gpu(problem)
    return dense.dense(problem, torch.bfloat16, "max-autotune-no-cudagraphs")


def chunks(rows_per_chunk: int, *, compiled: bool = True) -> Callable[[Problem], Loss]:
    def build(problem: Problem) -> Loss:
        return dense.chunked(problem, rows_per_chunk, compiled=compiled)

    return build


def dense_reference(problem: Problem) -> Loss:
    """The dense definition in ``dalr_kernels``, float32; for the losses nobody else has."""
    return ours.loss(problem, impl="reference")


# The products alone


def products(problem: Problem) -> Loss:
    """Only the matrix products of the workspace mode, by the BLAS, in chunks of 4096 rows.

    S (and T) into a 16-bit block, then both gradient products from a 16-bit block, the columns'
    one summed in float32: what remains when every element-wise step is free.
    """
    rows, cols = (problem.leaves[key].detach() for key in ("rows", "cols"))
    teacher = problem.constants.get("teacher")
    height = min(4096, len(rows))
    block = rows.new_empty(height, len(cols))
    grad = torch.randn_like(block)
    grad_rows = torch.empty_like(rows)
    grad_cols = torch.zeros(cols.shape, dtype=torch.float32, device=cols.device)

    def loss() -> Tensor:
        for start in range(0, len(rows), height):
            part = slice(start, min(start + height, len(rows)))
            size = part.stop - part.start
            torch.mm(rows[part], cols.T, out=block[:size])
            if teacher is not None:
                torch.mm(teacher[part], teacher.T, out=block[:size])
            torch.mm(grad[:size], cols, out=grad_rows[part])
            dense.accumulate(grad_cols, grad[:size].T, rows[part])
        return grad_cols[0, 0]

    return loss


PLAIN = ("info_nce",)
NO_BASELINE = ("list_mle", "global_to_local", *OBJECTIVES)
FUSED = tuple(name for name in ROW_LOSSES if name != "list_mle")
PRODUCTS = "GEMMs alone"
OURS = ("ours, mode W", "ours, mode S", "ours, auto")
# at a million columns the default workspace holds too few rows for fast gradient products
ROOMY = "ours, mode W, 8 GiB"
ROOMY_BYTES = 8 * 2**30
EAGER = ("torch eager, fp32 matrices", "torch eager, bf16 matrices")
DENSE_REFERENCE = "dense definition, fp32"
COMPILED = "torch.compile, full matrices"
CHUNKS = {rows: f"torch.compile, {rows}-row chunks" for rows in CHUNK_ROWS}


def implementations() -> dict[str, Implementation]:
    """All rows of the benchmark by name, ours first."""
    rows = [
        Implementation(OURS[0], FUSED, own("triton", "workspace")),
        Implementation(OURS[1], FUSED, own("triton", "stream")),
        Implementation(OURS[2], PROBLEMS, own("auto")),
        Implementation(ROOMY, FUSED, own("triton", "workspace", workspace_bytes=ROOMY_BYTES)),
        Implementation("ours, torch path", PROBLEMS, own("torch")),
        Implementation(PRODUCTS, FUSED, products, checked=False),
        Implementation(EAGER[0], FUSED, eager(torch.float32)),
        Implementation(EAGER[1], FUSED, eager(torch.bfloat16)),
        Implementation(COMPILED, FUSED, compiled),
        *(
            Implementation(CHUNKS[size], FUSED, chunks(size), family="chunks")
            for size in CHUNK_ROWS
        ),
        Implementation("inf-cl", PLAIN, inf_cl),
        Implementation("memeff", PLAIN, memeff, memeff_backend),
        Implementation("cut-cross-entropy", PLAIN, cut_cross_entropy),
        Implementation("liger-kernel, FLCE", PLAIN, liger, lambda _: "triton"),
        Implementation("liger-kernel, scaled CE", PLAIN, liger_scaled, liger_scaled_backend),
        Implementation(DENSE_REFERENCE, NO_BASELINE, dense_reference),
    ]
    return {row.name: row for row in rows}
