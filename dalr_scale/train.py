"""``accelerate launch -m dalr_scale.train [--config RECIPE|FILE|RUN] [--section.key=value ...]``

Trains a sentence encoder with DALR on however many processes were started, one included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalr_scale.config import Config, load_config
from dalr_scale.config.text import settings_help
from dalr_scale.errors import UserError
from dalr_scale.process import end_process, run_command, set_passive_omp_wait
from dalr_scale.run.failure import record_failure

log = logging.getLogger("dalr_scale.train")  # not "__main__"
MAX_FRUITLESS_STARTS = 3


def main(argv: Sequence[str] | None = None) -> int:
    return train(configuration(argv))


def configuration(argv: Sequence[str] | None = None) -> Config:
    """The configuration that the command's arguments describe."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m dalr_scale.train",
        description="Train a sentence encoder with DALR.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", help="recipe name, TOML file or run folder (default quickstart)"
    )
    options, overrides = parser.parse_known_args(argv)
    return load_config(options.config, overrides)


def train(config: Config) -> int:
    """Runs one configuration on this rank of the world that the launcher started."""
    # heavy imports wait until the arguments are known to be right
    set_passive_omp_wait()
    from dalr_scale.distributed.world import leave_world, start_world
    from dalr_scale.training.metrics import logging_to

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
    from dalr_scale.training.preflight import check_settings

    try:
        check_settings(config, int(os.environ.get("WORLD_SIZE") or 1))
    except UserError as error:
        if "SLURM_JOB_ID" in os.environ:  # where the job script tells who failed first
            record_failure(config.run_dir, int(os.environ.get("RANK") or 0), error)
        raise


def _refuse(error: UserError, config: Config, world: Any) -> int:
    """One clear sentence from every rank that met the error; the others must not wait for it."""
    who = "" if world.rank == 0 else f" on rank {world.rank}"
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    log.debug("refused: %s", error)
    record_failure(config.run_dir, world.rank, error)
    _mark_failed(config, world)
    if world.size > 1:
        os._exit(2)
    return 2


def _mark_failed(config: Config, world: Any) -> None:
    """Marks the run as failed, if it is this process that the status file calls running."""
    from dalr_scale.run.state import read_status, write_status

    status = read_status(config.run_dir) if world.rank == 0 else None
    if status and status.get("outcome") == "running" and status.get("pid") == os.getpid():
        reason = repr(sys.exc_info()[1])
        write_status(config.run_dir, "failed", step=int(status.get("step") or 0), reason=reason)


def _train_in_world(config: Config, world: Any, held: contextlib.ExitStack) -> int:
    """`held` has what belongs to the run directory: the log, and from here on the lock."""
    from dalr_scale.run.state import lock_run_folder
    from dalr_scale.training.stopping import StopFlag

    started = time.monotonic()
    from_scratch = _starts_from_scratch(config, world)
    if not from_scratch and _is_finished(config, world):
        return 0
    held.enter_context(lock_run_folder(config.run_dir, world))
    # now, not after the minutes that preparing may take: a wish made meanwhile counts
    StopFlag(config.run_dir).clear_stale(world)
    prepared = _prepare(config, world)
    if from_scratch:  # only now that nothing is left to refuse
        _set_aside(config, world, held)
    return _run(config, world, prepared, started)


@dataclass(frozen=True)
class _Prepared:
    """Everything that a run is made of; nothing has been written into its directory yet."""

    streams: Any
    parts: Any
    suite: Any
    engine: Any
    ds_config: dict[str, Any] | None
    fingerprint: dict[str, Any]


def _prepare(config: Config, world: Any) -> _Prepared:
    from dalr_scale.engines.engine import build_engine
    from dalr_scale.training import report
    from dalr_scale.training.build import prepare_data
    from dalr_scale.training.optim import build_optimizer
    from dalr_scale.training.preflight import assemble, warn_of_streams, warn_without_effect

    prepare_data(config, world)
    streams, parts, suite, held_out = assemble(config, world)
    fingerprint = _fingerprint(config, world, streams, held_out)
    if world.rank == 0:
        print(report.arithmetic(config, streams, parts.model, world.size))
        print(report.needs(config, parts.model, world.size), flush=True)
        warn_without_effect(config)
        warn_of_streams(streams)
    optimizer = build_optimizer(parts.model, config.optim)
    engine, ds_config = build_engine(parts.model, optimizer, config, world)
    return _Prepared(streams, parts, suite, engine, ds_config, fingerprint)


def _fingerprint(config: Config, world: Any, streams: Any, held_out: Any) -> dict[str, Any]:
    from dalr_scale.engines.engine import resolve_precision
    from dalr_scale.training.fingerprint import run_fingerprint

    shards = streams.contents | ({"eval.retrieval": held_out.contents} if held_out else {})
    return run_fingerprint(
        config,
        world,
        precision=resolve_precision(config),
        total_steps=streams.total_steps,
        data=streams.fingerprint,
        shards=shards,
    )


def _run(config: Config, world: Any, prepared: _Prepared, started: float) -> int:
    from dalr_scale.run.state import start_status
    from dalr_scale.training import report
    from dalr_scale.training.metrics import RunLog
    from dalr_scale.training.stopping import StopFlag
    from dalr_scale.training.trainer import Trainer, write_outcome, write_run_files

    streams, suite, engine = prepared.streams, prepared.suite, prepared.engine
    trainer = Trainer(config, world, streams, prepared.parts, engine, suite, prepared.fingerprint)
    resumed = trainer.resume()
    if not resumed and not config.run.allow_change:
        _refuse_other_run(config, world, prepared.fingerprint)
    fruitless = 0
    if world.rank == 0:
        write_run_files(config, prepared.ds_config, prepared.fingerprint)
        fruitless = start_status(config.run_dir, trainer.step)
        log.info("resumed at step %d" if resumed else "starting at step %d", trainer.step)
    _give_up_on_crash_loop(fruitless, world, config.run_dir)
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
        print(f"stopped at step {trainer.step} ({reason.text}); run the same command to go on")
    return 0


def _fit(trainer: Any, stop: Any, run_log: Any, world: Any) -> Any:
    """Trains; a rank that alone finds a bad row says so itself, the first one cannot know."""
    try:
        return trainer.fit(stop, run_log)
    except UserError as error:
        if world.rank != 0:
            print(f"error on rank {world.rank}: {error}", file=sys.stderr, flush=True)
        raise


def _score_before(
    config: Config, world: Any, suite: Any, engine: Any, trainer: Any, run_log: Any
) -> dict[str, Any]:
    """Scores x 100 of the untrained encoder and of word overlap, kept in RUN/before.json for a
    resume."""
    from dalr_scale.eval.unit import UNIT, in_percent, read_scores
    from dalr_scale.run.state import write_durably

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


def _finish(config: Config, world: Any, trainer: Any, run_log: Any) -> dict[str, float]:
    """Exports the last encoder, and scores it and the best one; returns the scores of the best (of
    the last where nothing selects, and where only the last has the heads)."""
    from dalr_scale.eval.suite import FolderEngine

    trainer.watchdog.arm(60 * config.run.watchdog_minutes, "final evaluation")
    final, best = config.run_dir / "final", config.run_dir / "best"
    trainer.export(final)
    scores = selected = trainer.suite.score_final(trainer.engine)
    if trainer.best_step not in (None, trainer.step):
        selected = trainer.suite.score_final(FolderEngine(best, world.device))
    run_log.final_scores(trainer.step, scores, selected, trainer.best_step)
    return scores | selected


def _is_finished(config: Config, world: Any) -> bool:
    """A run that is done is shown again, not trained again; another one is refused."""
    from dalr_scale.distributed.world import World
    from dalr_scale.run.state import read_status
    from dalr_scale.training import report
    from dalr_scale.training.build import build_streams, open_held_out

    status = world.broadcast_object(read_status(config.run_dir) if world.rank == 0 else None)
    if not status or status.get("outcome") != "finished":
        return False
    now: dict[str, Any] | None = None
    if world.rank == 0:
        try:
            streams, alone = build_streams(config), World(0, 1, world.device)
            now = _fingerprint(config, alone, streams, open_held_out(config))
        except UserError as error:  # data that were deleted since do not hide the result
            log.debug("the inputs of the finished run are not compared: %s", error)
    _refuse_other_run(config, world, now)
    if world.rank == 0:
        report.print_result(config.run_dir)
        print(
            f"{config.run_dir} is finished; train again with --run.from_scratch=true, "
            "or beside it with --run.name=NAME"
        )
    return True


def _refuse_other_run(config: Config, world: Any, now: dict[str, Any] | None) -> None:
    """A run directory is not handed to another run; rank 0 looks, as it alone writes there."""
    refusal = None
    if world.rank == 0 and (config.run_dir / "config.toml").exists():
        try:
            refuse_other_run(config, now)
        except UserError as error:
            refusal = str(error)
    if (refusal := world.broadcast_object(refusal)) is not None:
        raise UserError(refusal)


def refuse_other_run(config: Config, now: dict[str, Any] | None) -> None:
    """Compares the run in the directory with this one, `now` (None: its settings only).

    Versions may differ: nothing that they computed is continued.
    """
    from dalr_scale.training.fingerprint import changes, settings_of

    settings = settings_of(load_config(str(config.run_dir / "config.toml")))
    before = {"config": settings}
    path = config.run_dir / "fingerprint.json"
    if now is not None and path.exists():
        recorded = json.loads(path.read_bytes())
        before |= {key: recorded[key] for key in ("data", "contents")}
    own = {key: value for key, value in (now or {}).items() if key in before}
    own["config"] = settings_of(config)
    changed = changes(before, own, "{} there, {} here")
    if changed:
        raise UserError(
            f"{config.run_dir} holds a run with other settings or files; choose another "
            "--run.name, or --run.from_scratch=true to move it aside:\n  "
            + "\n  ".join(line.removeprefix("config.") for line in changed)
        )


def _starts_from_scratch(config: Config, world: Any) -> bool:
    """``run.from_scratch``: whether there is an earlier run that is to be moved aside."""
    # a requeued job repeats its command line: that must not throw its own progress away
    wished = config.run.from_scratch and not int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return world.broadcast_object(wished and (config.run_dir / "config.toml").exists())


def _set_aside(config: Config, world: Any, held: contextlib.ExitStack) -> None:
    """Renames the earlier run's directory; log and lock lie in it and are opened again."""
    from dalr_scale.run.state import lock_run_folder
    from dalr_scale.training.metrics import logging_to

    world.barrier()
    if world.rank == 0:
        number = 1
        name = config.run_dir.name
        while (target := config.run_dir.with_name(f"{name}.old-{number}")).exists():
            number += 1
        config.run_dir.rename(target)
        print(f"moved the earlier run to {target}")
    world.barrier()
    held.close()
    held.enter_context(logging_to(config.run_dir, world.rank))
    held.enter_context(lock_run_folder(config.run_dir, world))


def _give_up_on_crash_loop(fruitless: int, world: Any, run_dir: Path) -> None:
    """Three starts that led to no new checkpoint: a fourth would not either."""
    if world.broadcast_object(fruitless) >= MAX_FRUITLESS_STARTS:
        raise UserError(
            f"{run_dir} was started {MAX_FRUITLESS_STARTS} times without reaching a new "
            f"checkpoint; see {run_dir}/status.json and log/, then delete status.json to try again "
            "(without any checkpoint: --run.from_scratch=true)"
        )


if __name__ == "__main__":
    status = run_command(main, None)
    if "torch" in sys.modules:
        end_process(status)
    raise SystemExit(status)
