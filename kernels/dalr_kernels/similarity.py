"""Unit vectors and constant teacher similarities.

Shape letters used in this package: R local rows, N global columns, D width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-8
WIDE_ROWS = 64  # rows of a block that are held in float64 at a time


def unit(vectors: Tensor) -> Tensor:
    """Scale the last axis to length one: ``x / max(||x||, 1e-8)``; a zero vector stays zero."""
    return vectors / length(vectors)


def length(vectors: Tensor) -> Tensor:
    """What `unit` divides by, the last axis kept: ``max(||x||, 1e-8)``."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(EPSILON)


@dataclass(frozen=True, eq=False)
class Similarity:
    """A constant matrix ``sum_k weight_k * cos(rows_k, cols_k)`` that is never stored whole.

    Teachers, soft labels and false-negative scores are all of this form. Keeping the factors
    instead of the product is what lets the losses work on a few rows at a time. No gradient
    flows into the factors.

    Attributes:
        factors: Tuples ``(weight, rows [R, D_k], cols [N, D_k])`` of floating-point tensors, not
            necessarily normalized; the widths ``D_k`` may differ between factors.
        dtype: Round every cosine to this type before mixing (``torch.float16`` repeats what half
            precision teachers do to a ranking); ``None`` keeps the type of the loss. With
            ``torch.float64`` cosines are computed and mixed in it and rounded once, at the end, to
            the type of the loss.

    Raises:
        ValueError: No factor, an integer tensor, or shapes or devices that do not fit together.
    """

    factors: tuple[tuple[float, Tensor, Tensor], ...]
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("Similarity needs at least one (weight, rows, cols) factor")
        for index, (_, rows, cols) in enumerate(self.factors):
            _check_factor(index, rows, cols, self.factors[0][1].device)
            if (rows.shape[0], cols.shape[0]) != self.shape:
                raise ValueError(
                    f"Similarity factor {index} is {rows.shape[0]} x {cols.shape[0]}, factor 0 is "
                    f"{self.shape[0]} x {self.shape[1]}; all factors need the same shape"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix, ``(R, N)``."""
        _, rows, cols = self.factors[0]
        return rows.shape[0], cols.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.factors[0][1].device

    def normalized(self, dtype: torch.dtype) -> UnitSimilarity:
        """Normalize all factors once, detached, for use block by block in ``dtype``."""
        compute = torch.float64 if self.wider_than(dtype) else dtype
        factors = tuple(
            (float(weight), *_unit_pair(rows.detach(), cols.detach(), compute))
            for weight, rows, cols in self.factors
        )
        return UnitSimilarity(factors, self.dtype, dtype)

    def wider_than(self, dtype: torch.dtype) -> bool:
        """Whether the cosines ask for float64 in a loss that computes in less."""
        return self.dtype == torch.float64 and dtype != torch.float64


@dataclass(frozen=True, eq=False)
class UnitSimilarity:
    """A `Similarity` whose factors already have unit rows.

    Attributes:
        factors: As there, in the type of the loss, or in float64 where that is asked for.
        dtype: As there.
        result: Type of the loss, hence of the blocks.
    """

    factors: tuple[tuple[float, Tensor, Tensor], ...]
    dtype: torch.dtype | None
    result: torch.dtype

    @torch.no_grad()
    def block(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows ``start .. stop - 1`` of the matrix ``[stop - start, N]``, in `out` if given."""
        _, some_rows, some_cols = self.factors[0]
        if out is None:
            out = some_rows.new_empty(stop - start, some_cols.shape[0], dtype=self.result)
        if some_rows.dtype == out.dtype:
            return self._mixed(start, stop, out)
        wide = out.new_empty(min(WIDE_ROWS, len(out)), out.shape[1], dtype=some_rows.dtype)
        for first in range(start, stop, WIDE_ROWS):  # all rows at once would double the memory
            last = min(first + WIDE_ROWS, stop)
            part = self._mixed(first, last, wide[: last - first])
            out[first - start : last - start].copy_(part)
        return out

    def _mixed(self, start: int, stop: int, out: Tensor) -> Tensor:
        """`block` in the type of the factors."""
        for index, (weight, rows, cols) in enumerate(self.factors):
            # with beta = 0 the old content does not matter, not even NaN
            beta = 0.0 if index == 0 else 1.0
            if self.dtype in (None, rows.dtype):
                torch.addmm(out, rows[start:stop], cols.T, beta=beta, alpha=weight, out=out)
                continue
            cosines = (rows[start:stop] @ cols.T).to(self.dtype).to(rows.dtype)
            torch.mul(cosines, weight, out=out) if beta == 0.0 else out.add_(cosines, alpha=weight)
        return out


def _unit_pair(rows: Tensor, cols: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both sides of unit length; local rows that are a slice of the columns are not copied."""
    unit_cols = unit(cols.to(dtype))
    first = _first_row(rows, cols)
    if first is None:
        return unit(rows.to(dtype)), unit_cols
    return unit_cols[first : first + len(rows)], unit_cols


def _first_row(rows: Tensor, cols: Tensor) -> int | None:
    """Where `rows` begins in `cols`, if it is a view of consecutive rows of it."""
    if rows is cols:
        return 0
    same = rows.dtype == cols.dtype and rows.stride() == cols.stride() and cols.stride(0) > 0
    if not same or rows.untyped_storage().data_ptr() != cols.untyped_storage().data_ptr():
        return None
    gap = int(rows.storage_offset()) - int(cols.storage_offset())
    first, rest = divmod(gap, int(cols.stride(0)))
    return first if rest == 0 and 0 <= first <= len(cols) - len(rows) else None


def _check_factor(index: int, rows: Tensor, cols: Tensor, device: torch.device) -> None:
    where = f"Similarity factor {index}"
    if rows.ndim != 2 or cols.ndim != 2 or rows.shape[1] != cols.shape[1]:
        raise ValueError(
            f"{where} needs rows [R, D] and cols [N, D] of one width, "
            f"got {tuple(rows.shape)} and {tuple(cols.shape)}"
        )
    if not (rows.is_floating_point() and cols.is_floating_point()):
        raise ValueError(f"{where} needs floating-point tensors, got {rows.dtype} and {cols.dtype}")
    if rows.device != device or cols.device != device:
        raise ValueError(
            f"{where} is on {rows.device} and {cols.device}, factor 0 on {device}; "
            "move them together"
        )
