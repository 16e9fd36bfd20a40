"""DALR as a task of the global batch: two views of every sentence, and the objective over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalr_scale.data.stream.batch import Batch
from dalr_scale.global_batch import Chunk, Place, States, Task, Terms
from dalr_scale.models.dalr import DalrModel, teacher_columns
from dalr_scale.training.watch import state_statistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dalr_scale.models.row_dropout import RowKeys
    from dalr_scale.objective.term import Needs

VIEWS = ("first", "second")


class DalrTask(Task[Batch]):
    """The objective over batches whose frozen features are complete (``OnlineTeachers.batch``).

    Among the terms of the loss is what `dalr_scale.training.watch.state_statistics` finds in the
    states.

    Args:
        needs: which features travel.
        row_keys: keys of the student's row-keyed dropout, or None for torch's own dropout.
    """

    def __init__(self, needs: Needs, row_keys: RowKeys | None) -> None:
        self._needs, self._row_keys = needs, row_keys

    def count(self, batch: Batch) -> int:
        return batch.rows

    def take(self, batch: Batch, chunk: Chunk) -> Batch:
        return batch.take(chunk.rows, chunk.length)

    def seed(self, chunk: Chunk) -> None:
        """Replays, never saves: both passes over a chunk derive its masks from one key."""
        if self._row_keys is None:
            super().seed(chunk)
            return
        place = chunk.place
        rows = chunk.rows + place.first
        self._row_keys.set(place.seed, place.step, rows, views=len(VIEWS))

    def encode(self, module: DalrModel, part: Batch) -> States:
        """Both views of the rows in one forward, [n, H] each."""
        views = len(VIEWS)
        states = module.encode(
            part.input_ids.repeat(views, 1), part.attention_mask.repeat(views, 1)
        )
        return dict(zip(VIEWS, states.chunk(views), strict=True))

    def constants(self, batch: Batch) -> dict[str, Tensor]:
        return teacher_columns(batch, self._needs)

    def columns(self, module: DalrModel, states: States, part: Batch) -> dict[str, Tensor]:
        return module.columns(_views(states), part)

    def loss(
        self, module: DalrModel, states: States, gathered: Mapping[str, Tensor], batch: Batch,
        place: Place,
    ) -> tuple[Tensor, Terms]:  # fmt: skip
        total, terms = module.loss(
            _views(states), batch, place.step, place.first, gathered, place.global_rows
        )
        return total, terms | state_statistics(_views(states))

    def facts(self, batch: Batch) -> dict[str, str]:
        features = {f"text {k}": values for k, values in enumerate(batch.text)}
        features |= {
            name: batch.features[name] for name in ("image", "caption") if name in batch.features
        }
        shapes = {name: f"{tuple(v.shape)} {v.dtype}" for name, v in features.items()}
        kind = "paired" if batch.paired else "text"
        return {"kind": kind, "token teachers": str(len(batch.token_features))} | shapes


def _views(states: States) -> tuple[Tensor, Tensor]:
    return states[VIEWS[0]], states[VIEWS[1]]
