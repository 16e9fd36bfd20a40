"""The checks of one node for `dalr_scale.commands.doctor`.

Torch is imported only where the node has GPUs: importing it takes longer than all checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from dalr_scale.config.arguments import configuration
from dalr_scale.config.limits import check_arithmetic
from dalr_scale.errors import UserError
from dalr_scale.run.failure import node_name
from dalr_scale.run.files import JsonTable, JsonValue, process_name
from dalr_scale.versions import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dalr_scale.config import Config

__all__ = ["NodeReport", "examine", "node_name"]


@dataclass
class NodeReport:
    """The result of a node's checks.

    Attributes:
        facts: values that must be equal on all nodes, such as package versions.
        problems: faults of this node, independent of the other nodes.
        clock_offset: seconds ahead of the first node; filled in by the first node.
    """

    node: str
    rank: int
    facts: dict[str, str] = field(default_factory=dict[str, str])
    problems: list[str] = field(default_factory=list[str])
    gpus: int = 0
    shards: int = 0
    clock_offset: float = 0.0

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values only; `from_json` gives an equal report back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: JsonTable) -> NodeReport:
        """A report as another node of the job has sent it.

        Raises:
            TypeError: the table has other keys.
        """
        return cls(**cast("_Fields", plain))


class _Fields(TypedDict):
    node: str
    rank: int
    facts: dict[str, str]
    problems: list[str]
    gpus: int
    shards: int
    clock_offset: float


def examine(
    run_dir: Path | None, processes: int, training: Sequence[str], nodes: int = 1, rank: int = 0
) -> NodeReport:
    """Checks this node, number `rank` of the job; problems are collected, not raised.

    Args:
        run_dir: output directory; None takes the configuration's.
        processes: training processes that will run here.
        training: arguments of the trainer.
        nodes: nodes of the job, all with as many processes.
    """
    report = NodeReport(node_name(), rank)
    report.facts = versions() | {"the code of dalr_scale": _code_digest()}
    try:
        config = configuration(training)
        run_dir = run_dir or config.run_dir
        check_arithmetic(config.batch, nodes * processes)
        report.shards, report.facts["the list of shards"] = _shards(config)
    except UserError as error:
        report.problems.append(str(error))
    if run_dir is not None:
        report.problems += _output_problems(run_dir)
    _count_gpus(report, processes)
    return report


def _code_digest() -> str:
    """A checkout in another version on one node is as bad as another package."""
    digest = hashlib.sha256()
    directory = Path(__file__).parents[1]
    for path in sorted(directory.rglob("*.py")):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _shards(config: Config) -> tuple[int, str]:
    """Number of shards and an identity of their names and sizes.

    Raises:
        UserError: for shards that this node does not see.
    """
    from dalr_scale.data.shards.files import expand_shards

    if config.data.builder != "none":
        return 0, "drawn by the first process"
    digest = hashlib.sha256()
    count = 0
    for patterns in (config.data.pairs, config.data.text, config.eval.retrieval):
        for path in expand_shards([str(config.path(p)) for p in patterns]) if patterns else ():
            digest.update(f"{path} {path.stat().st_size}\n".encode())
            count += 1
    return count, digest.hexdigest()[:12]


def _output_problems(run_dir: Path) -> Iterator[str]:
    probe = run_dir / f".doctor-{process_name()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"written by dalr-scale doctor")
        probe.unlink()
    except OSError as error:
        yield f"the output directory {run_dir} cannot be written: {error.strerror or error}"


def _count_gpus(report: NodeReport, processes: int) -> None:
    """A node with an NVIDIA driver whose GPUs torch does not see would train on its CPU."""
    if not Path("/proc/driver/nvidia/version").exists():
        return
    import torch

    report.gpus = torch.cuda.device_count()
    report.facts["the number of GPUs"] = str(report.gpus)
    asked = os.environ.get("SLURM_GPUS_ON_NODE")
    if report.gpus < processes and (asked or report.gpus):
        report.problems.append(
            f"{processes} processes for {report.gpus} GPUs that torch sees here (Slurm gave "
            f"{asked or 'none'}): check the driver and torch's CUDA, or set PROCS_PER_NODE"
        )
