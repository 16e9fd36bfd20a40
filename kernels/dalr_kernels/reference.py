"""Dense specification of every loss, in plain torch operations.

The first four functions map a block of cosines to one loss per row; they are the definition for
both implementations, which differ only in how many rows they see at a time. `first_column` is the
global column of the positive of the block's first row. Gradients come from autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalr_kernels.margin import angular_margin, diagonal_mask
from dalr_kernels.similarity import unit

# Scores closer than this rank as ties. Equal sentences have equal teacher scores, but a matrix
# product may round them differently depending on its shape; the grid keeps their order (lowest
# column first) independent of how rows are split over chunks and ranks.
RANK_GRID = {torch.float32: 2.0**-20, torch.float64: 2.0**-40}


def excluded_elements(
    num_rows: int,
    num_cols: int,
    first_column: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    device: torch.device,
    *,
    own: bool,
) -> Tensor:
    """True where an element has the id of its row (ids >= 0); bool ``[R, N]``.

    Args:
        num_rows: R.
        num_cols: N.
        first_column: Column of the positive of row 0; may lie outside the block.
        row_ids: Image ids ``[R]``, or None.
        col_ids: Image ids ``[N]``, or None.
        device: Of the result.
        own: Value of the diagonal of positives.
    """
    if row_ids is None or col_ids is None:
        excluded = torch.zeros(num_rows, num_cols, dtype=torch.bool, device=device)
    else:
        excluded = (row_ids[:, None] == col_ids) & (row_ids[:, None] >= 0)
    if -num_rows < first_column < num_cols:
        excluded.diagonal(first_column).fill_(own)
    return excluded


def info_nce_rows(
    cosines_RN: Tensor,
    first_column: int,
    *,
    temperature: float,
    margin: float = 0.0,
    soft_RN: Tensor | None = None,
    excluded_RN: Tensor | None = None,
) -> Tensor:
    """Row cross-entropy ``logsumexp_j A_ij - A_ii`` of the margin similarity; ``[R]``."""
    logits_RN = angular_margin(cosines_RN, first_column, margin, soft_RN) / temperature
    if excluded_RN is not None:
        logits_RN = logits_RN.masked_fill(excluded_RN, -math.inf)
    return logits_RN.logsumexp(dim=1) - logits_RN.diagonal(first_column)


def alignment_kl_rows(
    cosines_RN: Tensor,
    first_column: int,
    teacher_RN: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    margin: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Row divergence of teacher softmax from student softmax, diagonal included; ``[R]``."""
    student_RN = angular_margin(cosines_RN, first_column, margin)
    log_r_RN = torch.log_softmax(student_RN / (temperature * student_temperature), dim=1)
    log_q_RN = torch.log_softmax(teacher_RN / teacher_temperature, dim=1)
    return (log_q_RN.exp() * (log_q_RN - log_r_RN)).sum(dim=1)


def list_net_rows(
    cosines_RN: Tensor,
    first_column: int,
    teacher_RN: Tensor,
    *,
    teacher_temperature: float,
    temperature: float,
    margin: float = 0.0,
) -> Tensor:
    """Cross-entropy of teacher and student lists without the diagonal; ``[R]``.

    A list of one column is empty after that and costs nothing.
    """
    own_RN = diagonal_mask(cosines_RN, first_column)
    student_RN = angular_margin(cosines_RN, first_column, margin) / temperature
    log_r_RN = student_RN.masked_fill(own_RN, -math.inf).log_softmax(dim=1)
    q_RN = (teacher_RN / teacher_temperature).masked_fill(own_RN, -math.inf).softmax(dim=1)
    # Zero both sides of the removed elements: 0 * -inf is NaN.
    return -(q_RN.masked_fill(own_RN, 0.0) * log_r_RN.masked_fill(own_RN, 0.0)).sum(dim=1)


def list_mle_rows(
    cosines_RN: Tensor,
    first_column: int,
    teacher_RN: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    mean: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """Plackett-Luce likelihood of the teacher's order, diagonal included; ``[R]``.

    With y the student list in the teacher's descending order less its maximum, the loss is the sum
    (or mean) over j of ``log(sum_{k>=j} exp(y_k) + eps) - y_j``.
    """
    student_RN = angular_margin(cosines_RN, first_column, margin) / temperature
    grid = RANK_GRID[cosines_RN.dtype]
    order_RN = (teacher_RN / grid).round().argsort(dim=1, descending=True, stable=True)
    list_RN = student_RN.gather(1, order_RN)
    list_RN = list_RN - list_RN.amax(dim=1, keepdim=True)
    suffix_RN = list_RN.flip(1).logcumsumexp(dim=1).flip(1)
    if eps > 0.0:
        suffix_RN = torch.logaddexp(suffix_RN, suffix_RN.new_tensor(math.log(eps)))
    terms_RN = suffix_RN - list_RN
    return terms_RN.mean(dim=1) if mean else terms_RN.sum(dim=1)


def normalize_tokens(tokens_NTD: Tensor, norm: str) -> Tensor:
    """Token features of unit length per token ("token") or per feature over all T ("axis")."""
    if norm == "token":
        return unit(tokens_NTD)
    # The published form divides by the norm over the token axis, padded positions included.
    return unit(tokens_NTD.transpose(1, 2)).transpose(1, 2)


def global_to_local_rows(
    rows_RD: Tensor,
    own_RTD: Tensor,
    own_mask_RT: Tensor,
    tokens_NTD: Tensor,
    mask_NT: Tensor,
    excluded_RN: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Each real token of the own sentence against all real tokens of the others; ``[R]``.

    Tokens and rows are already normalized, masks boolean. `excluded_RN` holds the own sentence and
    any further sentence that is not a negative. A row without tokens or negatives costs nothing.
    """
    own_RT = torch.einsum("rd,rtd->rt", rows_RD, own_RTD) / temperature
    others_RNT = torch.einsum("rd,ntd->rnt", rows_RD, tokens_NTD) / temperature
    dropped_RNT = excluded_RN[:, :, None] | ~mask_NT
    others_RM = others_RNT.masked_fill(dropped_RNT, -math.inf).flatten(1)
    empty_R1 = dropped_RNT.flatten(1).all(dim=1, keepdim=True)
    # logsumexp of nothing is -inf with a NaN gradient, so such rows take a dummy value first.
    negatives_R1 = others_RM.masked_fill(empty_R1, 0.0).logsumexp(dim=1, keepdim=True)
    # -logsigmoid(-x) is softplus without the cut-off of torch's softplus at 20.
    losses_RT = -torch.nn.functional.logsigmoid(own_RT - negatives_R1)
    losses_RT = losses_RT.masked_fill(~own_mask_RT | empty_R1, 0.0)
    return losses_RT.sum(dim=1) / own_mask_RT.sum(dim=1).clamp_min(1)
