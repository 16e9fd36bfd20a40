"""What must hold in every training step, and is not visible in the loss.

Each check reads what the step has computed anyway. Where the result would certainly be wrong the
run stops; where it probably is, one warning says so.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dalr_scale.errors import TrainingError
from dalr_scale.models.row_dropout import RowDropout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dalr_scale.data.stream.order import Kind

log = logging.getLogger(__name__)

# Steps before the contrastive loss may be judged, and the steps that the judgement averages over.
MIN_STEPS, WINDOW = 100, 20
# Below this share of ln N, the loss of a uniform guess, the contrastive loss has moved.
NEAR_CHANCE = 0.98
# A loss that was below this share of ln N has learned something that it can lose.
LEARNED = 0.9
# Mean cosine of different sentences above which they are one vector for every purpose.
COLLAPSED = 0.999
# Names of what `state_statistics` returns.
STATE_STATISTICS = ("view_gap", "neighbor_cosine")
# Dropout at least this strong cannot leave a whole batch unchanged by chance.
REAL_DROPOUT = 0.01


class _Engine(Protocol):
    @property
    def module(self) -> nn.Module: ...

    def unused_gradients(self) -> dict[str, float]: ...


@torch.no_grad()
def state_statistics(states: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """What the sentence states [b, H] of two views show, as scalars on their device.

    ``view_gap`` is the largest absolute difference between the views, ``neighbor_cosine`` the mean
    cosine of each sentence with the next row's (0 for a single row, which has no neighbor).
    """
    first, second = states[0].float(), states[1].float()
    near = torch.nn.functional.cosine_similarity(first, first.roll(1, 0), dim=-1).mean()
    near = near if len(first) > 1 else torch.zeros_like(near)
    return {"view_gap": (first - second).abs().max(), "neighbor_cosine": near}


def strongest_dropout(module: nn.Module) -> float:
    """Largest dropout probability in a module, attention's own included."""
    places = (m for m in module.modules() if isinstance(m, nn.Dropout | RowDropout))
    probabilities = [float(m.p) for m in places]
    config = getattr(getattr(module, "backbone", None), "config", None)
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        value = getattr(config, name, None)
        probabilities += [float(value)] if isinstance(value, int | float) else []
    return max(probabilities, default=0.0)


class Watch:
    """Checks each step of a run; the same on every rank, since all of them see the same means.

    Args:
        encoder: the sentence encoder, for the dropout that it is configured with.
        speaks: whether this rank prints warnings.
    """

    def __init__(self, encoder: nn.Module, *, prints_warnings: bool) -> None:
        self._dropout = strongest_dropout(encoder)
        self._prints_warnings = prints_warnings
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._seen = 0
        self._lowest = (math.inf, 0)  # contrastive loss over ln N, and its step
        self._said: set[str] = set()
        self._kinds: set[Kind] = set()
        self._gradients_checked = False

    def require_training_mode(self, module: nn.Module, step: int) -> None:
        """Refuses to train while a part of the model is in evaluation mode, without dropout."""
        for name, part in module.named_modules():
            if not part.training:
                raise TrainingError(
                    f"step {step}: {name or 'the model'} is in evaluation mode, in which dropout "
                    "and activation checkpointing are off; this is a fault of the program"
                )

    def check_gradients(self, engine: _Engine, kind: Kind, step: int) -> None:
        """Looks once, at the first step in which the terms have changed: no old gradient is left.

        Parameters that no term of this step reaches must get a gradient of exactly zero. A
        collective call, between the backward pass and the optimizer's step.
        """
        changed = bool(self._kinds - {kind})
        self._kinds.add(kind)
        if not changed or self._gradients_checked:
            return
        stale = {name: size for name, size in engine.unused_gradients().items() if size != 0.0}
        # where the terms of this kind reach every parameter, the other kind is looked at instead
        self._gradients_checked = kind == "text"
        if stale:
            name, size = max(stale.items(), key=lambda item: item[1])
            raise TrainingError(
                f"step {step}: no term of this {kind} batch reaches {name}, yet the optimizer "
                f"holds a gradient of {size:.3g} for it from an earlier step; this DeepSpeed "
                "version cannot be used with batches that alternate"
            )

    def check_means(
        self, values: Mapping[str, float], found: Mapping[str, float], *, columns: int, step: int
    ) -> None:
        """Judges the means over all ranks.

        Args:
            values: the loss and its terms.
            found: means of `state_statistics`.
            columns: rows of the global batch.
            step: number of the step, from 1.

        Raises:
            TrainingError: both views of every sentence are equal although dropout is configured.
        """
        if found["view_gap"] == 0.0:
            if self._dropout >= REAL_DROPOUT:
                raise TrainingError(
                    f"step {step}: both views of every sentence are equal, although the encoder "
                    f"has dropout {self._dropout:g}: it is not applied; this is a fault of the "
                    "program"
                )
            self._warn(
                "views",
                "both views of every sentence are equal: the encoder has no dropout, so the "
                "positives of the contrastive loss teach nothing; set hidden_dropout_prob "
                "(0.1 is usual) in model.architecture or in the encoder's config.json",
            )
        self._seen += 1
        self._recent.append((values["con"], math.log(columns), found["neighbor_cosine"]))
        self._lowest = min(self._lowest, (values["con"] / max(math.log(columns), 1e-9), step))
        lost = self._lowest[0] < LEARNED and len(self._recent) == WINDOW
        if lost or self._seen >= MIN_STEPS:
            self._judge_learning(step)

    def finish(self, step: int) -> None:
        """Checks a run that was too short to be checked before."""
        if len(self._recent) == WINDOW:
            self._judge_learning(step)

    def _judge_learning(self, step: int) -> None:
        loss, chance, cosine = (sum(c) / len(self._recent) for c in zip(*self._recent, strict=True))
        advice = "try a higher optim.lr, more steps, or --model.pooler=mean"
        known = "has not left"
        share, best = self._lowest
        if share < LEARNED:
            known = f"was {share * chance:.3f} at step {best} and is back at"
            advice = "training has diverged: lower optim.lr, add optim.warmup, or set optim.clip"
        if cosine > COLLAPSED:
            self._warn(
                "collapse",
                f"step {step}: all sentences get nearly the same vector (mean cosine of different "
                f"sentences {cosine:.4f}; the contrastive loss {loss:.3f} {known} ln N = "
                f"{chance:.3f}); {advice}",
            )
        elif chance > 0 and loss >= NEAR_CHANCE * chance:
            self._warn(
                "chance",
                f"step {step}: the contrastive loss {loss:.3f} {known} ln N = {chance:.3f}, what "
                f"guessing gives: the encoder does not tell the sentences of a batch apart; "
                f"{advice}",
            )

    def _warn(self, name: str, message: str) -> None:
        if name not in self._said and self._prints_warnings:
            log.warning("%s", message)
        self._said.add(name)
