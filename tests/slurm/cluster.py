"""A real Slurm cluster on one host: eight slurmd, counted GPUs, preemption by partition.

It keeps to itself: an own munge daemon with an own key, own ports, all files in one directory;
nothing on the host is changed but Debian's packages, which root installs where they are absent.

    main     partition of training jobs, n1 to n8; they are requeued for jobs of the next one
    urgent   partition that takes nodes from the first
    side     n9, for a job that goes its own way beside the others

A node is killed as a power cut would: every process that it runs, its slurmd included, by SIGKILL.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

NODES, ALL_NODES = 8, 9
PORTS = range(10000, 20000, 20)  # where to look for free ones; below the ports of training
JOBS = 200  # numbers of jobs until those of the next cluster on this host
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "mungekey")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

CONF = """\
ClusterName=dalrtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=10
GresTypes=gpu
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=20
SlurmdTimeout=20
PropagatePrioProcess=1
KillWait=30
MinJobAge=3600
SchedulerParameters=sched_interval=5,bf_interval=5,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
NodeName=n[1-{all_nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=16 \
RealMemory=2000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=n[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=side Nodes=n{all_nodes} MaxTime=INFINITE State=UP
"""


class NoSlurm(RuntimeError):
    """Slurm cannot be had here; the message says why."""


def install() -> None:
    """Installs Slurm and munge where they are absent.

    Raises:
        NoSlurm: if that is not possible here.
    """
    absent = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
    if not absent:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoSlurm(f"{', '.join(absent)} absent, and only root with apt-get can install them")
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "timeout": 600}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run([*apt, *words], capture_output=True, text=True, check=False, **quiet)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise NoSlurm(f"apt-get {words[0]} failed: {' '.join(last)}")


class Cluster:
    """The running cluster; every method that asks Slurm uses this cluster's own settings."""

    def __init__(self, directory: Path, *, grace: int = 60) -> None:
        self.grace = grace
        self.directory = directory
        self.host = socket.gethostname().partition(".")[0]
        self.conf = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": SEARCH}

    # -- up and down ------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the daemons and waits until all nodes are idle.

        Raises:
            NoSlurm: if they do not come up.
        """
        if os.geteuid() != 0:
            raise NoSlurm("the daemons of a test cluster must run as root")
        for name in ("log", "spool", "state"):
            (self.directory / name).mkdir(parents=True)
        self.directory.chmod(0o755)
        # the one GPU of a node must be a device that every host has
        (self.directory / "gres.conf").write_text("Name=gpu File=/dev/null\n", encoding="utf-8")
        port = _free_ports(ALL_NODES + 1)  # another cluster may run on this host
        settings = {
            "host": self.host,
            "directory": self.directory,
            "controller_port": port,
            # a job's number says which port it trains on: far from that of another cluster's jobs
            "first_job": 1 + PORTS.index(port) * JOBS,
            "nodes": NODES,
            "all_nodes": ALL_NODES,
            "first": port + 1,
            "last": port + ALL_NODES,
            "grace": self.grace,
        }
        self.conf.write_text(CONF.format(**settings), encoding="utf-8")
        self._start_munge()
        self._daemon("slurmctld", "-f", str(self.conf), "-i")
        for number in range(1, ALL_NODES + 1):
            self.start_node(number)
        try:
            self.wait(lambda: len(self.nodes("idle")) == NODES, 60, "all nodes idle")
        except (TimeoutError, RuntimeError) as error:
            raise NoSlurm(f"{error}; see {self.directory}/log") from error

    def _start_munge(self) -> None:
        key, socket_path = self.directory / "munge.key", self.directory / "munge.socket"
        self._daemon("mungekey", "--create", f"--keyfile={key}")
        self._daemon(
            "munged",
            f"--key-file={key}",
            f"--socket={socket_path}",
            f"--pid-file={self.directory}/munged.pid",
            f"--log-file={self.directory}/log/munged.log",
            f"--seed-file={self.directory}/munge.seed",
            "--force",  # the directory belongs to the tests, not to a munge account
        )

    def _daemon(self, *words: str) -> None:
        """Starts a daemon before all that trains, or it would seem dead; jobs have the usual rank.

        The host is full with eight processes that load torch, and the daemons share it with them.
        """
        done = subprocess.run(
            ["nice", "-n", "-10", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise NoSlurm(f"{words[0]} did not start: {done.stderr.strip()}")

    def stop(self) -> None:
        """Cancels what runs and ends every daemon that `start` started."""
        with suppress(Exception):
            self.ask("scancel", "--user=root")
            self.wait(lambda: not self.ask("squeue", "-h"), 60, "no jobs")
        names = [f"slurmd.n{number}" for number in range(1, ALL_NODES + 1)]
        for name in (*names, "slurmctld", "munged"):
            with suppress(OSError, ValueError):
                os.kill(int((self.directory / f"{name}.pid").read_text()), signal.SIGTERM)

    # -- nodes ------------------------------------------------------------------------------

    def start_node(self, number: int) -> None:
        self._daemon("slurmd", "-f", str(self.conf), "-N", f"n{number}")

    def kill_node(self, number: int) -> int:
        """Kills the node and everything on it; returns how many processes that were."""
        daemon = int((self.directory / f"slurmd.n{number}.pid").read_text())
        os.kill(daemon, signal.SIGKILL)
        killed = 0
        # again: a process may have been started between the look and the kill
        while found := self.processes(node=f"n{number}"):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.2)
        return killed

    def nodes(self, state: str) -> list[str]:
        return self.ask("sinfo", "-h", "-N", "-p", "main", "-t", state, "-o", "%N").split()

    def processes(self, node: str | None = None, job: str | None = None) -> list[int]:
        """Living processes that this cluster runs: those of one node, of one job, or both."""
        found = []
        for pid, environment in _environments():
            own = environment.get("SLURMD_NODENAME")
            same_node = node is None or own == node
            same_job = job is None or environment.get("SLURM_JOB_ID") == job
            ours = environment.get("SLURM_CONF") == str(self.conf)
            if own and ours and same_node and same_job:
                found.append(pid)
        return found

    # -- jobs -------------------------------------------------------------------------------

    def ask(self, *words: str, environment: Mapping[str, str] | None = None, **options) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            words,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def sbatch(self, *words: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
        """Submits a job; returns its number."""
        return self.ask("sbatch", "--parsable", *words, environment=environment, cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by field name."""
        text = self.ask("scontrol", "show", "job", number, "-o")
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", text))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait_for_end(self, number: str, seconds: float) -> str:
        """Waits until the job is neither pending nor running; returns its state."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.wait(lambda: self.state(number) not in going, seconds, f"job {number} at its end")
        return self.state(number)

    @staticmethod
    def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.25)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for first in PORTS:
        with ExitStack() as sockets, suppress(OSError):
            for port in range(first, first + count):
                sockets.enter_context(socket.create_server(("", port)))
            return first
    raise NoSlurm(f"no {count} free ports from {PORTS.start} to {PORTS.stop}")


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                data = (path / "environ").read_bytes().decode(errors="replace")
                yield (
                    int(path.name),
                    dict(entry.partition("=")[::2] for entry in data.split("\0") if "=" in entry),
                )
