"""Terms without a fused form: row chunks of plain PyTorch, on every device."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import torch
from dalr_kernels import unit
from dalr_kernels.eager.chunked import default_workspace, rows_per_chunk, spans
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from dalr_scale.config import ObjectiveConfig
from dalr_scale.objective.term import RowTerm
from dalr_scale.objective.views import LossBatch

log = logging.getLogger(__name__)


def mean_over_row_chunks(term: RowTerm, objective: ObjectiveConfig, batch: LossBatch) -> Tensor:
    """The mean of a term over this rank's rows, some rows at a time.

    A chunk keeps nothing for the backward pass, which computes it a second time: memory is one
    chunk's and the gradients of rows and columns. With ``impl = "reference"`` all rows are one
    chunk that keeps everything.

    Returns:
        A differentiable scalar, float32 or float64.
    """
    _log_once(term.name)
    z1 = batch.rows.z1
    with torch.autocast(z1.device.type, enabled=False):
        if batch.options.get("impl") == "reference":
            return _rows_loss(term, objective, batch, 0, len(z1)).mean()
        losses: list[Tensor] = [
            checkpoint(
                _rows_loss, term, objective, batch, start, stop, use_reentrant=False,
                preserve_rng_state=False,
            )
            for start, stop in spans(len(z1), _chunk_rows(batch))
        ]  # fmt: skip
        return torch.cat(losses).mean()


def cosines(rows: Tensor, cols: Tensor) -> Tensor:
    """Cosines ``[r, N]`` of rows ``[r, D]`` and columns ``[N, D]``, in float32 or float64."""
    dtype = _compute_dtype(rows, cols)
    return unit(rows.to(dtype)) @ unit(cols.to(dtype)).T


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunk_rows(batch: LossBatch) -> int:
    wished = batch.options.get("chunk_rows")
    if wished is not None:
        return wished
    z1, z2 = batch.rows.z1, batch.cols.z2
    workspace = batch.options.get("workspace_bytes") or default_workspace(z1.device)
    return rows_per_chunk(z1, len(z2), _compute_dtype(z1, z2), workspace)


def _rows_loss(
    term: RowTerm, objective: ObjectiveConfig, batch: LossBatch, start: int, stop: int
) -> Tensor:
    part = replace(batch, rows=batch.rows.part(start, stop), offset=batch.offset + start)
    losses = term.rows_loss(objective, part)
    if losses.shape != (stop - start,):
        raise ValueError(
            f"rows_loss of term '{term.name}' must give one loss per row, [{stop - start}], "
            f"got {tuple(losses.shape)}"
        )
    return losses


@functools.cache
def _log_once(name: str) -> None:
    log.info("term %s has no fused form: it runs in row chunks of plain PyTorch", name)
