"""Training processes for the tests, forked from one server that has imported everything once.

A process of its own for every run is what interruptions are about; importing torch and DeepSpeed
for each of them is not.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm_server"])


def fork(target: Callable[..., object], *args: object) -> BaseProcess:
    """Starts a function in a process of its own that has imported everything already."""
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    # the server searches for modules in PYTHONPATH only, and is started with the first process
    with mock.patch.dict(os.environ, {"PYTHONPATH": here}):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


@dataclass(frozen=True)
class Outcome:
    """Exit codes of all ranks (-9 after a SIGKILL) and what they printed, both streams."""

    codes: tuple[int, ...]
    output: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accelerate(*words: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` as a user types it, outside of any world, on a free port."""
    world = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in world}
    launcher = Path(sys.executable).with_name("accelerate")
    return subprocess.run(
        [sys.executable, str(launcher), "launch", f"--main_process_port={free_port()}", *words],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def train(
    words: Sequence[str],
    log: Path,
    *,
    ranks: int = 1,
    end_at: tuple[int, str] | None = None,
    environment: Mapping[str, str] | None = None,
    setup: Callable[[], None] | None = None,
    patience: float = 120,
) -> Outcome:
    """Runs the training command in `ranks` fresh processes and waits for them.

    Args:
        words: arguments of ``dalr_scale.train``.
        log: file for what the processes print.
        end_at: in the step of this number, ``"STOP"`` touches the file and ``"SIGTERM"`` sends the
            signal to the last rank; ``"SIGKILL"`` ends every rank after it silently.
        environment: further variables.
        setup: called in each process before training, to switch a guarantee off; a module's own
            function.
        patience: seconds that a process may take.
    """
    base = {"OMP_NUM_THREADS": "1", **(environment or {})}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(fork(_one_rank, list(words), own, str(log), end_at, setup))
    try:
        for process in processes:
            process.join(timeout=patience)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    codes = tuple(process.exitcode for process in processes)
    return Outcome(codes, log.read_text(encoding="utf-8"))  # type: ignore[arg-type]


def _one_rank(
    words: list[str],
    environment: dict[str, str],
    log: str,
    end_at: tuple[int, str] | None,
    setup: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    # a child of the server would start its loader workers through the server too
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    from dalr_scale.estimate import predict
    from dalr_scale.process import run_command
    from dalr_scale.train import main
    from dalr_scale.training.trainer import Trainer

    # it takes longer to measure than a run of this size to train; test_plan.py measures it
    predict.loss_bytes_per_row = lambda model, *, paired=True: 0
    if setup is not None:
        setup()
    original = Trainer.train_step

    def train_step(self, batch):
        last, how = end_at or (0, "")
        if self.step + 1 == last and how != "SIGKILL":
            _end(how, self)  # the vote of this step tells the others
        result = original(self, batch)
        if self.step == last and how == "SIGKILL":
            _end(how, self)
        return result

    with mock.patch.object(Trainer, "train_step", train_step):
        raise SystemExit(run_command(main, words))


def _end(how: str, trainer) -> None:
    if how == "STOP" and trainer.world.rank == 0:
        (trainer.run_dir / "STOP").touch()
    if how == "SIGTERM" and trainer.world.rank == trainer.world.size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
