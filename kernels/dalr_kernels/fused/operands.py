"""Unit vectors in the type of the products: the student's two sides and every teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dalr_kernels.fused.normalize_kernels import normalize_rows
from dalr_kernels.fused.products import scores
from dalr_kernels.fused.tuning import Matrices, padded

# Rounding of a teacher's cosines that its Similarity asks for, by code.
ROUNDINGS = (None, torch.float16, torch.bfloat16)


class StudentVectors(NamedTuple):
    """Unit vectors ``[R, D']`` and ``[N', D']`` (padded), and the norms they were divided by."""

    rows: Tensor
    cols: Tensor
    row_norms: Tensor
    col_norms: Tensor


class Teacher(NamedTuple):
    """Factors of one constant similarity.

    All weights are folded into one pair of matrices. Only where every cosine has to be rounded
    before the mix, each factor stays on its own.

    Attributes:
        rows: ``[R, D_k']`` per factor.
        cols: ``[N', D_k']`` per factor.
        weights: Factor of each product.
        rounding: Type that cosines pass through before they are weighted, or None.
    """

    rows: list[Tensor]
    cols: list[Tensor]
    weights: list[float]
    rounding: torch.dtype | None

    def block(self, rows: slice, cols: slice, out: Tensor) -> None:
        """Write the elements of these rows and (padded) columns."""
        if self.rounding is None:
            scores(self.rows[0][rows], self.cols[0][cols], out)
            return
        part = torch.empty_like(out)
        for index, weight in enumerate(self.weights):
            scores(self.rows[index][rows], self.cols[index][cols], part)
            rounded = part.to(self.rounding).to(out.dtype).mul_(weight)
            if index == 0:
                out.copy_(rounded)
            else:
                out.add_(rounded)


def student(rows: Tensor, cols: Tensor, dtype: torch.dtype) -> StudentVectors:
    """Normalize both sides of the student."""
    width = padded(rows.shape[1])
    cols_ND = cols.new_empty(padded(cols.shape[0]), width, dtype=dtype)
    col_norms = normalize_rows(cols, cols_ND, last_col=width)
    if _same(rows, cols):
        return StudentVectors(cols_ND[: len(rows)], cols_ND, col_norms, col_norms)
    rows_RD = rows.new_empty(len(rows), width, dtype=dtype)
    return StudentVectors(
        rows_RD, cols_ND, normalize_rows(rows, rows_RD, last_col=width), col_norms
    )


def teachers(matrices: Matrices, dtype: torch.dtype) -> list[Teacher]:
    """Normalize the factors of every constant similarity."""
    found = []
    for owner, code in enumerate(matrices.rounded):
        mine = [index for index, other in enumerate(matrices.owners) if other == owner]
        pairs = [(matrices.tensors[2 * k], matrices.tensors[2 * k + 1]) for k in mine]
        weights = [matrices.weights[k] for k in mine]
        rounding = ROUNDINGS[code]
        if rounding is None or rounding == dtype:  # stored in that type anyway
            found.append(_folded(pairs, weights, dtype))
        else:
            parts = [_folded([pair], [1.0], dtype) for pair in pairs]
            rows, cols = [p.rows[0] for p in parts], [p.cols[0] for p in parts]
            found.append(Teacher(rows, cols, weights, rounding))
    return found


def _folded(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], dtype: torch.dtype
) -> Teacher:
    """One pair of matrices whose product is the weighted sum of the cosines."""
    ends = [0]
    for rows, _ in pairs:
        ends.append(ends[-1] + padded(rows.shape[1]))
    first_rows, first_cols = pairs[0]
    cols_ND = first_cols.new_empty(padded(len(first_cols)), ends[-1], dtype=dtype)
    shared = all(_same(*pair) for pair in pairs) and min(weights) >= 0.0
    rows_RD = (
        cols_ND[: len(first_rows)]
        if shared
        else first_rows.new_empty(len(first_rows), ends[-1], dtype=dtype)
    )
    for k, ((rows, cols), weight) in enumerate(zip(pairs, weights, strict=True)):
        root = math.sqrt(abs(weight))
        span = {"first_col": ends[k], "last_col": ends[k + 1]}
        normalize_rows(cols, cols_ND, root, **span)
        if not shared:
            normalize_rows(rows, rows_RD, math.copysign(root, weight), **span)
    return Teacher([rows_RD], [cols_ND], [1.0], None)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same memory, so that one copy serves both."""
    return (
        left.data_ptr() == right.data_ptr()
        and left.dtype == right.dtype
        and left.shape == right.shape
        and left.stride() == right.stride()
    )
