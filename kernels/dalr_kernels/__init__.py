"""Losses of DALR on large batches: memory-linear, exact, and independent of the trainer."""

from .column_kl import column_alignment_kl
from .losses import alignment_kl, consistency, global_to_local, info_nce, list_mle, list_net
from .similarity import Similarity, unit
from .stationary import own_token_loss, token_negatives

__all__ = [
    "Similarity",
    "alignment_kl",
    "column_alignment_kl",
    "consistency",
    "global_to_local",
    "info_nce",
    "list_mle",
    "list_net",
    "own_token_loss",
    "token_negatives",
    "unit",
]
