"""Ten preemptions of training on eight nodes, at random steps, dropout on: nothing is lost.

Two runs, five preemptions each; a run takes about a quarter of an hour on one core.

make soak ARGS=tests/slurm        writes tests/soak/results/slurm_preemption.json
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from common import history, status, weights_hash
from jobs import START, Jobs, write_recipe
from launching import train

from dalr_scale.versions import version_line

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(6 * START)]
RESULTS = Path(__file__).parents[1] / "soak" / "results" / "slurm_preemption.json"
RUNS, PREEMPTIONS, SOAK_STEPS = 2, 5, 180


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, jobs: Jobs) -> str:
    return f"--config={write_recipe(tiny_data, jobs.directory / 'soak.toml', dropout=True)}"


@pytest.fixture(scope="module")
def reference(jobs: Jobs, recipe: str) -> Path:
    """The uninterrupted run: eight processes on this host, equal bit for bit to eight nodes."""
    run = jobs.directory / "reference"
    words = [recipe, f"--run.dir={run}", f"--optim.steps={SOAK_STEPS}"]
    outcome = train(words, jobs.directory / "reference.log", ranks=8, patience=START)
    assert set(outcome.codes) == {0}, outcome.output[-4000:]
    assert len(history(run)) == SOAK_STEPS
    return run


@pytest.fixture(scope="module")
def results(jobs: Jobs) -> Callable[[dict], None]:
    """``results(record of a run)``: puts it into the file, in the place of the same run before."""

    def add(run: dict) -> None:
        old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        others = [r for r in old.get("runs", ()) if r["run"] != run["run"]]
        runs = sorted([*others, run], key=lambda r: r["run"])
        record = {
            "what": "one process on each of 8 nodes, ZeRO-2, gloo, fp32, dropout on",
            "preemptions": sum(len(r["stops"]) for r in runs),
            "grace_seconds": jobs.cluster.grace,
            "steps": SOAK_STEPS,
            "runs": runs,
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    return add


@pytest.mark.parametrize("run", range(RUNS))
def test_preempted_again_and_again(
    run: int, jobs: Jobs, recipe: str, reference: Path, results: Callable[[dict], None]
) -> None:
    draw = random.Random(run)
    job = jobs.submit(f"run{run}", recipe, f"--optim.steps={SOAK_STEPS}")
    stops, step = [], 0
    for restart in range(PREEMPTIONS):
        job.wait_for_steps(step + draw.randint(3, 15), restarts=restart)
        urgent = jobs.preempt(seconds=1)
        job.wait_until_requeued(restart + 1)
        jobs.cluster.wait_for_end(urgent, 60)
        stopped = status(job.run)
        assert (stopped["outcome"], stopped["reason"]) == ("preempted", "preempted by Slurm")
        asked = (job.run / "STOP").stat().st_mtime
        saved = (job.run / stopped["checkpoint"] / "manifest.json").stat().st_mtime
        assert step < stopped["step"] < SOAK_STEPS
        assert 0 < saved - asked < jobs.cluster.grace / 2
        step = stopped["step"]
        stops.append({"step": step, "signal_to_checkpoint_seconds": round(saved - asked, 2)})
    assert job.wait_for_end() == "COMPLETED", job.output[-4000:]
    assert int(job.field("Restarts")) == PREEMPTIONS
    assert history(job.run) == history(reference)
    weights = weights_hash(job.run / "final")
    assert weights == weights_hash(reference / "final")
    results(
        {
            "run": run,
            "stops": stops,
            "differing_steps": 0,
            "final_weights_sha256": weights,
            "date": time.strftime("%Y-%m-%d"),
            "host": f"{platform.machine()}, {version_line()}",
        }
    )
