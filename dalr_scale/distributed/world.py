"""The ranks of a run and the small agreements between them.

Start-up lives here too: which process group backend a host needs, and the cases in which a
launcher quietly starts fewer processes than were asked for.
"""

from __future__ import annotations

import itertools
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dalr_scale.distributed.collectives import open_column_group
from dalr_scale.distributed.process_state import Environment, reset_engine_state
from dalr_scale.errors import UserError

T = TypeVar("T")
_environment: Environment | None = None  # as the launcher left it, while a world is open


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process; every method is a collective of all ranks."""

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def all_max(self, value: int) -> int:
        """The largest of all ranks' integers (a float64 travels exactly up to 2**53)."""
        return int(self._reduce([float(value)], dist.ReduceOp.MAX)[0])

    def all_mean(self, values: list[float]) -> list[float]:
        return [v / self.size for v in self._reduce(values, dist.ReduceOp.SUM)]

    def _reduce(self, values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1 or not values:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a tensor of which every rank filled other rows; in place."""
        if self.size > 1:
            dist.all_reduce(rows)
        return rows

    def gather_objects(self, obj: T) -> list[T] | None:
        """All ranks' objects on rank 0, None elsewhere."""
        if self.size == 1:
            return [obj]
        gathered = [obj] * self.size if self.rank == 0 else None  # replaced by the ranks' own
        dist.gather_object(obj, gathered, dst=0)
        return gathered

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        if self.size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=src)
        return box[0]


def start_world(timeout_minutes: float, threads: int = 0) -> World:
    """Joins the process group of the launcher, or initializes a single-process group.

    ``accelerate launch`` without flags starts one plain process on a CPU host, in which DeepSpeed
    still wants a process group; the environment of a single-process group is filled in for it.
    The backend is named because Accelerate, left to itself, lets both of two CPU
    processes believe that they are rank 0 of 1.

    Args:
        timeout_minutes: of every collective.
        threads: CPU threads of this process; 0 shares the host's cores among its ranks.
    """
    refuse_single_process("dalr_scale.train")
    global _environment
    if not dist.is_initialized():
        _environment = Environment()
        _environment.ignore_launcher_settings(warn=os.environ.get("RANK", "0") == "0")
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    single_process = "MASTER_PORT" not in os.environ and os.environ["WORLD_SIZE"] == "1"
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    device = _local_device()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _share_threads(threads)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group(
            backend, timeout=timeout, **_rendezvous_arguments(single_process, timeout)
        )
        open_column_group(timeout)
    return World(dist.get_rank(), dist.get_world_size(), device)


_stores: dict[tuple[str | None, ...], Any] = {}
_worlds = itertools.count(1)


def _rendezvous_arguments(single_process: bool, timeout: timedelta) -> dict[str, Any]:
    """Where the ranks of this process group find each other.

    A single process listens nowhere: a port that was free a moment ago may be taken by now. Several
    ranks keep the launcher's store for all groups that follow each other in one process, each under
    a name of its own: a later group would read the addresses that an earlier one left there, and
    wait for them forever.
    """
    if single_process:
        in_memory = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        return {"store": in_memory, "rank": 0, "world_size": 1}
    place = tuple(map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")))
    if place not in _stores:
        _stores[place] = next(rendezvous("env://", timeout=timeout))
    store, rank, size = _stores[place]
    name = f"world {next(_worlds)}"
    named = dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]
    return {"store": named, "rank": rank, "world_size": size}


def leave_world() -> None:
    """Leaves the process group and everything tied to it: this process may train again."""
    global _environment
    if dist.is_initialized():
        dist.destroy_process_group()
    reset_engine_state()
    if _environment is not None:
        _environment.restore()
        _environment = None


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _share_threads(threads: int) -> None:
    """Launchers set OMP_NUM_THREADS=1 or nothing; either leaves cores idle or fights for them."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // ranks_here))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse_single_process(module: str) -> None:
    """``accelerate launch --num_processes N`` without --use_deepspeed runs one process on CPU.

    Raises:
        UserError: that is what happened; the message has the right command for ``module``.
    """
    if "WORLD_SIZE" in os.environ or torch.cuda.is_available():
        return
    requested = _processes_requested_of_parent()
    if requested > 1:
        raise UserError(
            f"accelerate was asked for {requested} processes but started one, as it does on a CPU "
            f"host without --use_deepspeed; run: accelerate launch --use_deepspeed "
            f"--num_processes {requested} -m {module} ..."
        )


def _processes_requested_of_parent() -> int:
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return 1
    words = line.decode(errors="replace").split("\0")
    if not any("accelerate" in word for word in words[:3]):
        return 1
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes", "-n"):
            text = value or after
            return int(text) if text.isdigit() else 1
    return 1
