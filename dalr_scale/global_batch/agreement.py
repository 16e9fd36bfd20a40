"""Ranks that hold batches which do not fit together refuse the step, all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dalr_scale.distributed.collectives import column_group, several_ranks
from dalr_scale.errors import UserError
from dalr_scale.global_batch.keys import integer_key

if TYPE_CHECKING:
    from collections.abc import Mapping


def require_agreement(facts: Mapping[str, str], step: int, device: torch.device) -> None:
    """Refuses, on every rank, a step for which the ranks hold batches that do not fit together.

    Collectives of unequal tensors would hang, or pair rows of different kinds without an error.
    """
    if not several_ranks():
        return
    mark = torch.tensor([facts_key(facts)], device=device)
    marks = mark.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(marks, mark, group=column_group())
    if not bool((marks == marks[0]).all()):
        refuse(facts, step)


def facts_key(facts: Mapping[str, str]) -> int:
    """A number that differs where the facts do."""
    return integer_key(*sorted(facts.items()))


def refuse(facts: Mapping[str, str], step: int) -> None:
    """Tells on every rank in which facts the ranks differ; a collective call of all of them.

    Raises:
        UserError: always.
    """
    everyone: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, dict(facts), group=column_group())
    differing = sorted({n for f in everyone for n in f if f.get(n) != everyone[0].get(n)})
    lines = "; ".join(
        f"rank {rank}: " + ", ".join(f"{n} {f.get(n, 'none')}" for n in differing)
        for rank, f in enumerate(everyone)
    )
    raise UserError(
        f"the ranks hold different batches in step {step + 1} ({lines}); every rank needs "
        "the same shards, features and settings"
    )
