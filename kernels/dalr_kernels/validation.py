"""Argument checks of the public losses; every error names the offending shape or value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dalr_kernels.similarity import Similarity

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
MODES = ("auto", "workspace", "stream")
# 1 / temperature must leave room for weights and sums in the type that the loss is computed in.
LARGEST_INVERSE = {torch.float32: 1e30, torch.float64: 1e300}


def implementation(impl: str, allowed: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """Refuse an unknown `impl`; without a fused form "auto" is resolved to "torch"."""
    if impl not in allowed:
        raise ValueError(f"impl={impl!r} does not exist; choose one of {', '.join(allowed)}")
    return "torch" if impl == "auto" and "triton" not in allowed else impl


def mode(value: str) -> None:
    """Refuse an unknown way to bound the workspace."""
    if value not in MODES:
        raise ValueError(f"mode={value!r} does not exist; choose one of {', '.join(MODES)}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def positive(name: str, value: float) -> None:
    """Refuse a temperature that is not a positive finite number."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a plain number, got a tensor; it takes no gradient here")
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def temperatures(dtype: torch.dtype, **values: float) -> None:
    """Refuse temperatures that are not positive or whose logits leave the range of `dtype`."""
    for name, value in values.items():
        positive(name, value)
        if value * LARGEST_INVERSE[dtype] < 1.0:
            raise ValueError(
                f"{name} = {value} overflows {str(dtype).removeprefix('torch.')}: "
                f"it must be at least {1.0 / LARGEST_INVERSE[dtype]:.0e}"
            )


def weight(value: float) -> None:
    """Refuse a weight that is not a finite number."""
    if isinstance(value, Tensor) or not math.isfinite(value):
        raise ValueError(f"weight must be a finite number, got {value}")


def finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, naming the first row that holds one (waits for the device)."""
    bad_R = ~torch.isfinite(tensor.detach()).all(dim=1)
    if bool(bad_R.any()):
        first = int(bad_R.nonzero()[0])
        raise ValueError(
            f"{name} must be finite: {int(bad_R.sum())} of {tensor.shape[0]} rows hold NaN or "
            f"infinity, the first is row {first}"
        )


def margin_angle(value: float) -> None:
    """Refuse a margin outside [0, pi)."""
    if not 0.0 <= value < math.pi:
        raise ValueError(f"margin must be an angle in [0, pi) radians, got {value}")


def matrix(name: str, tensor: Tensor) -> None:
    """Refuse anything but a non-empty floating-point ``[rows, width]`` tensor."""
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name} must be [rows, width], not empty; got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def rows_and_columns(rows: Tensor, cols: Tensor, col_offset: int) -> None:
    """Check local rows ``[R, D]`` against global columns ``[N, D]``."""
    matrix("rows", rows)
    matrix("cols", cols)
    if rows.shape[1] != cols.shape[1]:
        raise ValueError(
            f"rows and cols need one width, got {tuple(rows.shape)} and {tuple(cols.shape)}"
        )
    same_device("cols", cols, rows)
    offset(col_offset, rows.shape[0], cols.shape[0])


def offset(col_offset: int, num_rows: int, num_cols: int) -> None:
    """Check that every row has its positive among the columns."""
    if not 0 <= col_offset <= num_cols - num_rows:
        raise ValueError(
            f"col_offset={col_offset} puts the positives of {num_rows} rows outside "
            f"{num_cols} columns; it must be in 0 .. {num_cols - num_rows}"
        )


def same_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    """Refuse tensors on different devices."""
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device}, rows on {rows.device}; move them together")


def similarity(name: str, value: Similarity | None, rows: Tensor, num_cols: int) -> None:
    """Check that a constant similarity has the shape of the loss."""
    if value is None:
        return
    if value.shape != (rows.shape[0], num_cols):
        raise ValueError(
            f"{name} is {value.shape[0]} x {value.shape[1]}, "
            f"the loss is {rows.shape[0]} x {num_cols}"
        )
    if value.device != rows.device:
        raise ValueError(f"{name} is on {value.device}, rows on {rows.device}")


def teacher(value: Similarity | None, rows: Tensor, num_cols: int) -> None:
    """Check the teacher of a term; `row_losses` fills in the shared one before."""
    if value is None:
        raise ValueError("this term needs a teacher: give one to the term or to row_losses")
    similarity("teacher", value, rows, num_cols)


def ids(row_ids: Tensor | None, col_ids: Tensor | None, rows: Tensor, num_cols: int) -> None:
    """Check the image ids of rows and columns: both or neither, integer, one per row/column."""
    if row_ids is None and col_ids is None:
        return
    if row_ids is None or col_ids is None:
        raise ValueError("row_ids and col_ids go together; one of them is missing")
    wanted = (("row_ids", row_ids, rows.shape[0]), ("col_ids", col_ids, num_cols))
    for name, tensor, length in wanted:
        if tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
        same_device(name, tensor, rows)


def token_norm(norm: str) -> None:
    """Refuse an unknown normalization of token features."""
    if norm not in ("token", "axis"):
        raise ValueError(f"norm must be 'token' or 'axis', got {norm!r}")


def tokens(name: str, values: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Check token features ``[n, T, D]`` and their 0/1 mask ``[n, T]``."""
    if values.ndim != 3 or 0 in values.shape or values.shape[2] != rows.shape[1]:
        raise ValueError(
            f"{name} must be [n, T, {rows.shape[1]}] like the width of rows, not empty; "
            f"got {tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {values.dtype}")
    if mask.shape != values.shape[:2]:
        raise ValueError(
            f"the mask of {name} must be {tuple(values.shape[:2])}, got {tuple(mask.shape)}"
        )
    same_device(name, values, rows)
    same_device(f"the mask of {name}", mask, rows)
