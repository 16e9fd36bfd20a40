"""The training loop: batches in, an exported encoder and its scores out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dalr_scale.config import Config
from dalr_scale.config.text import to_toml
from dalr_scale.data.stream.augment import Augment
from dalr_scale.data.stream.batch import Batch
from dalr_scale.data.stream.loader import LoaderOptions, Sources, make_loader
from dalr_scale.data.stream.order import ORDER_VERSION
from dalr_scale.distributed.world import World
from dalr_scale.engines.engine import Engine, StepResult
from dalr_scale.engines.restore import OtherParameters
from dalr_scale.errors import TrainingError, UserError
from dalr_scale.eval.suite import EvaluationSuite
from dalr_scale.eval.unit import in_percent
from dalr_scale.global_batch.step import StepInputs, backward_global_batch
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
from dalr_scale.training.build import ModelParts, Streams
from dalr_scale.training.fingerprint import check_fingerprint
from dalr_scale.training.metrics import RunLog
from dalr_scale.training.optim import learning_rate
from dalr_scale.training.stopping import StopFlag, StopReason, Watchdog
from dalr_scale.training.watch import SIGNS, Watch

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
        fingerprint: dict[str, Any],
    ) -> None:
        self.config, self.world, self.fingerprint = config, world, fingerprint
        self.streams, self.parts, self.engine, self.suite = streams, parts, engine, suite
        self.run_dir = config.run_dir
        self.total_steps = streams.total_steps
        self.step = 0
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.watchdog = Watchdog()
        self.watch = Watch(parts.model.encoder, speaks=world.rank == 0)
        self.save_errors = SaveErrors(config.save.on_error)
        self._last_save = time.monotonic()
        self._saved_step = -1
        self._skipped = 0

    # -- the loop ---------------------------------------------------------------------------

    def fit(self, stop: StopFlag, run_log: RunLog) -> StopReason | None:
        """Trains to the last step, or until all ranks agree to stop; returns why it stopped.

        On return the state of the last step is saved in a checkpoint.
        """
        reason = stop.agree(self.world)
        for batch, waited in self._batches(reason, run_log):
            self.streams.bad_rows.count(batch.bad, self.world)
            values, result = self.train_step(batch)
            self._report(run_log, batch, values, result, waited)
            reason = stop.agree(self.world)
            with run_log.paused():
                self._evaluate_if_due(run_log)
                self._save_if_due(reason, run_log)
            if reason is not None:
                break
        self.watch.finish(self.step)
        run_log.flush()
        self.save()
        self.watchdog.disarm()
        return reason

    def train_step(self, batch: Batch) -> tuple[dict[str, float], StepResult]:
        """One optimizer step from one global batch; returns loss and terms over all ranks."""
        self._arm("training step")
        self.watch.require_training_mode(self.engine.module, self.step + 1)
        batch = batch.to(self.world.device)
        inputs = self._step_inputs(batch)
        loss, terms = backward_global_batch(self.engine, inputs)
        self.watch.check_gradients(self.engine, batch.kind, self.step + 1)
        values = self._means({"loss": loss, **terms})
        self._require_finite(values, batch)
        found = {name: values.pop(name) for name in SIGNS}
        columns = self.streams.plan.batch_rows(batch.step)
        self.watch.check_means(values, found, columns=columns, step=self.step + 1)
        result = self.engine.step(learning_rate(self.config.optim, self.step, self.total_steps))
        self._require_sound(result)
        self.step += 1
        return values, result

    def _step_inputs(self, batch: Batch) -> StepInputs:
        objective = self.config.objective
        distil = batch.kind == "pair" or objective.distil_text_batches
        needs_text = self.parts.model.spec.needs.text
        teachers = self.parts.teachers.batch(batch, with_text=distil and needs_text)
        return StepInputs(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            teachers=teachers,
            step=self.step,
            rank=self.world.rank,
            seed=self.config.run.seed,
            micro_rows=self.config.batch.micro_size,
            row_keys=self.parts.model.encoder.row_keys,
            sort=self.config.batch.sort_by_length,
            global_rows=self.streams.plan.batch_rows(batch.step),
        )

    def _batches(self, reason: StopReason | None, run_log: RunLog) -> Iterator[tuple[Batch, float]]:
        """The batches from the current step on, each with the seconds it kept the rank waiting.

        Timing starts with the first one: the start of the workers is no wait for data.
        """
        if reason is not None or self.step >= self.total_steps:
            return
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
        self._arm("waiting for data")
        iterator = iter(loader)
        batch, waited = next(iterator, None), 0.0
        run_log.start_timing()
        while batch is not None:
            yield batch, waited
            started = time.monotonic()
            self._arm("waiting for data")
            batch = next(iterator, None)
            waited = time.monotonic() - started

    def _means(self, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        stacked = torch.stack([t.double() for t in tensors.values()]).tolist()
        return dict(zip(tensors, self.world.all_mean(stacked), strict=True))

    def _require_finite(self, values: dict[str, float], batch: Batch) -> None:
        """Every rank sees the same means, hence all of them stop here or none does."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"step {self.step + 1}: {', '.join(bad)} not finite ({batch.kind} batch, items "
                f"{batch.item_ids[:8].tolist()} ...); lower optim.lr or check the features"
            )

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

    def export(self, folder: Path, scores: dict[str, float] | None = None) -> None:
        """Writes the encoder as a folder for other tools; collective, rank 0 writes."""
        state = self.engine.full_state("encoder.")
        if self.world.rank == 0:
            encoder: Any = self.engine.module.encoder
            assert isinstance(encoder, SentenceEncoder)
            shown = in_percent(scores or {})
            encoder.save(folder, overwrite=True, state_dict=state, scores=shown)
        self.world.barrier()

    # -- checkpoints ------------------------------------------------------------------------

    def _save_if_due(self, reason: StopReason | None, run_log: RunLog) -> None:
        save = self.config.save
        by_steps = save.every_steps > 0 and self.step % save.every_steps == 0
        minutes = (time.monotonic() - self._last_save) / 60
        # ranks' clocks differ: they agree, or one of them would wait in the save for ever
        by_time = bool(self.world.all_max(int(0 < save.every_minutes <= minutes)))
        if reason is None and (by_steps or by_time):
            run_log.flush()
            self.save()

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
                "saved by %d ranks, going on with %d: the same batches in the same order; losses "
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

    def _arm(self, phase: str) -> None:
        self.watchdog.arm(60 * self.config.run.watchdog_minutes, phase)


def write_run_files(
    config: Config, ds_config: dict[str, Any] | None, fingerprint: dict[str, Any]
) -> None:
    """The resolved configuration and the fingerprint, next to everything that was made with them.

    Wishes of one start (``from_scratch``, ``allow_change``) are not written: ``--config RUN`` would
    repeat them.
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
