"""Whose run a directory holds: finished, continued, refused, or moved aside."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

from dalr_scale.config import Config, load_config
from dalr_scale.distributed.world import World
from dalr_scale.errors import UserError
from dalr_scale.run.lock import lock_run_directory
from dalr_scale.run.status import read_status
from dalr_scale.training import report
from dalr_scale.training.build import build_streams, open_held_out
from dalr_scale.training.fingerprint import Fingerprint, changes, settings_of
from dalr_scale.training.metrics import logging_to
from dalr_scale.training.prepared import fingerprint_of

if TYPE_CHECKING:
    import contextlib

log = logging.getLogger(__name__)


def is_finished(config: Config, world: World) -> bool:
    """A run that is done is shown again, not trained again; another one is refused."""
    status = world.broadcast_object(read_status(config.run_dir) if world.rank == 0 else None)
    if not status or status.get("outcome") != "finished":
        return False
    now: Fingerprint | None = None
    if world.rank == 0:
        try:
            streams, alone = build_streams(config), World(0, 1, world.device)
            now = fingerprint_of(config, alone, streams, open_held_out(config))
        except UserError as error:  # data that were deleted since do not hide the result
            log.debug("the inputs of the finished run are not compared: %s", error)
    refuse_other_run_on_all(config, world, now)
    if world.rank == 0:
        report.print_result(config.run_dir)
        print(
            f"{config.run_dir} is finished; train again with --run.from_scratch=true, "
            "or beside it with --run.name=NAME"
        )
    return True


def refuse_other_run_on_all(config: Config, world: World, now: Fingerprint | None) -> None:
    """A run directory is not handed to another run; rank 0 looks, as it alone writes there."""
    refusal = None
    if world.rank == 0 and (config.run_dir / "config.toml").exists():
        try:
            refuse_other_run(config, now)
        except UserError as error:
            refusal = str(error)
    if (refusal := world.broadcast_object(refusal)) is not None:
        raise UserError(refusal)


def refuse_other_run(config: Config, now: Fingerprint | None) -> None:
    """Compares the run in the directory with this one, `now` (None: its settings only).

    Versions may differ: nothing that they computed is continued.
    """
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


def starts_from_scratch(config: Config, world: World) -> bool:
    """``run.from_scratch``: whether there is an earlier run that is to be moved aside."""
    # a requeued job repeats its command line: that must not throw its own progress away
    requested = config.run.from_scratch and not int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return world.broadcast_object(requested and (config.run_dir / "config.toml").exists())


def move_aside(config: Config, world: World, held: contextlib.ExitStack) -> None:
    """Renames the earlier run's directory; log and lock lie in it and are opened again."""
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
    held.enter_context(lock_run_directory(config.run_dir, world))
