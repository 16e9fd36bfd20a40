"""What the ranks of a run agree on in every step, by one vote that runs beside the step.

The vote of a step is sent when its loss is known. It carries the means of this step, what the next
batch looks like on each rank, and whether to stop or to save after this step. It is read before the
optimizer's step, so that a loss that is not finite never reaches the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalr_scale.global_batch.agreement import facts_key
from dalr_scale.global_batch.vote import Vote
from dalr_scale.training.stopping import StopFlag, StopReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dalr_scale.data.stream.batch import Batch
    from dalr_scale.engines.protocol import Engine

_NO_BATCH = -1  # the key of a rank whose data end, or cannot be read


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a vote, the same on each of them.

    Attributes:
        means: the loss and its terms over all ranks.
        reason: why to stop after this step, or None.
        save: whether it is time to save.
        bad_rows: whether some rank's next batch has rows that could not be used.
        alike: whether the ranks' next batches fit together.
    """

    means: dict[str, float]
    reason: StopReason | None
    save: bool
    bad_rows: bool
    alike: bool


class StepVote:
    """The vote of one step; constructing it sends this rank's part.

    Args:
        terms: the loss and its terms on this rank.
        upcoming: this rank's next batch as the loader gave it, or None.
        facts: what must be the same of it on all ranks.
        stop: this rank's reasons to stop; rank 0 alone looks at the file.
        save: whether this rank's clock says that it is time to save.
    """

    def __init__(
        self,
        engine: Engine,
        terms: Mapping[str, Tensor],
        upcoming: Batch | None,
        facts: Mapping[str, str],
        stop: StopFlag,
        *,
        rank: int,
        save: bool,
    ) -> None:
        self._stop = stop
        integers = {
            "key": _NO_BATCH if upcoming is None else facts_key(facts),
            "bad": len(upcoming.bad) if upcoming is not None else 0,
            "stop": int(stop.poll(read_file=rank == 0) or 0),
            "save": int(save),
        }
        self._vote = Vote(terms, integers, engine.device, alone=engine.gathers_weights)

    def result(self) -> Agreement:
        """Waits for the other ranks."""
        found = self._vote.result()
        keys = set(found.integers["key"]) - {_NO_BATCH}
        return Agreement(
            means=found.means,
            reason=self._stop.settle(found.largest("stop")),
            save=bool(found.largest("save")),
            bad_rows=bool(found.largest("bad")),
            alike=len(keys) <= 1,
        )
