"""One training session on one rank: from the start of its processes to the run's last record."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from dalr_scale.distributed.world import World, leave_world, start_world
from dalr_scale.errors import UserError
from dalr_scale.eval.suite import DirectoryEngine, EvaluationSuite
from dalr_scale.eval.unit import UNIT, in_percent, read_scores
from dalr_scale.run.failure import record_failure
from dalr_scale.run.files import JsonTable, write_durably
from dalr_scale.run.lock import lock_run_directory
from dalr_scale.run.status import read_status, start_status, write_status
from dalr_scale.training import report
from dalr_scale.training.metrics import RunLog, logging_to
from dalr_scale.training.preflight import check_settings
from dalr_scale.training.prepared import Prepared, prepare
from dalr_scale.training.run_directory import (
    is_finished,
    move_aside,
    refuse_other_run_on_all,
    starts_from_scratch,
)
from dalr_scale.training.stopping import StopFlag, StopReason
from dalr_scale.training.trainer import Trainer, write_outcome, write_run_files

if TYPE_CHECKING:
    from pathlib import Path

    from dalr_scale.config import Config
    from dalr_scale.engines.protocol import Engine

log = logging.getLogger(__name__)
MAX_STARTS_WITHOUT_PROGRESS = 3


def train(config: Config) -> int:
    """Runs one configuration on this rank of the world that the launcher started."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _check_alone(config)
    world = start_world(config.engine.timeout_minutes, config.engine.threads)
    # one write: the ranks share a terminal
    sys.stdout.write(f"rank {world.rank} of a world of {world.size} on {world.device}\n")
    sys.stdout.flush()
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(logging_to(config.run_dir, world.rank))
            try:
                return _train_in_world(config, world, held)
            except UserError as error:
                return _refuse(error, config, world)
            except Exception as error:
                # a rank that dies silently leaves the others waiting: leave at once, and say why
                record_failure(config.run_dir, world.rank, error)
                log.exception("rank %d failed", world.rank)
                if world.rank != 0:  # whose log goes to its file only
                    traceback.print_exc()
                _mark_failed(config, world)
                sys.stderr.flush()
                os._exit(1)
    finally:
        leave_world()


def _check_alone(config: Config) -> None:
    """Refuses wrong settings before a process group exists, each rank for itself."""
    try:
        check_settings(config, int(os.environ.get("WORLD_SIZE") or 1))
    except UserError as error:
        if "SLURM_JOB_ID" in os.environ:  # where the job script tells who failed first
            record_failure(config.run_dir, int(os.environ.get("RANK") or 0), error)
        raise


def _refuse(error: UserError, config: Config, world: World) -> int:
    """One clear sentence from every rank that met the error; the others must not wait for it."""
    who = "" if world.rank == 0 else f" on rank {world.rank}"
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    log.debug("refused: %s", error)
    record_failure(config.run_dir, world.rank, error)
    _mark_failed(config, world)
    if world.size > 1:
        os._exit(2)
    return 2


def _mark_failed(config: Config, world: World) -> None:
    """Marks the run as failed, if it is this process that the status file calls running."""
    status = read_status(config.run_dir) if world.rank == 0 else None
    if status and status.get("outcome") == "running" and status.get("pid") == os.getpid():
        reason = repr(sys.exc_info()[1])
        write_status(config.run_dir, "failed", step=int(status.get("step") or 0), reason=reason)


def _train_in_world(config: Config, world: World, held: contextlib.ExitStack) -> int:
    """`held` has what belongs to the run directory: the log, and from here on the lock."""
    started = time.monotonic()
    from_scratch = starts_from_scratch(config, world)
    if not from_scratch and is_finished(config, world):
        return 0
    held.enter_context(lock_run_directory(config.run_dir, world))
    # now, not after the minutes that preparing may take: a request made meanwhile counts
    StopFlag(config.run_dir).clear_stale(world)
    prepared = prepare(config, world)
    if from_scratch:  # only now that nothing is left to refuse
        move_aside(config, world, held)
    return _run(config, world, prepared, started)


def _run(config: Config, world: World, prepared: Prepared, started: float) -> int:

    streams, suite, engine = prepared.streams, prepared.suite, prepared.engine
    trainer = Trainer(config, world, streams, prepared.parts, engine, suite, prepared.fingerprint)
    resumed = trainer.resume()
    if not resumed and not config.run.allow_change:
        refuse_other_run_on_all(config, world, prepared.fingerprint)
    starts_without_progress = 0
    if world.rank == 0:
        write_run_files(config, prepared.ds_config, prepared.fingerprint)
        starts_without_progress = start_status(config.run_dir, trainer.step)
        log.info("resumed at step %d" if resumed else "starting at step %d", trainer.step)
    _stop_crash_loop(starts_without_progress, world, config.run_dir)
    limit = 60 * config.run.max_minutes
    with RunLog(
        config.run_dir,
        rank=world.rank,
        total_steps=streams.total_steps,
        start_step=trainer.step,
        every=config.log.every,
        tensorboard=config.log.tensorboard,
    ) as run_log:
        with StopFlag(config.run_dir, limit_seconds=limit or None) as stop:
            before = _score_before(config, world, suite, engine, trainer, run_log)
            reason = _fit(trainer, stop, run_log, world)
        after = _finish(config, world, trainer, run_log) if reason is None else None
    if after is not None and world.rank == 0:
        report.write_result(config, before, after, trainer, time.monotonic() - started)
        report.print_result(config.run_dir)
    write_outcome(config, world, reason, trainer)
    world.barrier()
    trainer.watchdog.disarm()
    if reason is not None and world.rank == 0:
        print(f"stopped at step {trainer.step} ({reason.text}); run the same command to continue")
    return 0


def _fit(trainer: Trainer, stop: StopFlag, run_log: RunLog, world: World) -> StopReason | None:
    """Trains; a rank that alone finds a bad row says so itself, the first one cannot know."""
    try:
        return trainer.fit(stop, run_log)
    except UserError as error:
        if world.rank != 0:
            print(f"error on rank {world.rank}: {error}", file=sys.stderr, flush=True)
        raise


def _score_before(
    config: Config, world: World, suite: EvaluationSuite, engine: Engine, trainer: Trainer,
    run_log: RunLog,
) -> JsonTable:  # fmt: skip
    """Scores x 100 of the untrained encoder and of word overlap.

    RUN/before.json keeps them for a resume.
    """
    path = config.run_dir / "before.json"
    if trainer.step:
        known = read_scores(path) if world.rank == 0 and path.exists() else {}
        return world.broadcast_object(known)
    # at step 0 a file from an earlier attempt may belong to other settings
    scores = suite.score_final(engine)
    lexical = in_percent(suite.lexical_baselines())
    record = {"unit": UNIT, "untrained": in_percent(scores), "lexical": lexical}
    if world.rank == 0:
        write_durably(path, (json.dumps(record, indent=1) + "\n").encode())
    run_log.scores(0, scores)
    return record


def _finish(config: Config, world: World, trainer: Trainer, run_log: RunLog) -> dict[str, float]:
    """Exports the last encoder, and scores it and the best one.

    Returns the scores of the best one; those of the last where nothing selects, and where only the
    last has the heads.
    """
    trainer.watchdog.arm(60 * config.run.watchdog_minutes, "final evaluation")
    final, best = config.run_dir / "final", config.run_dir / "best"
    trainer.export(final)
    scores = selected = trainer.suite.score_final(trainer.engine)
    if trainer.best_step not in (None, trainer.step):
        selected = trainer.suite.score_final(DirectoryEngine(best, world.device))
    run_log.final_scores(trainer.step, scores, selected, trainer.best_step)
    return scores | selected


def _stop_crash_loop(starts_without_progress: int, world: World, run_dir: Path) -> None:
    """Three starts that led to no new checkpoint: a fourth would not either."""
    if world.broadcast_object(starts_without_progress) >= MAX_STARTS_WITHOUT_PROGRESS:
        raise UserError(
            f"{run_dir} was started {MAX_STARTS_WITHOUT_PROGRESS} times without reaching a new "
            f"checkpoint; see {run_dir}/status.json and log/, then delete status.json to try again "
            "(without any checkpoint: --run.from_scratch=true)"
        )
