"""Losses of DALR on large batches: memory-linear, exact, and independent of the trainer."""

from .losses import alignment_kl, consistency, global_to_local, info_nce, list_mle, list_net
from .shared import row_losses
from .similarity import Similarity, unit
from .terms import AlignmentKL, InfoNCE, ListMLE, ListNet, RowLosses

__all__ = [
    "AlignmentKL",
    "InfoNCE",
    "ListMLE",
    "ListNet",
    "RowLosses",
    "Similarity",
    "alignment_kl",
    "consistency",
    "global_to_local",
    "info_nce",
    "list_mle",
    "list_net",
    "row_losses",
    "unit",
]
