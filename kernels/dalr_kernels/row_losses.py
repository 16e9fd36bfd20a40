"""All row losses that use the same student matrix, computed together.

``cos(rows, cols)`` and every teacher matrix are made once, and the gradients of all terms are added
before the two products that need them. That is 8 N^2 D operations instead of 8 per term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dalr_kernels import validation as checks
from dalr_kernels.eager import chunked
from dalr_kernels.eager.row_terms import RowTerms
from dalr_kernels.similarity import Similarity, unit
from dalr_kernels.terms import (
    AlignmentKL,
    InfoNCE,
    ListMLE,
    ListNet,
    RowLosses,
    Term,
    constant_blocks,
)


class How(NamedTuple):
    """Options of the computation that do not change its result beyond rounding."""

    impl: str = "auto"
    mode: str = "auto"
    deterministic: bool = True
    check_finite: bool | None = None
    chunk_rows: int | None = None
    workspace_bytes: int | None = None


def row_losses(
    rows: Tensor,
    cols: Tensor,
    teacher: Similarity | None = None,
    *,
    info_nce: InfoNCE | None = None,
    alignment_kl: AlignmentKL | None = None,
    list_net: ListNet | None = None,
    list_mle: ListMLE | None = None,
    col_offset: int = 0,
    impl: str = "auto",
    mode: str = "auto",
    deterministic: bool = True,
    check_finite: bool | None = None,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> RowLosses:
    """Weighted sum of row losses on one student matrix, each as its own function defines it.

    Args:
        rows: Local rows ``[R, D]``, differentiable.
        cols: Global columns ``[N, D]``, differentiable.
        teacher: Constant ``[R, N]`` of the terms that name none themselves. The same object used
            twice (also as soft labels) is computed once.
        info_nce: The contrastive term, if wanted.
        alignment_kl: The alignment term, if wanted.
        list_net: The ListNet term, if wanted.
        list_mle: The ListMLE term, if wanted; "triton" computes it in row chunks of its own,
            because it sorts whole rows.
        col_offset: Column of the positive of row 0.
        impl: "triton" (fused kernels; fp16, bf16 or fp32 on CUDA), "torch" (row chunks, linear
            memory), "reference" (dense), or "auto": "triton" where it can run on CUDA, else
            "torch".
        mode: Of "triton": "workspace" keeps a chunk of rows of each matrix, "stream" a constant
            block and recomputes; "auto" takes "workspace" when enough rows fit.
        deterministic: True gives the same bits for the same inputs, shapes and device. False
            would permit sums in any order; no kernel uses that so far.
        check_finite: Refuse NaN and infinity in rows and columns, by name. None: on a CPU only,
            and not while torch compiles, because the check waits for the device. Unchecked, they
            give a NaN loss.
        chunk_rows: Rows per chunk of "torch" and of mode "workspace", rows and columns per block
            of mode "stream"; by default what fits `workspace_bytes`.
        workspace_bytes: Temporary memory; default 256 MiB, on CUDA 1 GiB.

    Returns:
        The total, a scalar in float32 or float64, and the detached mean of each term.

    Raises:
        ValueError: No term, or shapes, types, devices or values that do not fit.
    """
    checks.rows_and_columns(rows, cols, col_offset)
    terms = _checked_terms(rows, cols, teacher, info_nce, alignment_kl, list_net, list_mle)
    how = How(impl, mode, deterministic, check_finite, chunk_rows, workspace_bytes)
    total, components = weighted_mean(rows, cols, list(terms.values()), col_offset, how)
    return RowLosses(total, **dict(zip(terms, components.detach().unbind(), strict=True)))


def _checked_terms(
    rows: Tensor, cols: Tensor, teacher: Similarity | None, *terms: Term | None
) -> dict[str, Term]:
    """The terms that are not None by their names in `RowLosses`, each with its teacher."""
    names = RowLosses._fields[1:]
    found = {
        name: _with_teacher(term, teacher)
        for name, term in zip(names, terms, strict=True)
        if term is not None
    }
    if not found:
        raise ValueError("row_losses needs at least one term")
    for term in found.values():
        term.check(rows, cols)
    return found


def weighted_mean(
    rows: Tensor, cols: Tensor, terms: Sequence[Term], col_offset: int, how: How
) -> tuple[Tensor, Tensor]:
    """Weighted sum of checked terms and the mean of each, ``[K]``."""
    checks.implementation(how.impl)
    checks.mode(how.mode)
    workspace = chunked.workspace_of(rows.device, how.chunk_rows, how.workspace_bytes)
    if _checks_values(how, rows):
        checks.finite("rows", rows)
        checks.finite("cols", cols)
    with torch.autocast(rows.device.type, enabled=False):
        if how.impl == "reference":
            return _dense(rows, cols, terms, col_offset)
        if _fused(how.impl, rows, cols, terms):
            return _with_kernels(rows, cols, terms, col_offset, how, workspace)
        return _in_chunks(rows, cols, terms, col_offset, how, workspace)


def _checks_values(how: How, rows: Tensor) -> bool:
    if how.check_finite is not None:
        return how.check_finite
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


def _with_teacher(term: Term, teacher: Similarity | None) -> Term:
    if isinstance(term, InfoNCE) or term.teacher is not None:
        return term
    return replace(term, teacher=teacher)


def _dense(
    rows: Tensor, cols: Tensor, terms: Sequence[Term], col_offset: int
) -> tuple[Tensor, Tensor]:
    dtype = checks.compute_dtype(rows, cols)
    blocks = constant_blocks([s for term in terms for s in term.similarities()], dtype)
    cosines = unit(rows.to(dtype)) @ unit(cols.to(dtype)).T
    means = [term.losses(cosines, 0, col_offset, blocks).mean() for term in terms]
    components = torch.stack(means)
    return components @ components.new_tensor([term.weight for term in terms]), components


def _in_chunks(
    rows: Tensor, cols: Tensor, terms: Sequence[Term], col_offset: int, how: How, workspace: int
) -> tuple[Tensor, Tensor]:
    dtype = checks.compute_dtype(rows, cols)
    fit = chunked.rows_per_chunk(rows, len(cols), dtype, workspace)
    row_terms = RowTerms(terms, len(rows), col_offset, dtype)
    return chunked.mean_over_rows(rows, cols, row_terms, dtype, how.chunk_rows or fit)


def _fused(impl: str, rows: Tensor, cols: Tensor, terms: Sequence[Term]) -> bool:
    """Whether the Triton kernels compute this call; "triton" that cannot run is refused."""
    if impl == "torch":
        return False
    from dalr_kernels import fused

    reason = fused.unavailable(rows, cols)
    if reason is None and any(s.wider_than(rows.dtype) for t in terms for s in t.similarities()):
        reason = "computes similarities in float32, float64 was asked for"
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl='triton' {reason}; use impl='auto'")
    return reason is None and (impl == "triton" or rows.is_cuda)


def _with_kernels(
    rows: Tensor, cols: Tensor, terms: Sequence[Term], col_offset: int, how: How, workspace: int
) -> tuple[Tensor, Tensor]:
    from dalr_kernels import fused

    totals: list[Tensor] = []
    components: dict[int, Tensor] = {}
    for group in fused.groups(terms):
        part = [terms[index] for index in group]
        if isinstance(part[0], ListMLE):
            total, means = _in_chunks(rows, cols, part, col_offset, how, workspace)
        else:
            limits = fused.Limits(workspace, how.chunk_rows, how.mode)
            total, means = fused.weighted_mean(rows, cols, part, col_offset, limits)
        totals.append(total)
        components |= dict(zip(group, means.unbind(), strict=True))
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
    return total, torch.stack([components[index] for index in range(len(terms))])
