"""One rank: runs every case of its world size and writes what rank 0 saw."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cases import SETS, run, save
from facts import collect

from dalr_scale.distributed.world import leave_world, start_world
from dalr_scale.process import end_process


def one_rank(directory: str, which: str, environment: Mapping[str, str], log: str) -> None:
    """The whole life of a process of the world that `environment` describes."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        main(Path(directory), which)
    except BaseException:
        traceback.print_exc()
        end_process(1)
    end_process(0)


def main(directory: Path, which: str) -> None:
    world = start_world(timeout_minutes=2, threads=1)
    for case in SETS[which]():
        # a cut soak run is taken up where it stopped; ranks share the directory
        if case.world == world.size and not (directory / f"{case.name}.npz").exists():
            results = run(case, world)
            if world.rank == 0:
                save(directory, case, results)
    if which == "cover" and world.size == 2:
        found = collect(world)
        if world.rank == 0:
            (directory / "facts.json").write_text(json.dumps(found), encoding="utf-8")
    leave_world()
