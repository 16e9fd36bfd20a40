"""Global-to-local with tokens that stay where they are.

The loss compares every sentence vector with the tokens of all sentences. Tokens are T times as
large as sentence vectors, so over several ranks it is the vectors that travel: every rank scores
*all* N vectors against the tokens of its own sentences (`token_negatives`), the partial results
are merged over ranks (log-sum-exps and weighted means merge exactly), and each rank ends with the
negatives of its own rows and their slope (`own_token_loss`). No token is ever sent, and nothing
has to come back in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalr_kernels import validation as checks
from dalr_kernels.eager import chunked
from dalr_kernels.row_losses import workspace_of
from dalr_kernels.similarity import unit


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
    """What all rows see of some sentences' tokens; a constant, see `own_token_loss`.

    Args:
        rows: Sentence vectors of the global batch ``[N, D]``.
        tokens: Token features of b consecutive sentences ``[b, T, D]``.
        mask: ``[b, T]``, nonzero for a real token.
        temperature: Divides the products, positive.
        norm: "token" or "axis", as in `global_to_local`.
        unit_rows: Normalise the rows; the published code does not.
        row_ids: Image ids ``[N]``; sentences of the same image (ids >= 0) are no negatives.
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
    arguments = chunked.TokenArguments(
        tokens.detach(), mask != 0, tokens.detach(), mask != 0, norm, temperature, -first_own,
        row_ids, col_ids,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        values = _compute(rows.detach(), unit_rows)
        workspace = workspace_of(rows.device, None, workspace_bytes)
        block, chunk = chunked.token_blocks(values, arguments, None, workspace)
        negatives, centre = chunked.stream_negatives(values, arguments, block, chunk, True)
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
        centre: The softmax-weighted mean of those tokens ``[R, D]``, the slope of `negatives`.
        temperature: As in `token_negatives`; also `norm` and `unit_rows`.
        norm: "token" or "axis".
        unit_rows: Normalise the rows.
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
    constants = chunked.TokenArguments(
        tokens.detach(), mask != 0, tokens.detach(), mask != 0, norm, temperature, 0, None, None
    )
    workspace = workspace_of(rows.device, None, workspace_bytes)
    with torch.autocast(rows.device.type, enabled=False):
        values = _compute(rows, unit_rows)
        block, _ = chunked.token_blocks(values, constants, None, workspace)
        return _OwnTokens.apply(values, constants, negatives, centre, block)


def _compute(rows: Tensor, unit_rows: bool) -> Tensor:
    values = rows.to(checks.compute_dtype(rows))
    return unit(values) if unit_rows else values


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        arguments: chunked.TokenArguments,
        negatives_R: Tensor,
        centre_RD: Tensor,
        chunk: int,
    ) -> Tensor:
        loss, grad_rows = chunked.own_tokens(rows_RD, arguments, negatives_R, centre_RD, chunk)
        ctx.save_for_backward(grad_rows)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_rows,) = ctx.saved_tensors
        return grad_rows * grad_outputs[0], None, None, None, None
