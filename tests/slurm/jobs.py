"""Training jobs on the test cluster: submit them, watch them from outside, disturb them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster import Cluster
from common import records, status, tiny_config, tiny_layer, write_config

REPOSITORY = Path(__file__).parents[2]
STEPS = 60
START = 600.0  # seconds for eight processes to load torch on two cores that others use as well
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# what a cluster's users have in their environment and nobody may find in a file
SECRETS = {"HF_TOKEN": "hf_plantedSecret", "WANDB_API_KEY": "wandb-plantedSecret"}
SECRET = "plantedSecret"


def write_recipe(data: Path, path: Path, *, dropout: bool = False) -> Path:
    """A tiny run on both streams; without dropout another number of ranks gives the same losses."""
    architecture = tiny_layer(data)["model"]["architecture"]
    changes: dict[str, Any] = {
        "optim.steps": STEPS,
        "data.workers": 0,
        "eval.every": 0,
        "save.every_steps": 20,
        "log.every": 20,
        "engine.timeout_minutes": 10.0,
        "model.architecture": architecture | ({} if dropout else NO_DROPOUT),
    }
    return write_config(tiny_config(data, changes), path)


@dataclass
class Job:
    """One job and its run directory."""

    cluster: Cluster
    number: str
    run: Path
    output_file: Path

    @property
    def output(self) -> str:
        return self.output_file.read_text(encoding="utf-8", errors="replace")

    def steps(self) -> int:
        """Optimizer steps in the run's records."""
        return len(records(self.run)) if (self.run / "metrics.jsonl").exists() else 0

    def field(self, name: str) -> str:
        return self.cluster.job(self.number)[name]

    def wait_for_steps(self, count: int, restarts: int = 0) -> None:
        """Waits until start number `restarts` has trained up to step `count`."""

        def there() -> bool:
            facts = self.cluster.job(self.number)
            state, now = facts["JobState"], int(facts["Restarts"])
            assert state in ("PENDING", "RUNNING", "COMPLETING"), self.output[-3000:]
            assert now <= restarts, f"restarted by itself:\n{self.output[-3000:]}"
            own = (self.run / "status.json").exists() and status(self.run)
            mine = own and (own["job_id"], own["restart_count"]) == (self.number, restarts)
            return bool(mine) and self.steps() >= count

        self.cluster.wait(there, START, f"job {self.number} at step {count}")

    def wait_until_requeued(self, restarts: int, seconds: float = 150) -> None:
        def requeued() -> bool:
            facts = self.cluster.job(self.number)
            return int(facts["Restarts"]) >= restarts and facts["JobState"] == "PENDING"

        self.cluster.wait(requeued, seconds, f"job {self.number} requeued")

    def wait_for_end(self, seconds: float = START) -> str:
        return self.cluster.wait_for_end(self.number, seconds)

    def wait_until_gone(self, seconds: float = 60) -> None:
        """No process of the job is left on any node."""
        self.cluster.wait(
            lambda: not self.cluster.processes(job=self.number),
            seconds,
            f"no process of job {self.number}",
        )

    def seconds(self) -> float:
        """How long the job ran."""
        start, end = (datetime.fromisoformat(self.field(f"{k}Time")) for k in ("Start", "End"))
        return (end - start).total_seconds()

    def rank_process(self, node: str) -> int:
        """The training process on a node."""
        for pid in self.cluster.processes(node=node, job=self.number):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranked = any(entry.startswith(b"RANK=") for entry in environment)
            if ranked and b"dalr_scale.train" in words:
                return pid
        raise LookupError(f"no training process of job {self.number} on {node}")


class Jobs:
    """Submits the scripts of ``slurm/`` as a user does, from the root of the checkout."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory

    def submit(
        self,
        name: str,
        *words: str,
        options: tuple[str, ...] = (),
        script: str = "train_8node.sh",
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Submits ``sbatch OPTIONS slurm/SCRIPT WORDS`` with the run directory `name`."""
        run = self.directory / name
        # nothing here is compiled, but DeepSpeed loads the compiler, in each process of each start
        quick = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        given = {**quick, "RUN_DIR": str(run), **SECRETS}
        if not (REPOSITORY / ".venv" / "bin" / "python").exists():
            given["VENV"] = sys.prefix
        output = self.directory / f"{name}_%j.out"
        number = self.cluster.sbatch(
            f"--output={output}",
            *options,
            f"slurm/{script}",
            *words,
            cwd=REPOSITORY,
            environment=given | dict(environment or {}),
        )
        return Job(self.cluster, number, run, Path(str(output).replace("%j", number)))

    def preempt(self, seconds: int = 5) -> str:
        """An urgent job that takes a node from whatever trains; returns its number."""
        return self.cluster.sbatch(
            *("--partition=urgent", "--nodes=1", "--exclusive", "--output=/dev/null"),
            f"--wrap=sleep {seconds}",
            cwd=self.directory,
        )


def files_with(directory: Path, text: str) -> list[Path]:
    """Files below `directory` that contain `text`."""
    paths = (Path(parent, name) for parent, _, names in os.walk(directory) for name in names)
    return [path for path in paths if path.is_file() and text.encode() in path.read_bytes()]
