"""One agreement a step: what the ranks of a real run say to each other, and what the host reads."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import tiny_config, write_config
from launching import Outcome, train
from torch.overrides import TorchFunctionMode

from dalr_scale.distributed.traffic import TrafficCounter
from dalr_scale.engines.ddp import DDPEngine
from dalr_scale.engines.deepspeed import DeepSpeedEngine
from dalr_scale.training.trainer import Trainer
from dalr_scale.training.upcoming import Upcoming

# What waits for a device until it has computed a tensor; `cpu` copies one.
READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu")
FIRST, LAST = 3, 5  # steps that are counted, from the start of one to the start of the next


class HostReads(TorchFunctionMode):
    """Counts the reads of tensors outside of the engine's own step and of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ in READS and not self.paused:
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_steps() -> None:
    """Writes what each counted step called to the file of this rank, `$COUNTS-RANK`."""
    modes: list[tuple[TrafficCounter, HostReads]] = []
    found: list[dict[str, Any]] = []
    plain = Trainer.train_step

    def close() -> None:
        traffic, reads = modes.pop()
        reads.__exit__(None, None, None)
        traffic.__exit__(None, None, None)
        calls = {f"{group} {operator}": n for (group, operator), n in traffic.calls.items()}
        found.append({"calls": calls, "reads": dict(reads.calls)})
        path = Path(f"{os.environ['COUNTS']}-{os.environ['RANK']}")
        path.write_text(json.dumps(found), encoding="utf-8")

    def train_step(self: Any, batch: Any) -> Any:
        if modes:
            close()
        if FIRST <= self.step + 1 <= LAST:
            modes.append((TrafficCounter(), HostReads()))
            for mode in modes[0]:
                mode.__enter__()
        return plain(self, batch)

    def without_counting(engine: type[Any], name: str) -> None:
        plain = getattr(engine, name)

        def uncounted(self: Any, *values: Any) -> Any:
            for _, reads in modes:
                reads.paused = True
            result = plain(self, *values)
            for _, reads in modes:
                reads.paused = False
            return result

        setattr(engine, name, uncounted)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    for engine in (DDPEngine, DeepSpeedEngine):
        without_counting(engine, "step")
        # transformers looks at the mask of every chunk: it leaves out one without padding
        without_counting(engine, "encode")


def ask_again() -> None:
    """A step that asks the ranks once more, and reads its loss."""
    count_steps()
    report = Trainer._report

    def ask(self: Any, *values: Any) -> None:
        self.world.all_max(0)
        float(torch.zeros(()))
        report(self, *values)

    Trainer._report = ask  # type: ignore[method-assign]


def run(data: Path, directory: Path, kind: str, setup: Callable[[], None]) -> Outcome:
    """A short run over text on two ranks."""
    changes = {
        "objective.preset": "simcse",
        "data.pairs": [],
        "engine.kind": kind,
        "optim.name": "sgd",
        "optim.steps": LAST + 2,
        "save.every_steps": 0,
        "log.every": 1,
        "eval.every": 0,
        "eval.graded_dev": "",
    }
    file = write_config(tiny_config(data, changes), directory / "run.toml")
    words = [f"--config={file}", f"--run.dir={directory / 'run'}"]
    environment = {"COUNTS": str(directory / "found")}
    return train(words, directory / "log", ranks=2, setup=setup, environment=environment)


def counted(
    data: Path, directory: Path, kind: str, setup: Callable[[], None]
) -> list[list[dict[str, Any]]]:
    """What each counted step called, on both ranks."""
    outcome = run(data, directory, kind, setup)
    assert outcome.codes == (0, 0), outcome.output
    return [json.loads((directory / f"found-{rank}").read_text()) for rank in (0, 1)]


# order of the rows, image numbers, z2 of the one chunk, and the vote; the gradient of z2 comes back
COLUMNS = {"columns _allgather_base_": 4, "columns _reduce_scatter_base_": 1}


def test_a_step_asks_its_ranks_once_and_reads_one_result(tiny_data: Path, tmp_path: Path) -> None:
    for ran in counted(tiny_data, tmp_path, "ddp", count_steps):
        assert len(ran) == LAST - FIRST + 1
        for step in ran:
            assert step["calls"] == COLUMNS | {"engine allreduce_": 1}  # the gradients
            assert step["reads"] == {"tolist": 1}  # the vote


def test_under_deepspeed_the_trainer_adds_nothing_of_its_own(
    tiny_data: Path, tmp_path: Path
) -> None:
    for ran in counted(tiny_data, tmp_path, "zero2", count_steps):
        for step in ran:
            assert {n: c for n, c in step["calls"].items() if n in COLUMNS} == COLUMNS
            assert step["reads"] == {"tolist": 1}


def test_control_another_question_and_another_read_are_seen(
    tiny_data: Path, tmp_path: Path
) -> None:
    for ran in counted(tiny_data, tmp_path, "ddp", ask_again):
        for step in ran:
            assert step["calls"]["engine allreduce_"] == 2
            assert step["reads"] == {"tolist": 2, "__float__": 1}  # all_max reads its own result


def test_a_loss_that_is_not_finite_stops_before_the_weights(
    tiny_data: Path, tmp_path: Path
) -> None:
    """The vote is read before the optimizer's step."""
    outcome = run(tiny_data, tmp_path, "ddp", lose_the_loss)
    assert outcome.codes == (1, 1), outcome.output
    assert "step 3: loss not finite" in outcome.output
    assert "the optimizer took step 2" in outcome.output
    assert "the optimizer took step 3" not in outcome.output


def lose_the_loss() -> None:
    """On one rank the loss of the third step is NaN."""
    plain, step = Trainer._send_vote, DDPEngine.step

    def send(self: Any, terms: dict[str, torch.Tensor]) -> None:
        lost = self.step == 2 and terms and self.world.rank == 1
        plain(self, terms | {"loss": terms["loss"] * float("nan")} if lost else terms)

    def own_step(self: Any, lr: float) -> Any:
        print(f"the optimizer took step {(self.steps or 0) + 1}", flush=True)
        return step(self, lr)

    Trainer._send_vote, DDPEngine.step = send, own_step  # type: ignore[method-assign]


def test_batches_that_do_not_fit_are_refused_by_both_ranks(tiny_data: Path, tmp_path: Path) -> None:
    """The vote of step 1 finds it out, and step 2 does not begin."""
    outcome = run(tiny_data, tmp_path, "ddp", change_a_batch)
    assert outcome.codes == (2, 2), outcome.output
    words = "the ranks hold different batches in step 2 (rank 0: kind text; rank 1: kind paired)"
    for rank in ("error", "error on rank 1"):
        assert f"{rank}: {words}" in outcome.output, outcome.output


def change_a_batch() -> None:
    """On one rank the second batch is of another kind."""
    plain = Upcoming.peek

    def peek(self: Any) -> Any:
        batch = plain(self)
        if batch is not None and batch.step == 1 and os.environ["RANK"] == "1":
            batch.kind = "pair"
        return batch

    Upcoming.peek = peek  # type: ignore[method-assign]
