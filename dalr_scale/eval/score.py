"""Scores of one encoder on STS tasks and on files of graded pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.errors import UserError
from dalr_scale.eval.graded import load_graded, score_graded, score_lexical
from dalr_scale.eval.sts import TASKS, percent, score_tasks
from dalr_scale.models.encoder import make_encode_fn

if TYPE_CHECKING:
    from torch import nn

DATA_VARIABLE = "DALR_DATA"


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and how sentences are encoded.

    Attributes:
        tasks: names from ``sts.TASKS``.
        graded: JSON-lines files of graded pairs.
        data: directory with STS/ and SICK/; None: $DALR_DATA.
        batch_size: sentences per forward pass.
        max_length: tokens kept of a sentence; None: all that fit.
        progress: show a progress bar.
    """

    tasks: Sequence[str]
    graded: Sequence[Path] = ()
    data: Path | None = None
    batch_size: int = 128
    max_length: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown tasks and impossible sizes.

        Raises:
            UserError: naming the setting.
        """
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: use at least 1")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise UserError(f"unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")


@dataclass(frozen=True)
class Score:
    """A score x 100, and the score x 100 of the word overlap alone where it is known."""

    value: float
    lexical: float | None = None


def score_encoder(encoder: nn.Module, request: ScoreRequest) -> dict[str, Score]:
    """Score an encoder in evaluation mode on all tasks of a request.

    Args:
        encoder: a `SentenceEncoder` on its device.
        request: tasks and options.

    Raises:
        UserError: a file is missing or damaged; all files are read before a sentence is encoded.
    """
    root = data_root(request.data) if request.tasks else Path()
    graded = [load_graded(path) for path in request.graded]
    encode = make_encode_fn(
        encoder,
        batch_size=request.batch_size,
        max_length=request.max_length,
        progress=request.progress,
    )
    table = score_tasks(encode, root, request.tasks) if request.tasks else {}
    scores = {name: Score(value) for name, value in table.items()}
    for task in graded:
        lexical = 100 * score_lexical(task)
        scores[task.name] = Score(percent(score_graded(encode, task)), lexical)
    return scores


def data_root(given: Path | None) -> Path:
    """Return the directory given, else $DALR_DATA; `load_sts` documents its layout.

    Raises:
        UserError: neither is set, or the directory does not exist.
    """
    root = given or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if root is None:
        raise UserError(f"name the directory with STS/ and SICK/ by --data or ${DATA_VARIABLE}")
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; --data names the one with STS/ and SICK/")
    return root
