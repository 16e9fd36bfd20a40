"""The training loop: batches in, an exported encoder and its scores out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from dalr_scale.config.text import to_toml
from dalr_scale.data.stream.augment import Augment
from dalr_scale.data.stream.loader import LoaderOptions, make_loader
from dalr_scale.data.stream.order import ORDER_VERSION
from dalr_scale.data.stream.source import Sources
from dalr_scale.engines.restore import OtherParameters
from dalr_scale.errors import TrainingError, UserError
from dalr_scale.eval.unit import in_percent
from dalr_scale.global_batch import GlobalBatchStep
from dalr_scale.global_batch.agreement import refuse
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.run.checkpoint import (
    Checkpoint,
    SaveErrors,
    find_checkpoint,
    save_checkpoint,
)
from dalr_scale.run.files import write_durably
from dalr_scale.run.state import RunState, StreamState
from dalr_scale.run.status import write_status
from dalr_scale.training.agreement import Agreement, StepVote
from dalr_scale.training.fingerprint import Fingerprint, check_fingerprint
from dalr_scale.training.optim import learning_rate
from dalr_scale.training.stopping import StopFlag, StopReason, Watchdog
from dalr_scale.training.task import DalrTask
from dalr_scale.training.upcoming import Upcoming
from dalr_scale.training.watch import STATE_STATISTICS, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from dalr_scale.config import Config
    from dalr_scale.data.stream.batch import Batch
    from dalr_scale.distributed.world import World
    from dalr_scale.engines.ds_config import DeepSpeedSettings
    from dalr_scale.engines.protocol import Engine, StepResult
    from dalr_scale.eval.suite import EvaluationSuite
    from dalr_scale.training.build import ModelParts, Streams
    from dalr_scale.training.metrics import RunLog

log = logging.getLogger(__name__)

MAX_SKIPPED = 3


class Trainer:
    """One run on one rank. `fit` is the loop; everything else serves it."""

    def __init__(
        self,
        config: Config,
        world: World,
        streams: Streams,
        parts: ModelParts,
        engine: Engine,
        suite: EvaluationSuite,
        fingerprint: Fingerprint,
    ) -> None:
        self.config, self.world, self.fingerprint = config, world, fingerprint
        self.streams, self.parts, self.engine, self.suite = streams, parts, engine, suite
        self.global_step = GlobalBatchStep(
            engine,
            DalrTask(parts.model.spec.needs, parts.model.encoder.row_keys),
            chunk_rows=config.batch.micro_size,
            seed=config.run.seed,
            sort=config.batch.sort_by_length,
        )
        self.run_dir = config.run_dir
        self.total_steps = streams.total_steps
        self.step = 0
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.watchdog = Watchdog()
        self.watch = Watch(parts.model.encoder, prints_warnings=world.rank == 0)
        self.save_errors = SaveErrors(config.save.on_error)
        self._last_save = time.monotonic()
        self._saved_step = -1
        self._skipped = 0
        self._stop: StopFlag
        self._upcoming: Upcoming
        self._vote: StepVote
        self._agreed: Agreement

    # -- the loop ---------------------------------------------------------------------------

    def fit(self, stop: StopFlag, run_log: RunLog) -> StopReason | None:
        """Trains to the last step, or until all ranks agree to stop; returns why it stopped.

        On return the state of the last step is saved in a checkpoint.
        """
        reason = stop.agree(self.world)
        if reason is None and self.step < self.total_steps:
            reason = self._train(stop, run_log)
        self.watch.finish(self.step)
        run_log.flush()
        self.save()
        self.watchdog.disarm()
        return reason

    def _train(self, stop: StopFlag, run_log: RunLog) -> StopReason | None:
        """One step after the other, until the ranks agree to stop or the data end."""
        self._stop, self._upcoming = stop, Upcoming(self._batches(), self._arm_for_data)
        self._upcoming.start()
        run_log.start_timing()
        self._send_vote({})
        self._agreed = self._vote.result()
        while self._agreed.reason is None and (taken := self._upcoming.take()) is not None:
            batch, waited = taken
            self._admit(batch)
            values, result = self.train_step(batch)
            self._report(run_log, batch, values, result, waited)
            with run_log.paused():
                self._evaluate_if_due(run_log)
                self._save_if_due(run_log)
        return self._agreed.reason

    def _admit(self, batch: Batch) -> None:
        """Counts bad rows, and refuses a batch that does not fit those of the other ranks.

        The vote of the step before has told all ranks whether there is anything to say.
        """
        if self._agreed.bad_rows:
            self.streams.bad_rows.count(batch.bad, self.world)
        if not self._agreed.alike:
            refuse(self._facts(batch), self.step)

    def train_step(self, batch: Batch) -> tuple[dict[str, float], StepResult]:
        """One optimizer step from one global batch; returns loss and terms over all ranks."""
        self._arm("training step")
        self.watch.require_training_mode(self.engine.module, self.step + 1)
        self._backward(batch)
        self.watch.check_gradients(self.engine, batch.kind, self.step + 1)
        self._agreed = self._vote.result()
        values = self._require_finite(self._agreed.means, batch)
        found = {name: values.pop(name) for name in STATE_STATISTICS}
        columns = self.streams.plan.batch_rows(batch.step)
        self.watch.check_means(values, found, columns=columns, step=self.step + 1)
        result = self.engine.step(learning_rate(self.config.optim, self.step, self.total_steps))
        self._require_sound(result)
        self.step += 1
        return values, result

    def _backward(self, batch: Batch) -> None:
        """Leaves the gradient on the engine, and sends the vote as soon as the loss is known."""
        self.global_step.backward(
            self._completed(batch),
            step=self.step,
            global_rows=self.streams.plan.batch_rows(batch.step),
            lengths=batch.attention_mask.sum(1),  # on the CPU, where no device is waited for
            agreed=True,
            after_loss=lambda loss, terms: self._send_vote({"loss": loss, **terms}),
        )

    def _send_vote(self, terms: dict[str, torch.Tensor]) -> None:
        """Tells the other ranks what they need for this step and for the next one."""
        upcoming = self._upcoming.peek()
        self._vote = StepVote(
            self.engine,
            terms,
            upcoming,
            {} if upcoming is None else self._facts(upcoming),
            self._stop,
            rank=self.world.rank,
            save=self._minutes_are_over(),
        )
        self._arm("training step")

    def _facts(self, batch: Batch) -> dict[str, str]:
        rows = self.streams.plan.batch_rows(batch.step)
        return self.global_step.facts(batch, self.global_step.place(batch, batch.step, rows))

    def _completed(self, batch: Batch) -> Batch:
        """The batch on the device, with the features of the online teachers."""
        distil = batch.paired or self.config.objective.distil_text_batches
        with_text = distil and self.parts.model.spec.needs.text
        return self.parts.teachers.batch(batch.to(self.world.device), with_text=with_text)

    def _batches(self) -> Iterator[Batch]:
        """The batches of this rank from the current step on."""
        options = LoaderOptions(
            total_steps=self.total_steps,
            max_length=self.config.data.max_length,
            num_workers=self.config.data.workers,
            start_step=self.step,
            rank=self.world.rank,
            world_size=self.world.size,
            image_transform=getattr(self.parts.teachers.image, "transform", None),
            augment=Augment(self.config.data.crop_area, self.config.data.flip),
            with_text=self.parts.teachers.read_sentences,
            pin_memory=self.world.device.type == "cuda",
        )
        sources = Sources(self.streams.text, self.streams.pairs)
        loader = make_loader(self.streams.plan, sources, self.parts.tokenizer, options)
        return iter(loader)

    def _require_finite(self, values: dict[str, float], batch: Batch) -> dict[str, float]:
        """Every rank sees the same means, hence all of them stop here or none does."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"step {self.step + 1}: {', '.join(bad)} not finite ({batch.kind} batch, items "
                f"{batch.item_ids[:8].tolist()} ...); lower optim.lr or check the features"
            )
        return dict(values)

    def _require_sound(self, result: StepResult) -> None:
        """Skipped steps are counted; weights that took a gradient that is not finite are lost."""
        self._skipped = 0 if result.applied else self._skipped + 1
        if result.applied and not math.isfinite(result.grad_norm_preclip):
            raise TrainingError(
                f"step {self.step + 1}: gradient norm {result.grad_norm_preclip} reached the "
                "weights; lower optim.lr and start again from the last checkpoint"
            )
        if self._skipped >= MAX_SKIPPED:
            raise TrainingError(
                f"step {self.step + 1}: gradients not finite {MAX_SKIPPED} times in a row; lower "
                "optim.lr or check the features"
            )

    def _report(
        self,
        run_log: RunLog,
        batch: Batch,
        values: dict[str, float],
        result: StepResult,
        waited: float,
    ) -> None:
        if not result.applied:
            log.warning("step %d was skipped by the engine: gradients not finite", self.step)
        lr = learning_rate(self.config.optim, self.step - 1, self.total_steps)
        ids = self.streams.plan.batch_ids(self.step - 1)
        run_log.step(
            self.step,
            values | {"lr": lr, "grad_norm": result.grad_norm_preclip},
            samples=len(ids),
            data_seconds=waited,
            tags={"stream": batch.kind, "ids": hashlib.sha256(ids.tobytes()).hexdigest()[:16]},
        )

    # -- evaluation -------------------------------------------------------------------------

    def _evaluate_if_due(self, run_log: RunLog) -> None:
        every = self.config.eval.every
        last = self.step >= self.total_steps
        if self.suite.tasks and every and (self.step % every == 0 or last):
            self.evaluate(run_log)

    def evaluate(self, run_log: RunLog) -> None:
        """Scores the encoder on the development tasks and keeps the strictly best one."""
        self._arm("evaluation")
        scores = self.suite.score_dev(self.engine)
        run_log.scores(self.step, scores)
        # hosts may differ in a score's last bit, and the export is a collective: rank 0 decides
        score = self.world.broadcast_object(scores[self.suite.select])
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step = score, self.step
            self.export(self.run_dir / "best", scores)

    def export(self, directory: Path, scores: dict[str, float] | None = None) -> None:
        """Writes the encoder as a directory for other tools; collective, rank 0 writes."""
        state = self.engine.full_state("encoder.")
        if self.world.rank == 0:
            encoder: Any = self.engine.module.encoder
            assert isinstance(encoder, SentenceEncoder)
            shown = in_percent(scores or {})
            encoder.save(directory, overwrite=True, state_dict=state, scores=shown)
        self.world.barrier()

    # -- checkpoints ------------------------------------------------------------------------

    def _save_if_due(self, run_log: RunLog) -> None:
        every = self.config.save.every_steps
        by_steps = every > 0 and self.step % every == 0
        if self._agreed.reason is None and (by_steps or self._agreed.save):
            run_log.flush()
            self.save()

    def _minutes_are_over(self) -> bool:
        """Whether this rank would save by its clock; clocks differ, so one vote decides for all."""
        minutes = (time.monotonic() - self._last_save) / 60
        return 0 < self.config.save.every_minutes <= minutes

    def save(self) -> None:
        """Commits a checkpoint of the current step; collective."""
        if self._saved_step == self.step:
            return
        self._arm("saving")
        saved = save_checkpoint(
            self.run_dir,
            self.step,
            self.world,
            self.engine.save,
            self._state(),
            fingerprint=self.fingerprint,
            keep=self.config.save.keep,
            on_error=self.save_errors,
        )
        self._last_save = time.monotonic()
        if saved is not None:
            self._saved_step = self.step

    def resume(self) -> bool:
        """Continues from the newest valid checkpoint, if the run has one."""
        checkpoint = find_checkpoint(self.run_dir, self.world)
        if checkpoint is None:
            return False
        changed = self._check_continuable(checkpoint)
        self._arm("loading")
        try:
            self.engine.load(checkpoint.path, checkpoint.manifest.world_size)
        except OtherParameters as error:
            raise UserError(f"{error}; changed since: {'; '.join(changed) or 'nothing'}") from error
        state = checkpoint.state
        self._require_same_step(checkpoint)
        self.step, self._saved_step = state.step, state.step
        self.best_score, self.best_step = state.best_score, state.best_step
        self.streams.bad_rows.restore(state.bad_items)
        return True

    def _require_same_step(self, checkpoint: Checkpoint) -> None:
        """The weights must be those of the step that the checkpoint's record names."""
        taken = self.engine.steps
        if taken is not None and taken != checkpoint.state.step:
            raise UserError(
                f"{checkpoint.path} is recorded as step {checkpoint.state.step}, but its engine "
                f"state has taken {taken} steps: files of two checkpoints are mixed; remove it to "
                "continue from an older one"
            )

    def _check_continuable(self, checkpoint: Checkpoint) -> list[str]:
        """What was changed and may be; raises for everything else."""
        changed = check_fingerprint(
            checkpoint.fingerprint, self.fingerprint, allow_change=self.config.run.allow_change
        )
        for line in changed:
            log.warning("continuing although %s", line)
        if checkpoint.state.tail_rule != self.streams.plan.tail:
            raise UserError(
                f"{checkpoint.path} was written with objective.tail={checkpoint.state.tail_rule}, "
                f"this run has {self.streams.plan.tail}, which is another order of batches: set "
                f"--objective.tail={checkpoint.state.tail_rule} --run.allow_change=true, or start "
                "a new run"
            )
        saved = checkpoint.manifest.world_size
        if saved != self.world.size and self.world.rank == 0:
            keyed = self.config.batch.dropout_keys == "row"
            log.warning(
                "saved by %d ranks, continuing with %d: the same batches in the same order; losses "
                "to rounding%s",
                saved,
                self.world.size,
                "" if keyed else ", dropout masks are others",
            )
        return changed

    def _state(self) -> RunState:
        plan = self.streams.plan
        positions = plan.sources_before(self.step)
        streams = {name: StreamState(*position) for name, position in positions.items()}
        return RunState(
            order_version=ORDER_VERSION,
            seed=self.config.run.seed,
            step=self.step,
            streams=streams,
            global_batch=self.config.batch.global_size,
            tail_rule=self.streams.plan.tail,
            dataset_fingerprint=self.streams.fingerprint,
            best_score=self.best_score,
            best_step=self.best_step,
            bad_items=self.streams.bad_rows.state(),
        )

    def _arm_for_data(self) -> None:
        self._arm("waiting for data")

    def _arm(self, phase: str) -> None:
        self.watchdog.arm(60 * self.config.run.watchdog_minutes, phase)


def write_run_files(
    config: Config, ds_config: DeepSpeedSettings | None, fingerprint: Fingerprint
) -> None:
    """The resolved configuration and the fingerprint, next to everything that was made with them.

    Options of one start (``from_scratch``, ``allow_change``) are not written: ``--config RUN``
    would repeat them.
    """
    run = dataclasses.replace(config.run, from_scratch=False, allow_change=False)
    config = dataclasses.replace(config, run=run)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(fingerprint, indent=1) + "\n"
    write_durably(config.run_dir / "fingerprint.json", text.encode())
    write_durably(config.run_dir / "config.toml", to_toml(config).encode())
    if ds_config is not None:
        text = json.dumps(ds_config, indent=2) + "\n"
        (config.run_dir / "ds_config.json").write_text(text, encoding="utf-8")


def write_outcome(
    config: Config, world: World, reason: StopReason | None, trainer: Trainer
) -> None:
    """Records how the run ended; the launcher's exit code cannot be trusted with it."""
    if world.rank == 0:
        outcome = "finished" if reason is None else reason.outcome
        text = reason.text if reason is not None else ""
        # the checkpoint is the one that the last successful save has recorded
        write_status(config.run_dir, outcome, step=trainer.step, reason=text)
