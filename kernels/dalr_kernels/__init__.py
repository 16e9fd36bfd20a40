"""Losses of DALR on large batches: memory-linear, exact, and independent of the trainer."""

from .column_kl import column_alignment_kl
from .losses import alignment_kl, consistency, global_to_local, info_nce, list_mle, list_net
from .precision import half_operands
from .shared import row_losses
from .similarity import Similarity, unit
from .stationary import own_token_loss, token_negatives
from .terms import AlignmentKL, InfoNCE, ListMLE, ListNet, RowLosses

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
