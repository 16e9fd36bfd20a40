"""The one place that knows how ``dalr_kernels`` is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import dalr_kernels as kernels

from bench.problems import (
    KL_STUDENT,
    KL_TEACHER,
    MARGIN,
    OBJECTIVES,
    RANK_TEACHER,
    TEMPERATURE,
    WEIGHTS,
    Problem,
    objective_loss,
    separate_losses,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dalr_scale.objective.views import KernelOptions


def loss(problem: Problem, **how: Any) -> Callable[[], Tensor]:
    """The problem through ``dalr_kernels`` with ``impl``, ``mode`` and the like from `how`.

    Raises:
        ValueError: The ``dalr_kernels`` at hand has no such argument.
    """
    accepts(kernels.info_nce, how)
    if problem.name in OBJECTIVES:
        return lambda: objective_loss(problem, cast("KernelOptions", how))
    if problem.name == "triple":
        return lambda: shared_call(problem, how)
    return lambda: separate_losses(problem, **how)


def shared_call(problem: Problem, how: dict[str, Any]) -> Tensor:
    """The three losses in one call, S and T made once."""
    teacher = problem.teacher
    info, divergence, ranking = WEIGHTS
    return kernels.row_losses(
        problem.leaves["rows"],
        problem.leaves["cols"],
        teacher,
        info_nce=kernels.InfoNCE(TEMPERATURE, MARGIN, info, soft_labels=teacher),
        alignment_kl=kernels.AlignmentKL(KL_STUDENT, KL_TEACHER, weight=divergence),
        list_net=kernels.ListNet(
            temperature=TEMPERATURE, teacher_temperature=RANK_TEACHER, weight=ranking
        ),
        col_offset=problem.shape.offset,
        **how,
    ).total


def accepts(function: Callable[..., Any], how: dict[str, Any]) -> None:
    """Refuse keywords the function does not have."""
    unknown = set(how) - set(inspect.signature(function).parameters)
    if unknown:
        raise ValueError(f"dalr_kernels has no argument {', '.join(sorted(unknown))}")
