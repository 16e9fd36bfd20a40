"""Whole runs of the public command, in forked ranks, and what they leave behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import records, write_config
from launching import Outcome, train
from torch import Tensor

if TYPE_CHECKING:
    from dalr_scale.config import Config


@dataclass(frozen=True)
class Stop:
    """An end before the last step: after `step` steps, by STOP, SIGTERM or SIGKILL.

    ranks: number of processes that go on.
    """

    step: int
    how: str
    ranks: int


@dataclass(frozen=True)
class Run:
    """The train records of a run by step, its final weights, and how its processes ended."""

    steps: list[dict[str, Any]]
    weights: dict[str, Tensor]
    outcomes: list[Outcome]


class RunFailed(Exception):
    """A process of the run ended as it must not; the message is the end of what it printed."""

    def __init__(self, outcome: Outcome) -> None:
        self.codes = outcome.codes
        super().__init__(f"exit codes {outcome.codes}: {outcome.output[-3000:]}")


@dataclass(frozen=True)
class Prelude:
    """What every rank does before the command: leaves out the printed estimate, keeps weights.

    fault: a sabotage of the run, for negative controls.
    """

    weights: str
    fault: Callable[[], None] | None = None

    def __call__(self) -> None:
        from dalr_scale.training import report
        from dalr_scale.training.trainer import Trainer

        report.needs = lambda *_: ""  # traces a whole loss; costs more than the run
        export = Trainer.export

        def keep(trainer: Any, directory: Path, *rest: Any, **more: Any) -> None:
            export(trainer, directory, *rest, **more)
            if directory.name == "final":
                save_weights(trainer, self.weights)

        Trainer.export = keep  # type: ignore[method-assign]
        if self.fault is not None:
            self.fault()


def save_weights(trainer: Any, path: str) -> None:
    """All trainable weights in the precision they are kept in; collective."""
    engine = trainer.engine
    state = engine.module.state_dict() if trainer.config.engine.kind == "ddp" else None
    if state is None:
        state = engine.full_state("")
    if trainer.world.rank == 0:
        torch.save(state, path)


def run(
    config: Config,
    directory: Path,
    ranks: int,
    stops: Sequence[Stop] = (),
    fault: Callable[[], None] | None = None,
) -> Run:
    """Trains `config` in directory/run, through every stop in turn, to its end.

    Raises:
        RunFailed: a process ended in another way than it was made to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run_section = dataclasses.replace(config.run, dir=str(directory / "run"))
    config = dataclasses.replace(config, run=run_section)
    words = ["--config", str(write_config(config, directory / "config.toml"))]
    prelude = Prelude(str(directory / "weights.pt"), fault)
    outcomes = []
    for number, stop in enumerate([*stops, None]):
        log = directory / f"{number}.log"
        end_at = None if stop is None else (stop.step, stop.how)
        outcome = train(words, log, ranks=ranks, end_at=end_at, setup=prelude)
        outcomes.append(outcome)
        killed = stop is not None and stop.how == "SIGKILL"
        # a rank whose neighbour was killed first may report the lost connection
        if any(outcome.codes) and not killed:
            raise RunFailed(outcome)
        ranks = ranks if stop is None else stop.ranks
    weights = torch.load(directory / "weights.pt", weights_only=True)
    return Run(records(directory / "run"), weights, outcomes)
