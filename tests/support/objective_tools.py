"""Random inputs of the objective, and all its terms at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalr_scale.config import ObjectiveConfig, build_config
from dalr_scale.objective.cons import unmatched_rows
from dalr_scale.objective.total import batch_loss
from dalr_scale.objective.views import LossBatch, Views

if TYPE_CHECKING:
    import numpy as np

ROWS, WIDTH = 10, 12


def objective(preset: str = "dalr", **changes: Any) -> ObjectiveConfig:
    return build_config([{"objective": {"preset": preset, **changes}}]).objective


def views(rows: int = ROWS) -> Views:
    """Rows and columns of one process, every field present, in float64."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z1 = normal(rows, WIDTH)
    return Views(
        z1=z1,
        z2=z1 + 0.7 * normal(rows, WIDTH),
        ids=torch.arange(rows) // 2,
        p1=normal(rows, 7),
        p2=normal(rows, 7),
        u=normal(rows, 7),
        u_caption=normal(rows, 7),
        z1_image=z1,
        aligned_text=normal(rows, 5).relu(),
        aligned_image=normal(rows, 5).relu(),
        image=normal(rows, WIDTH),
        caption=normal(rows, WIDTH),
        text=[normal(rows, 6), 3 * normal(rows, 6)],
        tokens=[normal(rows, 4, WIDTH)],
        token_masks=[(torch.arange(4) < torch.arange(rows)[:, None] % 4 + 1).double()],
        z1_tokens=[z1],
    )


def with_unmatched(v: Views, unmatched: np.ndarray) -> Views:
    """The aligned images of the rows that L_cons pairs rows with, as the model computes them."""
    assert v.aligned_image is not None
    return dataclasses.replace(v, aligned_unmatched=v.aligned_image[torch.as_tensor(unmatched)])


def terms_and_total(
    own: Views,
    cols: Views,
    spec: ObjectiveConfig,
    weights: tuple[float, float],
    offset: int,
    unmatched: np.ndarray,
) -> tuple[dict[str, Tensor], Tensor]:
    """Every term of a paired batch, and the total."""
    batch = LossBatch(own, cols, offset, text_weights=weights, unmatched=unmatched)
    found = batch_loss(spec, batch)
    return found.terms, found.total


def all_terms(spec: ObjectiveConfig, v: Views | None = None) -> dict[str, Tensor]:
    return all_terms_and_total(spec, v)[0]


def all_terms_and_total(
    spec: ObjectiveConfig, v: Views | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    v = v or views()
    unmatched = unmatched_rows(spec, len(v.ids), seed=1, step=4)
    v = with_unmatched(v, unmatched)
    return terms_and_total(v, v, spec, (0.33, 0.67), 0, unmatched)
