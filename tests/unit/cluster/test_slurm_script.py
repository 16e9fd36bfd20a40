"""The job scripts with replacements of Slurm's commands: what they start, and when again."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))
# Runs the part after the options here, as node 1 of 2.
LOCAL_SRUN = """while [[ $1 != bash && $1 != apptainer ]]; do shift; done
export SLURM_NODEID=1 SLURMD_NODENAME=n2
[[ $1 != apptainer ]] || echo "$@" >>"$FAKES/called"
while [[ $1 != bash ]]; do shift; done
exec "$@" """
SHOW_ARGUMENTS = """printf '%s\\n' "$@" >"$FAKES/arguments"; env >"$FAKES/environment" """


class Fakes:
    """Replacements of srun, scontrol, accelerate-launch and python; job 77 on 2 nodes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "bin").mkdir()
        python = f'exec {shlex.quote(sys.executable)} "$@"'
        self.write("srun", "exit 0")
        self.write("bin/python", python)
        self.write("bin/accelerate-launch", SHOW_ARGUMENTS)
        self.job_says("JobState=RUNNING PreemptTime=None")

    def write(self, name: str, body: str) -> None:
        path = self.directory / name
        path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def job_says(self, fields: str, requeue: str = 'touch "$FAKES/requeued"') -> None:
        cases = f"""case "$1 $2" in
  "show hostnames") printf '%s\\n' n1 n2 ;;
  "show node") echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=x" ;;
  "show job") echo "{fields}" ;;
  requeue*) {requeue} ;;
esac"""
        self.write("scontrol", cases)

    def run(
        self, script: str = "train_8node.sh", *words: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.directory}:{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(REPOSITORY)),
            "FAKES": str(self.directory),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "RUN_DIR": str(self.directory / "run"),
            "VENV": str(self.directory),
            "TMPDIR": str(self.directory),
            "DOCTOR": "no",
        }
        return subprocess.run(
            ["bash", str(REPOSITORY / "slurm" / script), *words],
            env={k: v for k, v in (environment | variables).items() if v},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def requeued(self) -> bool:
        return (self.directory / "requeued").exists()

    @property
    def arguments(self) -> list[str]:
        return (self.directory / "arguments").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.directory / "environment").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def leave_status(self, outcome: str, job: str | None = "77", restarts: int = 0) -> None:
        (self.directory / "run").mkdir(exist_ok=True)
        status = {"outcome": outcome, "job_id": job, "restart_count": restarts, "step": 4}
        (self.directory / "run" / "status.json").write_text(json.dumps(status), encoding="utf-8")


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def status_of(fakes: Fakes) -> dict:
    return json.loads((fakes.directory / "run" / "status.json").read_text())


# -- form -----------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing() -> None:
    program = Path(sys.prefix) / "bin" / "shellcheck"
    words = ["--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
    bad = "#!/bin/bash\nrm $1/*\n"  # control
    done = subprocess.run([program, "-"], input=bad, capture_output=True, text=True)
    assert done.returncode == 1


def test_every_script_is_short_and_can_be_run() -> None:
    names = {path.name for path in SCRIPTS}
    jobs = {"train_8node.sh", "train_1node.sh", "sweep_batch.sh", "features.sh", "smoke.sh"}
    assert names == jobs | {"common.sh"}
    for path in SCRIPTS:
        if path.name in jobs:
            assert os.access(path, os.X_OK) and len(path.read_text().splitlines()) < 40


# -- what is started ------------------------------------------------------------------------------


def test_arguments_arrive_whole_on_the_node(fakes: Fakes) -> None:
    fakes.write("srun", LOCAL_SRUN)
    words = ("--config", "a file.toml", "--run.seed=3", "--teachers.text=[\"x y\", '$HOME']")
    done = fakes.run("train_8node.sh", *words, PROCS_PER_NODE="4", NETWORK_INTERFACE="ib0")
    assert done.returncode == 0, done.stderr
    found = fakes.arguments
    module = found.index("-m")
    assert found[module + 1] == "dalr_scale.train"
    assert found[module + 2 : -2] == list(words)
    assert found[-2:] == ["--run.dir", str(fakes.directory / "run")]
    options = dict(itertools.pairwise(found[:module]))
    assert options["--num_machines"] == "2" and options["--num_processes"] == "8"
    assert options["--machine_rank"] == "1"  # the node's own, not the batch host's
    assert options["--main_process_ip"] == "10.0.0.7"
    assert options["--main_process_port"] == str(20000 + 77)
    assert options["--mixed_precision"] == "no" and options["--max_restarts"] == "0"
    there = fakes.environment
    assert there["NCCL_SOCKET_IFNAME"] == there["GLOO_SOCKET_IFNAME"] == "ib0"
    scratch = str(fakes.directory / "dalr-77-1")
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert there[name].startswith(scratch)
    assert not Path(scratch).exists()  # cleared away
    assert "SIGUSR1" in there["PET_SIGNALS_TO_HANDLE"] and there["PET_SHUTDOWN_TIMEOUT"] == "300"


@pytest.mark.parametrize(
    ("words", "given", "wanted"),
    [
        ((), "", "runs/slurm_77"),
        (("--run.name=x",), "", "runs/x"),
        (("--run.dir", "/tmp/y/z"), "", "/tmp/y/z"),
        (("--run.dir=/tmp/y/z",), "given", "given"),
    ],
)
def test_the_run_directory(words: tuple[str, ...], given: str, wanted: str, fakes: Fakes) -> None:
    text = f'source {REPOSITORY}/slurm/common.sh; echo "${{RUN_DIR:-$(run_dir_of "$@")}}"'
    done = subprocess.run(
        ["bash", "-c", text, "x", *words],
        env={"SLURM_JOB_ID": "77", "PATH": os.environ["PATH"], "RUN_DIR": given},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.parametrize(
    ("gpus", "asked_for", "processes", "step_asks"),
    [
        ("", {}, 1, False),
        ("0", {}, 1, False),
        ("8", {}, 8, True),
        ("8", {"SLURM_GPUS_PER_NODE": "8"}, 8, False),
    ],
)
def test_processes_follow_the_gpus_of_a_node(
    gpus: str, asked_for: dict[str, str], processes: int, step_asks: bool, fakes: Fakes
) -> None:
    """A step that asks for nothing gets only those GPUs that the job itself had asked for."""
    fakes.write("srun", f'echo "$@" >>"$FAKES/srun-arguments"\n{LOCAL_SRUN}')
    fakes.run(SLURM_GPUS_ON_NODE=gpus, **asked_for)
    assert fakes.arguments[fakes.arguments.index("--num_processes") + 1] == str(2 * processes)
    asked = "--gres=gpu:8" in (fakes.directory / "srun-arguments").read_text()
    assert asked == step_asks


def test_containers(fakes: Fakes) -> None:
    fakes.write("srun", LOCAL_SRUN)
    fakes.write("apptainer", LOCAL_SRUN)
    fakes.write("bin/accelerate-launch", SHOW_ARGUMENTS)
    path = {"PATH": f"{fakes.directory}:{fakes.directory}/bin:{os.environ['PATH']}"}
    fakes.run(CONTAINER="apptainer", CONTAINER_IMAGE="dalr.sif", CONTAINER_MOUNTS="/data", **path)
    called = (fakes.directory / "called").read_text()
    assert called.startswith(f"apptainer exec --nv --bind {REPOSITORY},{fakes.directory}/run,/data")
    assert "dalr.sif bash -c" in called
    fakes.write("srun", 'printf "%s\\n" "$@" >>"$FAKES/srun-arguments"')
    fakes.run(CONTAINER="pyxis", CONTAINER_IMAGE="dalr.sqsh", CONTAINER_MOUNTS="/data:/d", **path)
    called = (fakes.directory / "srun-arguments").read_text().splitlines()
    assert "--container-image=dalr.sqsh" in called
    mounts = f"{REPOSITORY}:{REPOSITORY},{fakes.directory}/run:{fakes.directory}/run,/data:/d"
    assert f"--container-mounts={mounts}" in called


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"CONTAINER": "docker"}, "CONTAINER=docker: it is none, apptainer or pyxis"),
        ({"CONTAINER": "pyxis"}, "CONTAINER=pyxis needs CONTAINER_IMAGE"),
        ({"PROCS_PER_NODE": "many"}, "PROCS_PER_NODE=many is not a number"),
        ({"RUN_DIR": "/proc/none"}, "the run directory /proc/none cannot be made"),
        ({"VENV": "/none", "PATH": "{directory}:/usr/bin:/bin"}, "run 'make env', or set VENV"),
        ({"CHECKOUT": "/none"}, "/none/slurm/common.sh"),
    ],
)
def test_a_wrong_variable_is_one_line(variables: dict, problem: str, fakes: Fakes) -> None:
    given = {name: text.format(directory=fakes.directory) for name, text in variables.items()}
    done = fakes.run(**given)
    assert done.returncode == 1 and problem in done.stderr.splitlines()[-1], done.stderr


def test_a_sweep_takes_its_size_from_the_array(fakes: Fakes) -> None:
    fakes.write("srun", LOCAL_SRUN)
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1", "BATCH_SIZES": "64 96"}
    assert fakes.run("sweep_batch.sh", "--config", "x", **array).returncode == 0
    run = f"{fakes.directory}/run/batch_96"
    assert fakes.arguments[-5:] == ["--config", "x", "--batch.global_size=96", "--run.dir", run]
    done = fakes.run("sweep_batch.sh", **(array | {"SLURM_ARRAY_TASK_ID": "2"}))
    assert done.returncode == 1 and "use --array=0-1" in done.stderr


def test_features_and_smoke(fakes: Fakes) -> None:
    fakes.write("srun", LOCAL_SRUN)
    assert fakes.run("features.sh", "shards/a b", "--name", "clip").returncode == 0
    assert fakes.arguments[-5:] == ["dalr_scale", "features", "shards/a b", "--name", "clip"]
    assert fakes.run("smoke.sh", "--run.seed=2").returncode == 0
    module = fakes.arguments.index("-m")
    assert fakes.arguments[module + 1 : module + 5] == [
        "dalr_scale.train",
        "--config",
        "smoke",
        "--run.seed=2",
    ]


# -- when the job is submitted again --------------------------------------------------------------


@pytest.mark.parametrize("restarts", ["", "2"])
@pytest.mark.parametrize(
    ("outcome", "code", "again"),
    [("preempted", 0, True), ("finished", 0, False), ("stopped", 0, False), ("failed", 3, False)],
)
def test_the_own_status_decides(
    restarts: str, outcome: str, code: int, again: bool, fakes: Fakes
) -> None:
    fakes.leave_status(outcome, restarts=int(restarts or 0))
    fakes.write("srun", f"exit {code}")
    assert fakes.run(SLURM_RESTART_COUNT=restarts).returncode == code
    assert fakes.requeued == again


@pytest.mark.parametrize(("job", "restarts"), [("76", 1), ("77", 0), (None, 0)])
def test_a_status_of_another_start_is_not_believed(
    job: str | None, restarts: int, fakes: Fakes
) -> None:
    """Else a job that cannot start would be requeued for ever."""
    fakes.leave_status("preempted", job, restarts)
    fakes.write("srun", "exit 3")
    assert fakes.run(SLURM_RESTART_COUNT="1").returncode == 3
    assert not fakes.requeued


def test_a_job_that_was_asked_is_requeued_silently_of_the_run(fakes: Fakes) -> None:
    fakes.leave_status("finished", "76")
    fakes.write("srun", "kill -USR1 $PPID; sleep 0.3; exit 1")
    assert fakes.run().returncode == 0 and fakes.requeued
    assert (fakes.directory / "run" / "STOP").read_text() == "requeue 77 0\n"


@pytest.mark.parametrize(
    ("preempt_time", "reason"),
    [
        ("2026-01-01T00:00:00", "preempted by Slurm"),
        ("None RunTime=1-00:56:00 TimeLimit=1-01:00:00", "time limit near"),
        ("None RunTime=00:56:00 TimeLimit=UNLIMITED", "signal to the job script"),
    ],
)
def test_the_reason_of_the_stop_is_written_down(
    preempt_time: str, reason: str, fakes: Fakes
) -> None:
    fakes.leave_status("preempted")
    fakes.job_says(f"JobState=RUNNING PreemptTime={preempt_time}")
    fakes.write("srun", "kill -USR1 $PPID; sleep 0.3")
    fakes.run()
    assert fakes.requeued and status_of(fakes)["reason"].startswith(reason)
    assert status_of(fakes)["outcome"] == "preempted"


def test_a_cancelled_job_stays_away(fakes: Fakes) -> None:
    """The ranks take scancel for a preemption; only Slurm knows the difference."""
    fakes.leave_status("preempted")
    fakes.job_says("JobState=COMPLETING PreemptTime=None RunTime=00:01:00 TimeLimit=1-00:00:00")
    fakes.write("srun", "kill -TERM $PPID; sleep 0.3; exit 1")
    assert fakes.run().returncode == 1
    assert not fakes.requeued
    assert status_of(fakes)["outcome"] == "stopped"


@pytest.mark.parametrize(
    ("fields", "again"),
    [
        ("JobState=COMPLETING Restarts=1 TimeLimit=UNLIMITED", False),  # Slurm has done it
        ("JobState=COMPLETING Restarts=0 RunTime=01:00:05 TimeLimit=01:00:00", True),
    ],
)
def test_a_job_that_slurm_ends_for_other_reasons(fields: str, again: bool, fakes: Fakes) -> None:
    fakes.leave_status("preempted")
    fakes.job_says(fields)
    fakes.write("srun", "kill -TERM $PPID; sleep 0.3; exit 1")
    fakes.run()
    assert fakes.requeued == again
    assert status_of(fakes)["outcome"] == "preempted"


def test_a_lost_node_sends_the_job_back(fakes: Fakes) -> None:
    """n2 can start nothing more; with all nodes alive the same failure is one of the run."""
    fakes.leave_status("running")
    probe = 'for w; do [[ $w == --nodelist=n2 ]] && exit 1; done; [[ " $* " == *" true "* ]]'
    fakes.write("srun", probe)
    done = fakes.run()
    assert done.returncode == 0 and fakes.requeued
    assert done.stderr.splitlines()[-1] == "first failure: node n2: it no longer answers"
    (fakes.directory / "requeued").unlink()
    fakes.leave_status("running")
    fakes.write("srun", '[[ " $* " == *" true "* ]]')
    assert fakes.run().returncode == 1 and not fakes.requeued
    fakes.leave_status("running")
    fakes.write("srun", "exit 1")  # nothing answers at all: Slurm is what is broken
    assert fakes.run().returncode == 1 and not fakes.requeued


def test_a_refused_requeue_is_exit_status_85(fakes: Fakes) -> None:
    fakes.leave_status("preempted")
    fakes.job_says("JobState=RUNNING PreemptTime=None", requeue="exit 1")
    assert fakes.run().returncode == 85


def test_restarts_without_progress_end(fakes: Fakes) -> None:
    """The first start and three restarts, all stopped before a new checkpoint."""
    for restart in range(4):
        fakes.leave_status("preempted", restarts=restart)
        (fakes.directory / "requeued").unlink(missing_ok=True)
        done = fakes.run(SLURM_RESTART_COUNT=str(restart))
        assert fakes.requeued == (restart < 3)
        assert done.returncode == (0 if restart < 3 else 1)  # its ranks left with 0
    last = done.stderr.splitlines()[-1]
    assert "no progress over 3 restarts" in last and last.endswith("exit status 1")
    assert status_of(fakes)["outcome"] == "failed"
    assert "no progress over 3 restarts" in status_of(fakes)["reason"]
    # a restart by Slurm itself, after a node failure, is refused as well
    fakes.leave_status("running", restarts=3)
    assert fakes.run(SLURM_RESTART_COUNT="4").returncode == 1
    assert status_of(fakes)["outcome"] == "failed"
    # control: with a new checkpoint each time the job goes on
    fakes.directory.joinpath("run", "jobs", "77.json").unlink()
    for restart in range(6):
        directory = fakes.directory / "run" / "checkpoints" / f"step-{restart + 1}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").touch()
        fakes.leave_status("preempted", restarts=restart)
        (fakes.directory / "requeued").unlink(missing_ok=True)
        fakes.run(SLURM_RESTART_COUNT=str(restart))
        assert fakes.requeued


def test_without_a_status_the_exit_status_is_passed_on(fakes: Fakes) -> None:
    fakes.write("srun", "exit 4")
    assert fakes.run().returncode == 4 and not fakes.requeued


def test_a_site_may_read_variables_that_are_not_set(fakes: Fakes) -> None:
    """Activation scripts do; the job's own scripts stop at them."""
    fakes.write("srun", LOCAL_SRUN)
    setup = 'export FROM_SITE="site$NOWHERE_SET"'
    done = fakes.run(ENV_SETUP=setup)
    assert done.returncode == 0, done.stderr
    assert fakes.environment["FROM_SITE"] == "site"
