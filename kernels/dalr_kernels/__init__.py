"""Losses of DALR on large batches: memory-linear, exact, and independent of the trainer."""

from dalr_kernels.eager.column_kl import column_alignment_kl
from dalr_kernels.eager.global_to_local import own_token_loss, token_negatives
from dalr_kernels.losses import (
    alignment_kl,
    consistency,
    global_to_local,
    info_nce,
    list_mle,
    list_net,
)
from dalr_kernels.precision import half_operands
from dalr_kernels.row_losses import row_losses
from dalr_kernels.similarity import Similarity, unit
from dalr_kernels.terms import AlignmentKL, InfoNCE, ListMLE, ListNet, RowLosses

__all__ = [
    "AlignmentKL",
    "InfoNCE",
    "ListMLE",
    "ListNet",
    "RowLosses",
    "Similarity",
    "alignment_kl",
    "column_alignment_kl",
    "consistency",
    "global_to_local",
    "half_operands",
    "info_nce",
    "list_mle",
    "list_net",
    "own_token_loss",
    "row_losses",
    "token_negatives",
    "unit",
]
