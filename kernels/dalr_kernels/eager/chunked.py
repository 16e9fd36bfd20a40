"""Memory-linear implementation: a few rows at a time, the gradient made in the forward pass.

Nothing of size R x N outlives one chunk. The gradient with respect to the (already normalised)
rows and columns is accumulated while the loss is computed, so the backward pass only multiplies by
the upstream gradient; the chunk is never computed a second time (4 N^2 D fewer operations than
recomputing it). When no gradient is wanted none of that happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dalr_kernels.eager.closed_form import Spare
from dalr_kernels.reference import normalise_tokens
from dalr_kernels.similarity import EPSILON, length


class BlockLosses(Protocol):
    """Several losses on one matrix of cosines, block by block.

    Attributes:
        weights: Factor of each of the K losses in the total.
    """

    weights: list[float]

    def losses(self, cosines: Tensor, start: int, slope: Tensor | None, spare: Spare) -> Tensor:
        """Losses ``[K, r]`` of rows from `start`; fills in their slope ``[r, N]``."""
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
    return _RowChunks.apply(rows, cols, terms, dtype, chunk_rows, (_wanted(rows), _wanted(cols)))


def _wanted(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


class _RowChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        spare = Spare(rows_RD, min(chunk_rows, num_rows), cols_ND.shape[0])
        for start, stop in spans(num_rows, chunk_rows):
            with spare.lend(2, stop - start) as (cosines, slope):
                torch.mm(rows_RD[start:stop], cols_ND.T, out=cosines)
                losses_KR[:, start:stop] = terms.losses(
                    cosines, start, slope if any(wanted) else None, spare
                )
                if grad_rows is not None:
                    torch.mm(slope, cols_ND, out=grad_rows[start:stop])
                if grad_cols is not None:
                    grad_cols.addmm_(slope.T, rows_RD[start:stop])
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative()
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


def _refuse_second_derivative() -> None:
    # The stored gradient carries no graph, so create_graph=True would drop terms without a word.
    if torch.is_grad_enabled():
        raise RuntimeError("impl='torch' has no second derivatives; use impl='reference'")


class TokenArguments(NamedTuple):
    """Constants of global-to-local: features as given, boolean masks, ids or None."""

    own_RTD: Tensor
    own_mask_RT: Tensor
    tokens_NTD: Tensor
    mask_NT: Tensor
    norm: str
    temperature: float
    col_offset: int
    row_ids: Tensor | None
    col_ids: Tensor | None


def global_to_local(
    rows_RD: Tensor, arguments: TokenArguments, chunk_rows: int | None, workspace_bytes: int
) -> Tensor:
    """Mean over the rows, streaming over blocks of sentences; never ``[R, N, T]``."""
    return _GlobalToLocal.apply(rows_RD, arguments, chunk_rows, workspace_bytes, _wanted(rows_RD))


class _GlobalToLocal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        arguments: TokenArguments,
        chunk_rows: int | None,
        workspace_bytes: int,
        wanted: bool,
    ) -> Tensor:
        block, chunk = token_blocks(rows_RD, arguments, chunk_rows, workspace_bytes)
        negatives_R, centre_RD = stream_negatives(rows_RD, arguments, block, chunk, wanted)
        loss, grad_rows = own_tokens(rows_RD, arguments, negatives_R, centre_RD, block)
        ctx.save_for_backward(grad_rows)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative()
        (grad_rows,) = ctx.saved_tensors
        grad = None if grad_rows is None else grad_rows * grad_outputs[0]
        return grad, None, None, None, None


def token_blocks(
    rows_RD: Tensor, arguments: TokenArguments, chunk_rows: int | None, workspace_bytes: int
) -> tuple[int, int]:
    """Sentences per block and rows per chunk: half the workspace for tokens, half for logits."""
    num_sentences, num_tokens, width = arguments.tokens_NTD.shape
    half = workspace_bytes // (2 * rows_RD.element_size())
    # A normalised block is alive about three times (cast, norm, quotient), a logit block too.
    block = min(num_sentences, max(1, half // (3 * num_tokens * width)))
    fit = max(1, half // (3 * block * num_tokens))
    return block, min(rows_RD.shape[0], chunk_rows or fit)


def stream_negatives(
    rows_RD: Tensor, arguments: TokenArguments, block: int, chunk: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of every row's negatives and the softmax-weighted mean of their tokens.

    One pass with a running maximum: sums and weighted tokens are rescaled when it rises, so the
    logits need not be made twice. The mean is d N_i / d rows_i times the temperature.
    """
    num_rows = rows_RD.shape[0]
    top_R1 = rows_RD.new_full((num_rows, 1), -math.inf)
    sum_R1 = rows_RD.new_zeros((num_rows, 1))
    centre_RD = torch.zeros_like(rows_RD) if wanted else None
    for low, high in spans(arguments.tokens_NTD.shape[0], block):
        tokens_MD, owner_M = _real_tokens(arguments, slice(low, high), rows_RD.dtype)
        if not len(owner_M):
            continue
        for start, stop in spans(num_rows, chunk):
            rows = slice(start, stop)
            logits = rows_RD[rows] @ tokens_MD.T
            logits *= 1.0 / arguments.temperature
            _drop_cells(logits, arguments, rows, slice(low, high), owner_M)
            new_top = torch.maximum(top_R1[rows], logits.amax(dim=1, keepdim=True))
            # Rows without any negative so far: avoid -inf - (-inf).
            finite_top = new_top.masked_fill(new_top == -math.inf, 0.0)
            weights = logits.sub_(finite_top).exp_()
            decay = (top_R1[rows] - finite_top).exp()
            sum_R1[rows] = sum_R1[rows] * decay + weights.sum(dim=1, keepdim=True)
            top_R1[rows] = new_top
            if centre_RD is not None:
                centre_RD[rows] = torch.addmm(centre_RD[rows] * decay, weights, tokens_MD)
    if centre_RD is not None:
        centre_RD /= sum_R1.masked_fill(sum_R1 == 0.0, 1.0)
    return (top_R1 + sum_R1.log()).squeeze(1), centre_RD


def _real_tokens(
    arguments: TokenArguments, block: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalised tokens of some sentences without padding ``[M, D]``, and whose they are."""
    tokens = normalise_tokens(arguments.tokens_NTD[block].to(dtype), arguments.norm)
    mask = arguments.mask_NT[block]
    owners = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    return tokens[mask], owners[mask]


def _drop_cells(
    logits: Tensor, arguments: TokenArguments, rows: slice, block: slice, owner_M: Tensor
) -> None:
    """Set tokens of the own sentence and of same-image sentences to -inf."""
    excluded = excluded_cells(
        logits.shape[0],
        block.stop - block.start,
        arguments.col_offset + rows.start - block.start,
        None if arguments.row_ids is None else arguments.row_ids[rows],
        None if arguments.col_ids is None else arguments.col_ids[block],
        logits.device,
        own=True,
    )
    logits.masked_fill_(excluded[:, owner_M], -math.inf)


def excluded_cells(
    num_rows: int,
    num_cols: int,
    first_column: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    device: torch.device,
    *,
    own: bool,
) -> Tensor:
    """Cells with the row's own id (ids >= 0), with the diagonal set to `own`; bool ``[R, N]``."""
    if row_ids is None or col_ids is None:
        excluded = torch.zeros(num_rows, num_cols, dtype=torch.bool, device=device)
    else:
        excluded = (row_ids[:, None] == col_ids) & (row_ids[:, None] >= 0)
    if -num_rows < first_column < num_cols:
        excluded.diagonal(first_column).fill_(own)
    return excluded


def own_tokens(
    rows_RD: Tensor,
    arguments: TokenArguments,
    negatives_R: Tensor,
    centre_RD: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Mean loss over the rows' own tokens and, given the negatives' centre, its row gradient."""
    num_rows = rows_RD.shape[0]
    losses_R = rows_RD.new_empty(num_rows)
    grad_RD = None if centre_RD is None else torch.empty_like(rows_RD)
    for start, stop in spans(num_rows, chunk):
        rows = slice(start, stop)
        own = normalise_tokens(arguments.own_RTD[rows].to(rows_RD.dtype), arguments.norm)
        mask = arguments.own_mask_RT[rows]
        positive = torch.einsum("rd,rtd->rt", rows_RD[rows], own) / arguments.temperature
        gap = positive - negatives_R[rows, None]
        count = mask.sum(dim=1, keepdim=True).clamp_min(1)
        # Without negatives the gap is +inf, hence loss and slope are exactly zero.
        terms = -torch.nn.functional.logsigmoid(gap).masked_fill(~mask, 0.0) / count
        losses_R[rows] = terms.sum(dim=1)
        if grad_RD is not None and centre_RD is not None:
            slope = torch.sigmoid(-gap).masked_fill(~mask, 0.0) / count
            pull = torch.einsum("rt,rtd->rd", slope, own)
            push = slope.sum(dim=1, keepdim=True) * centre_RD[rows]
            grad_RD[rows] = (push - pull) / (arguments.temperature * num_rows)
    return losses_R.mean(), grad_RD
