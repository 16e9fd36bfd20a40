"""The total loss of a batch: the weighted sum of the active terms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dalr_kernels as kernels
import torch
from torch import Tensor

from dalr_scale.objective.registry import active_terms
from dalr_scale.objective.row_chunks import mean_over_row_chunks
from dalr_scale.objective.term import BatchTerm, FusedTerm, KernelTerm, RowTerm, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dalr_scale.config import ObjectiveConfig
    from dalr_scale.objective.views import LossBatch

# Where `dalr_kernels.row_losses` takes a term of a type, and returns its mean.
ARGUMENTS: dict[type[KernelTerm], str] = {
    kernels.InfoNCE: "info_nce",
    kernels.AlignmentKL: "alignment_kl",
    kernels.ListNet: "list_net",
    kernels.ListMLE: "list_mle",
}


@dataclass(frozen=True)
class Loss:
    """The weighted sum of all terms (differentiable) and each of them (detached, for logging)."""

    total: Tensor
    terms: dict[str, Tensor]


def batch_loss(objective: ObjectiveConfig, batch: LossBatch) -> Loss:
    """L_con + lambda * (cross-modal group) + mu * (intra-modal group) + added terms.

    Args:
        objective: weights and settings.
        batch: what the active terms need is there.

    Returns:
        The means over this rank's rows.

    Raises:
        UserError: see `active_terms`.
    """
    terms = [t for t in active_terms(objective) if t.runs(objective, paired=batch.paired)]
    fused = _fused_losses(objective, batch, [t for t in terms if isinstance(t, FusedTerm)])
    parts = [loss.total for loss in fused]
    values = {name: value for loss in fused for name, value in loss.terms.items()}
    for term in terms:
        if not isinstance(term, FusedTerm):
            value = _mean(term, objective, batch)
            parts.append(term.weight(objective) * value)
            values[term.name] = value.detach()
    return Loss(torch.stack(parts).sum(), values)


def _mean(term: Term, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
    match term:
        case RowTerm():
            return mean_over_row_chunks(term, objective, batch)
        case BatchTerm():
            return term.loss(objective, batch)
        case _:
            raise TypeError(f"{type(term).__name__} must be a FusedTerm, RowTerm or BatchTerm")


def _fused_losses(
    objective: ObjectiveConfig, batch: LossBatch, terms: Sequence[FusedTerm]
) -> list[Loss]:
    """The terms on the similarities of z1 and z2.

    One pass makes these matrices once and the gradients of the weighted sum in one go. It takes
    one term of each type; another of the same type starts a second pass.
    """
    passes: list[dict[str, tuple[str, KernelTerm]]] = []
    for term in terms:
        made = replace(term.kernel_term(objective, batch), weight=term.weight(objective))
        argument = ARGUMENTS[type(made)]
        free = next((entries for entries in passes if argument not in entries), None)
        if free is None:
            passes.append(free := {})
        free[argument] = (term.name, made)
    return [_shared_pass(batch, entries) for entries in passes]


def _shared_pass(batch: LossBatch, entries: dict[str, tuple[str, KernelTerm]]) -> Loss:
    arguments: dict[str, Any] = {argument: term for argument, (_, term) in entries.items()}
    # The losses do not look for NaN in their inputs (check_finite=False): the trainer looks at
    # their means over all ranks, and names the step and its items.
    found = kernels.row_losses(
        batch.rows.z1, batch.cols.z2, col_offset=batch.offset, check_finite=False,
        **arguments, **batch.options,
    )  # fmt: skip
    return Loss(
        found.total, {name: getattr(found, argument) for argument, (name, _) in entries.items()}
    )
