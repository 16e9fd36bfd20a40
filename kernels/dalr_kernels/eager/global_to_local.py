"""Global-to-local in plain torch: every sentence vector against the tokens of all sentences.

`stream_global_to_local` computes it on one rank. Tokens are T times as large as sentence vectors,
so over several ranks the vectors are sent: every rank scores *all* N vectors against the
tokens of its own sentences (`token_negatives`), the partial results are merged over ranks
(log-sum-exps and weighted means merge exactly), and each rank ends with the negatives of its own
rows and their gradient (`own_token_loss`). No token is ever sent, and nothing has to return in the
backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalr_kernels import reference
from dalr_kernels import validation as checks
from dalr_kernels.eager.chunked import (
    Context,
    refuse_second_derivative,
    spans,
    wants_gradient,
    workspace_of,
)
from dalr_kernels.similarity import unit


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

    def checked(self, rows: Tensor) -> TokenArguments:
        """The same with detached features and boolean masks, for sentence vectors ``[R, D]``.

        Raises:
            ValueError: Shapes, types, devices or values that do not fit, named in the message.
        """
        own, sentences = self.own_RTD, len(self.tokens_NTD)
        checks.matrix("rows", rows)
        checks.tokens("own_tokens", own, self.own_mask_RT, rows)
        checks.tokens("tokens", self.tokens_NTD, self.mask_NT, rows)
        if len(own) != len(rows):
            raise ValueError(f"own_tokens has {len(own)} sentences for {len(rows)} rows")
        checks.offset(self.col_offset, len(rows), sentences)
        checks.temperatures(checks.compute_dtype(rows), temperature=self.temperature)
        checks.ids(self.row_ids, self.col_ids, rows, sentences)
        checks.token_norm(self.norm)
        return self._replace(
            own_RTD=own.detach(),
            own_mask_RT=self.own_mask_RT != 0,
            tokens_NTD=self.tokens_NTD.detach(),
            mask_NT=self.mask_NT != 0,
        )


def token_negatives(
    rows: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    norm: str = "token",
    unit_rows: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    first_own: int = 0,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of all rows over the tokens of some sentences; a constant for `own_token_loss`.

    Args:
        rows: Sentence vectors of the global batch ``[N, D]``.
        tokens: Token features of b consecutive sentences ``[b, T, D]``.
        mask: ``[b, T]``, nonzero for a real token.
        temperature: Divides the products, positive.
        norm: "token" or "axis", as in `global_to_local`.
        unit_rows: Normalize the rows; the published code does not.
        row_ids: Image ids ``[N]``; sentences of the same image (ids >= 0) are not negatives.
        col_ids: Image ids ``[b]``, given together with `row_ids`.
        first_own: Row whose own sentence is ``tokens[0]``.
        workspace_bytes: Temporary memory; default 256 MiB, on CUDA 1 GiB.

    Returns:
        The log-sum-exp over the tokens of other sentences ``[N]`` (-inf where there are none) and
        the softmax-weighted mean of these tokens ``[N, D]``; float32 or float64.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    checks.matrix("rows", rows)
    checks.tokens("tokens", tokens, mask, rows)
    checks.offset(first_own, tokens.shape[0], rows.shape[0])
    checks.positive("temperature", temperature)
    checks.ids(row_ids, col_ids, rows, tokens.shape[0])
    checks.token_norm(norm)
    arguments = TokenArguments(
        tokens.detach(), mask != 0, tokens.detach(), mask != 0, norm, temperature, -first_own,
        row_ids, col_ids,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        values = _compute(rows.detach(), unit_rows)
        workspace = workspace_of(rows.device, None, workspace_bytes)
        block, chunk = token_blocks(values, arguments, None, workspace)
        negatives, centre = stream_negatives(values, arguments, block, chunk, True)
    assert centre is not None
    return negatives, centre


def own_token_loss(
    rows: Tensor,
    tokens: Tensor,
    mask: Tensor,
    negatives: Tensor,
    centre: Tensor,
    *,
    temperature: float,
    norm: str = "token",
    unit_rows: bool = True,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Global-to-local loss of rows whose negatives are known.

    Args:
        rows: Local sentence vectors ``[R, D]``, differentiable.
        tokens: Token features of the rows' own sentences ``[R, T, D]``.
        mask: ``[R, T]``, nonzero for a real token; a row without any costs 0.
        negatives: Log-sum-exp over the tokens of all other sentences ``[R]``.
        centre: The softmax-weighted mean of those tokens ``[R, D]``, the gradient of `negatives`.
        temperature: As in `token_negatives`; also `norm` and `unit_rows`.
        norm: "token" or "axis".
        unit_rows: Normalize the rows.
        workspace_bytes: Temporary memory; default 256 MiB, on CUDA 1 GiB.

    Returns:
        The mean over the local rows, a scalar: `global_to_local` of the same rows.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    checks.matrix("rows", rows)
    checks.tokens("tokens", tokens, mask, rows)
    checks.positive("temperature", temperature)
    checks.token_norm(norm)
    if not len(tokens) == len(negatives) == len(rows) or centre.shape != rows.shape:
        raise ValueError(
            f"{tuple(rows.shape)} rows need as many token rows and negatives, and a centre of "
            f"their shape; got {len(tokens)}, {len(negatives)} and {tuple(centre.shape)}"
        )
    constants = TokenArguments(
        tokens.detach(), mask != 0, tokens.detach(), mask != 0, norm, temperature, 0, None, None
    )
    workspace = workspace_of(rows.device, None, workspace_bytes)
    with torch.autocast(rows.device.type, enabled=False):
        values = _compute(rows, unit_rows)
        block, _ = token_blocks(values, constants, None, workspace)
        return _OwnTokens.apply(values, constants, negatives, centre, block)


def _compute(rows: Tensor, unit_rows: bool) -> Tensor:
    values = rows.to(checks.compute_dtype(rows))
    return unit(values) if unit_rows else values


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        rows_RD: Tensor,
        arguments: TokenArguments,
        negatives_R: Tensor,
        centre_RD: Tensor,
        chunk: int,
    ) -> Tensor:
        loss, grad_rows = own_tokens(rows_RD, arguments, negatives_R, centre_RD, chunk)
        ctx.save_for_backward(grad_rows)
        return loss

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_rows,) = ctx.saved_tensors
        return grad_rows * grad_outputs[0], None, None, None, None


def stream_global_to_local(
    rows_RD: Tensor, arguments: TokenArguments, chunk_rows: int | None, workspace_bytes: int
) -> Tensor:
    """Mean over the rows, streaming over blocks of sentences; never ``[R, N, T]``."""
    return _GlobalToLocal.apply(
        rows_RD, arguments, chunk_rows, workspace_bytes, wants_gradient(rows_RD)
    )


class _GlobalToLocal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
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
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        (grad_rows,) = ctx.saved_tensors
        grad = None if grad_rows is None else grad_rows * grad_outputs[0]
        return grad, None, None, None, None


def token_blocks(
    rows_RD: Tensor, arguments: TokenArguments, chunk_rows: int | None, workspace_bytes: int
) -> tuple[int, int]:
    """Sentences per block and rows per chunk: half the workspace for tokens, half for logits."""
    num_sentences, num_tokens, width = arguments.tokens_NTD.shape
    half = workspace_bytes // (2 * rows_RD.element_size())
    # A normalized block is alive about three times (cast, norm, quotient), a logit block too.
    block = min(num_sentences, max(1, half // (3 * num_tokens * width)))
    fit = max(1, half // (3 * block * num_tokens))
    return block, min(rows_RD.shape[0], chunk_rows or fit)


def stream_negatives(
    rows_RD: Tensor, arguments: TokenArguments, block: int, chunk: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of every row's negatives and the softmax-weighted mean of their tokens.

    One sweep with a running maximum: sums and weighted tokens are rescaled when it rises, so the
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
            _mask_excluded(logits, arguments, rows, slice(low, high), owner_M)
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
    """Normalized tokens of some sentences without padding ``[M, D]``, and whose they are."""
    tokens = reference.normalize_tokens(arguments.tokens_NTD[block].to(dtype), arguments.norm)
    mask = arguments.mask_NT[block]
    owners = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    return tokens[mask], owners[mask]


def _mask_excluded(
    logits: Tensor, arguments: TokenArguments, rows: slice, block: slice, owner_M: Tensor
) -> None:
    """Set tokens of the own sentence and of same-image sentences to -inf."""
    excluded = reference.excluded_elements(
        logits.shape[0],
        block.stop - block.start,
        arguments.col_offset + rows.start - block.start,
        None if arguments.row_ids is None else arguments.row_ids[rows],
        None if arguments.col_ids is None else arguments.col_ids[block],
        logits.device,
        own=True,
    )
    logits.masked_fill_(excluded[:, owner_M], -math.inf)


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
        own = reference.normalize_tokens(arguments.own_RTD[rows].to(rows_RD.dtype), arguments.norm)
        mask = arguments.own_mask_RT[rows]
        positive = torch.einsum("rd,rtd->rt", rows_RD[rows], own) / arguments.temperature
        gap = positive - negatives_R[rows, None]
        count = mask.sum(dim=1, keepdim=True).clamp_min(1)
        # Without negatives the gap is +inf, hence loss and gradient are exactly zero.
        terms = -torch.nn.functional.logsigmoid(gap).masked_fill(~mask, 0.0) / count
        losses_R[rows] = terms.sum(dim=1)
        if grad_RD is not None and centre_RD is not None:
            grad = torch.sigmoid(-gap).masked_fill(~mask, 0.0) / count
            own_term = torch.einsum("rt,rtd->rd", grad, own)
            negatives_term = grad.sum(dim=1, keepdim=True) * centre_RD[rows]
            grad_RD[rows] = (negatives_term - own_term) / (arguments.temperature * num_rows)
    return losses_R.mean(), grad_RD
