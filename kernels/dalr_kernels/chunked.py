"""Memory-linear implementation: a few rows at a time, the gradient made in the forward pass.

Nothing of size R x N outlives one chunk. The gradient with respect to the (already normalised)
rows and columns is accumulated while the loss is computed, so the backward pass only multiplies by
the upstream gradient; the chunk is never computed a second time (4 N^2 D fewer operations than
recomputing it). When no gradient is wanted none of that happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import normalise_tokens

# Maps a block of cosines [r, N] and the index of its first row to r losses.
BlockLoss = Callable[[Tensor, int], Tensor]


class WeightedLosses(NamedTuple):
    """Losses on one matrix of cosines and their weights in the total.

    Attributes:
        losses: Maps of a block of cosines to one loss per row.
        weights: Factor of each loss.
        end_of_block: Called when all of them have seen a block.
    """

    losses: Sequence[BlockLoss]
    weights: Sequence[float]
    end_of_block: Callable[[], None]


# Matrices of the block's size alive at its worst moment, measured: plain InfoNCE 7, soft margin
# with masks 15, KL with margin 14, ListNet 14, ListMLE (64-bit order) with margin 22.
LIVE_MATRICES = 22
WORKSPACE_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}


def default_workspace(device: torch.device) -> int:
    """Workspace in bytes: 64 MiB, on CUDA 1 GiB to keep the matrix products large."""
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


def rows_per_chunk(num_rows: int, num_cols: int, itemsize: int, workspace_bytes: int) -> int:
    """Rows that fit the workspace, evened out so that the last chunk is not tiny."""
    fit = max(1, workspace_bytes // (LIVE_MATRICES * itemsize * num_cols))
    return math.ceil(num_rows / math.ceil(num_rows / fit))


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Half-open intervals of at most `step` that cover ``0 .. length - 1``."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


def mean_over_rows(
    rows_RD: Tensor, cols_ND: Tensor, terms: WeightedLosses, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Weighted mean of the losses of ``rows @ cols.T``, `chunk_rows` rows at a time.

    Returns:
        The total, differentiable, and the mean of each loss without its weight, ``[K]``.
    """
    wanted = _wanted(rows_RD), _wanted(cols_ND)
    return _RowChunks.apply(rows_RD, cols_ND, terms, chunk_rows, wanted)


def _wanted(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


class _RowChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        cols_ND: Tensor,
        terms: WeightedLosses,
        chunk_rows: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        num_rows = rows_RD.shape[0]
        losses_KR = rows_RD.new_empty(len(terms.losses), num_rows)
        grad_rows = torch.empty_like(rows_RD) if wanted[0] else None
        grad_cols = torch.zeros_like(cols_ND) if wanted[1] else None
        for start, stop in spans(num_rows, chunk_rows):
            cosines = rows_RD[start:stop] @ cols_ND.T
            if any(wanted):
                part = losses_KR[:, start:stop]
                slope = _losses_and_slope(cosines, terms, start, part, num_rows)
                if grad_rows is not None:
                    torch.mm(slope, cols_ND, out=grad_rows[start:stop])
                if grad_cols is not None:
                    grad_cols.addmm_(slope.T, rows_RD[start:stop])
            else:
                for index, loss in enumerate(terms.losses):
                    losses_KR[index, start:stop] = loss(cosines, start)
            terms.end_of_block()
        components_K = losses_KR.mean(dim=1)
        ctx.save_for_backward(grad_rows, grad_cols)
        ctx.mark_non_differentiable(components_K)
        return components_K @ components_K.new_tensor(terms.weights), components_K

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative()
        upstream = grad_outputs[0]
        grads = [None if saved is None else saved * upstream for saved in ctx.saved_tensors]
        return grads[0], grads[1], None, None, None


def _refuse_second_derivative() -> None:
    # The stored gradient carries no graph, so create_graph=True would drop terms without a word.
    if torch.is_grad_enabled():
        raise RuntimeError("impl='torch' has no second derivatives; use impl='reference'")


def _losses_and_slope(
    cosines: Tensor, terms: WeightedLosses, start: int, losses_Kr: Tensor, num_rows: int
) -> Tensor:
    """Fills in the losses of a block; the derivative of their mean over *all* rows by the cosines.

    One loss after the other, so that the graph of only one of them is alive.
    """
    total: Tensor | None = None
    cosines.requires_grad_()
    for index, (loss, weight) in enumerate(zip(terms.losses, terms.weights, strict=True)):
        with torch.enable_grad():
            losses = loss(cosines, start)
            factor = torch.full_like(losses, weight / num_rows)
            (slope,) = torch.autograd.grad(losses, cosines, factor)
        losses_Kr[index] = losses.detach()
        total = slope if total is None else total.add_(slope)
    assert total is not None
    return total


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
        block, chunk = _token_blocks(rows_RD, arguments, chunk_rows, workspace_bytes)
        negatives_R, centre_RD = _stream_negatives(rows_RD, arguments, block, chunk, wanted)
        loss, grad_rows = _own_tokens(rows_RD, arguments, negatives_R, centre_RD, block)
        ctx.save_for_backward(grad_rows)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative()
        (grad_rows,) = ctx.saved_tensors
        grad = None if grad_rows is None else grad_rows * grad_outputs[0]
        return grad, None, None, None, None


def _token_blocks(
    rows_RD: Tensor, arguments: TokenArguments, chunk_rows: int | None, workspace_bytes: int
) -> tuple[int, int]:
    """Sentences per block and rows per chunk: half the workspace for tokens, half for logits."""
    num_sentences, num_tokens, width = arguments.tokens_NTD.shape
    half = workspace_bytes // (2 * rows_RD.element_size())
    # A normalised block is alive about three times (cast, norm, quotient), a logit block too.
    block = min(num_sentences, max(1, half // (3 * num_tokens * width)))
    fit = max(1, half // (3 * block * num_tokens))
    return block, min(rows_RD.shape[0], chunk_rows or fit)


def _stream_negatives(
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
        tokens = normalise_tokens(arguments.tokens_NTD[low:high].to(rows_RD.dtype), arguments.norm)
        tokens_MD = tokens.flatten(0, 1)
        for start, stop in spans(num_rows, chunk):
            rows = slice(start, stop)
            logits = rows_RD[rows] @ tokens_MD.T
            logits /= arguments.temperature
            _drop_cells(logits, arguments, rows, slice(low, high))
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


def _drop_cells(logits: Tensor, arguments: TokenArguments, rows: slice, block: slice) -> None:
    """Set padding, the own sentence and same-image sentences of a logit block to -inf."""
    mask_BT = arguments.mask_NT[block]
    cells = logits.view(logits.shape[0], *mask_BT.shape)
    cells.masked_fill_(~mask_BT, -math.inf)
    excluded = excluded_cells(
        logits.shape[0],
        mask_BT.shape[0],
        arguments.col_offset + rows.start - block.start,
        None if arguments.row_ids is None else arguments.row_ids[rows],
        None if arguments.col_ids is None else arguments.col_ids[block],
        logits.device,
        own=True,
    )
    cells.masked_fill_(excluded[:, :, None], -math.inf)


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


def _own_tokens(
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
