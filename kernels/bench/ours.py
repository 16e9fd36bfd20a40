"""The one place that knows how ``dalr_kernels`` is called."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import dalr_kernels as kernels
from torch import Tensor

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
from dalr_scale.objective import terms as objective

LOSSES = ("info_nce", "alignment_kl", "list_net", "list_mle", "global_to_local", "row_losses")


def loss(problem: Problem, **how: Any) -> Callable[[], Tensor]:
    """The problem through ``dalr_kernels`` with ``impl``, ``mode`` and the like from `how`.

    Raises:
        ValueError: The ``dalr_kernels`` at hand has no such argument.
    """
    accepts(kernels.info_nce, how)
    if problem.name in OBJECTIVES:
        return lambda: _objective(problem, how)
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


def _objective(problem: Problem, how: dict[str, Any]) -> Tensor:
    with implementation(**how):
        return objective_loss(problem)


@contextlib.contextmanager
def implementation(**how: Any) -> Iterator[None]:
    """Make the product's objective call every loss with the given keywords."""
    patched = SimpleNamespace(**{name: getattr(kernels, name) for name in kernels.__all__})
    for name in LOSSES:
        function = getattr(kernels, name)
        known = inspect.signature(function).parameters
        fixed = {key: value for key, value in how.items() if key in known}
        setattr(patched, name, functools.partial(function, **fixed))
    with mock.patch.object(objective, "kernels", patched):
        yield
