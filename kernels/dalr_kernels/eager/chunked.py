"""Memory-linear implementation: a few rows at a time, the gradient made in the forward pass.

Nothing of size R x N outlives one chunk. The gradient with respect to the (already normalized)
rows and columns is accumulated while the loss is computed, so the backward pass only multiplies by
the upstream gradient; the chunk is never computed a second time (4 N^2 D fewer operations than
recomputing it). When no gradient is wanted none of that happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from dalr_kernels.eager.closed_form import BufferPool
from dalr_kernels.similarity import EPSILON, length

# The context of an autograd function takes attributes that torch's type does not declare.
Context: TypeAlias = Any


class BlockLosses(Protocol):
    """Several losses on one matrix of cosines, block by block.

    Attributes:
        weights: Factor of each of the K losses in the total.
    """

    weights: list[float]

    def losses(
        self, cosines: Tensor, start: int, grad: Tensor | None, buffers: BufferPool
    ) -> Tensor:
        """Losses ``[K, r]`` of rows from `start`; fills in their gradient ``[r, N]``."""
        ...


# Matrices of a block's size in use at the worst moment, with one teacher: soft margin with masks
# 9, KL and ListNet of a margin 10, ListMLE of a margin (with 64-bit order and keys) 18.
LIVE_MATRICES = 18
WORKSPACE_BYTES = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}
# On a CPU a block should stay in the cache, but few rows make slow matrix products.
CACHED_BYTES = 4 * 2**20
FEWEST_ROWS = 128


def default_workspace(device: torch.device) -> int:
    """Workspace in bytes: 256 MiB, on CUDA 1 GiB to keep the matrix products large."""
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


def workspace_of(device: torch.device, chunk_rows: int | None, workspace_bytes: int | None) -> int:
    """The workspace in bytes, `workspace_bytes` or the default of the device.

    Raises:
        ValueError: One of the two options is below 1.
    """
    for name, value in (("chunk_rows", chunk_rows), ("workspace_bytes", workspace_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return default_workspace(device) if workspace_bytes is None else workspace_bytes


@contextmanager
def limited_workspace(limit_bytes: int) -> Iterator[None]:
    """Inside, the default workspace is `limit_bytes`: for measuring what is not workspace."""
    before = dict(WORKSPACE_BYTES)
    WORKSPACE_BYTES.update(dict.fromkeys(before, limit_bytes))
    try:
        yield
    finally:
        WORKSPACE_BYTES.update(before)


def rows_per_chunk(rows: Tensor, num_cols: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """Rows that fit workspace and cache, evened out so that the last chunk is not tiny."""
    num_rows, row_bytes = rows.shape[0], dtype.itemsize * num_cols
    fit = max(1, workspace_bytes // (LIVE_MATRICES * row_bytes))
    if not rows.is_cuda:
        fit = min(fit, max(FEWEST_ROWS, CACHED_BYTES // row_bytes))
    return math.ceil(num_rows / math.ceil(num_rows / fit))


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Half-open intervals of at most `step` that cover ``0 .. length - 1``."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


def mean_over_rows(
    rows: Tensor, cols: Tensor, terms: BlockLosses, dtype: torch.dtype, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Weighted mean of losses of ``unit(rows) @ unit(cols).T``, `chunk_rows` rows at a time.

    Args:
        rows: ``[R, D]`` as given, not of unit length.
        cols: ``[N, D]``, likewise.
        terms: The losses.
        dtype: What they are computed in.
        chunk_rows: Rows of a block.

    Returns:
        The total, differentiable, and the mean of each loss without its weight, ``[K]``.
    """
    wanted = wants_gradient(rows), wants_gradient(cols)
    return _RowChunks.apply(rows, cols, terms, dtype, chunk_rows, wanted)


def wants_gradient(tensor: Tensor) -> bool:
    """Whether autograd asks for the gradient by a tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


class _RowChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        rows: Tensor,
        cols: Tensor,
        terms: BlockLosses,
        dtype: torch.dtype,
        chunk_rows: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        (rows_RD, row_lengths), (cols_ND, col_lengths) = (_unit(x.to(dtype)) for x in (rows, cols))
        num_rows = rows_RD.shape[0]
        losses_KR = rows_RD.new_empty(len(terms.weights), num_rows)
        grad_rows = torch.empty_like(rows_RD) if wanted[0] else None
        grad_cols = torch.zeros_like(cols_ND) if wanted[1] else None
        buffers = BufferPool(rows_RD, min(chunk_rows, num_rows), cols_ND.shape[0])
        for start, stop in spans(num_rows, chunk_rows):
            with buffers.borrow(2, stop - start) as (cosines, grad):
                torch.mm(rows_RD[start:stop], cols_ND.T, out=cosines)
                losses_KR[:, start:stop] = terms.losses(
                    cosines, start, grad if any(wanted) else None, buffers
                )
                if grad_rows is not None:
                    torch.mm(grad, cols_ND, out=grad_rows[start:stop])
                if grad_cols is not None:
                    grad_cols.addmm_(grad.T, rows_RD[start:stop])
        if grad_rows is not None:
            _through_unit(grad_rows, rows_RD, row_lengths)
        if grad_cols is not None:
            _through_unit(grad_cols, cols_ND, col_lengths)
        components_K = losses_KR.mean(dim=1)
        ctx.save_for_backward(grad_rows, grad_cols)
        ctx.dtypes = rows.dtype, cols.dtype
        ctx.mark_non_differentiable(components_K)
        return components_K @ components_K.new_tensor(terms.weights), components_K

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        upstream = grad_outputs[0]
        grads = [
            None if saved is None else (saved * upstream).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None, None


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    lengths = length(vectors)
    return vectors / lengths, lengths


def _through_unit(gradient: Tensor, units: Tensor, lengths: Tensor) -> None:
    """Turn the gradient by unit vectors into that by the vectors, in place.

    Only the part across a vector counts: ``(g - x (g x)) / ||x||``. Below the smallest length a
    vector is divided by a constant, and nothing is taken off.
    """
    along = torch.einsum("nd,nd->n", gradient, units)[:, None]
    gradient.addcmul_(units, along.masked_fill_(lengths <= EPSILON, 0.0), value=-1.0)
    gradient.div_(lengths)


def refuse_second_derivative() -> None:
    """Refuse `create_graph=True`.

    Raises:
        RuntimeError: The backward pass itself is to be differentiated.
    """
    # The stored gradient carries no graph, so create_graph=True would drop terms silently.
    if torch.is_grad_enabled():
        raise RuntimeError("impl='torch' has no second derivatives; use impl='reference'")
