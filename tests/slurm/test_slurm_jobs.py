"""The job scripts on a real Slurm with eight nodes.

Jobs are finished, preempted, cancelled, out of time, with a node killed, on fewer nodes, wrong from
the start, and without progress.

The tests stand in the order in which they run: one run, `chain`, is disturbed in four ways one
after the other and must end as the undisturbed one. Slurm holds a requeued job back for a while;
short jobs that other tests need run meanwhile. Dropout is off, so that the same holds on four
nodes; with dropout it is shown by `test_preemption_soak.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from common import history, records, status, tiny_config, weights_hash
from jobs import REPOSITORY, SECRET, START, STEPS, Job, Jobs, files_with, write_recipe
from launching import train

from dalr_scale.training.build import build_streams

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2 * START)]
FAIL_WITHIN = 60  # seconds from the start of a job that cannot work


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, directory: Path) -> Jobs:
    return Jobs(cluster, directory)


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, directory: Path) -> str:
    return f"--config={write_recipe(tiny_data, directory / 'tiny.toml')}"


@pytest.fixture(scope="module")
def reference(jobs: Jobs, recipe: str) -> Job:
    """The undisturbed run on eight nodes."""
    job = jobs.submit("reference", recipe)
    assert job.wait_for_end() == "COMPLETED", job.output[-4000:]
    return job


@pytest.fixture(scope="module")
def stuck(jobs: Jobs, recipe: str) -> Job:
    """Alone on its node, and told to leave each time while it starts, before it could train."""
    told = '[[ -z ${SLURM_STEP_ID:-} ]] || scancel --batch --signal=USR1 "$SLURM_JOB_ID"'
    options = ("--partition=side",)
    setup = {"ENV_SETUP": told}
    return jobs.submit("stuck", recipe, options=options, script="train_1node.sh", environment=setup)


@dataclass
class Chain:
    """The jobs of the disturbed run so far, newest last, and the step at which it was stopped."""

    jobs: list[Job]
    step: int = 0

    @property
    def job(self) -> Job:
        return self.jobs[-1]


@pytest.fixture(scope="module")
def chain(jobs: Jobs, recipe: str, reference: Job, stuck: Job) -> Iterator[Chain]:
    chain = Chain([])
    yield chain
    for job in chain.jobs:
        if job.field("JobState") in ("RUNNING", "PENDING"):
            jobs.cluster.ask("scancel", job.number)


def same_until_now(run: Path, reference: Path) -> None:
    """Every step so far has the reference's batch and, to the last bit, its loss."""
    found = history(run)
    assert found == history(reference)[: len(found)]


# -- an undisturbed run ---------------------------------------------------------------------------


def test_eight_nodes_train_like_eight_processes(
    reference: Job, recipe: str, directory: Path
) -> None:
    log = directory / "host.log"
    host = train([recipe, f"--run.dir={directory / 'host'}"], log, ranks=8, patience=START)
    assert set(host.codes) == {0}, host.output[-4000:]
    for rank in range(8):
        assert f"rank {rank}: rank {rank} of a world of 8 on cpu" in reference.output
        assert (reference.run / "log" / f"rank{rank}.log").is_file()
    found, wanted = history(reference.run), history(directory / "host")
    assert [line[:3] for line in found] == [line[:3] for line in wanted]
    assert len(found) == STEPS
    losses = [[float.fromhex(line[3]) for line in lines] for lines in (found, wanted)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"largest difference of a step's loss: {difference:.1e}")
    assert difference <= 1e-6
    assert status(reference.run)["outcome"] == "finished"


def test_the_nodes_were_checked_and_leave_no_cache(reference: Job) -> None:
    assert "doctor: 8 nodes agree" in reference.output
    scratch = Path(os.environ.get("TMPDIR", "/tmp"))
    assert not list(scratch.glob(f"dalr-{reference.number}-*"))
    assert "outcome: finished" in reference.output


def test_every_node_gives_its_gpus_to_the_processes(reference: Job) -> None:
    """They came with --exclusive; a step that does not ask for them gets none."""
    for node in range(8):
        header = (reference.run / "log" / f"node{node}.log").read_text().splitlines()[0]
        assert f" node n{node + 1} GPUs 0 " in header


# -- one run, disturbed again and again -----------------------------------------------------------


def test_a_cancelled_job_ends_cleanly(jobs: Jobs, recipe: str, chain: Chain, reference: Job):
    job = jobs.submit("chain", recipe)
    chain.jobs.append(job)
    job.wait_for_steps(8)
    jobs.cluster.ask("scancel", job.number)
    assert job.wait_for_end(90) == "CANCELLED"
    job.wait_until_gone()
    after = status(job.run)
    assert (after["outcome"], after["reason"]) == ("stopped", "cancelled (scancel)")
    chain.step = after["step"]
    assert after["checkpoint"] == f"checkpoints/step-{chain.step}" and chain.step >= 8
    same_until_now(job.run, reference.run)


def test_a_preempted_job_saves_in_time_and_is_requeued(
    jobs: Jobs, recipe: str, chain: Chain, reference: Job
) -> None:
    job = jobs.submit("chain", recipe)
    chain.jobs.append(job)
    job.wait_for_steps(chain.step + 4)
    urgent = jobs.preempt()
    job.wait_until_requeued(1)
    assert jobs.cluster.wait_for_end(urgent, 60) == "COMPLETED"
    stopped = status(job.run)
    assert (stopped["outcome"], stopped["reason"]) == ("preempted", "preempted by Slurm")
    asked = (job.run / "STOP").stat().st_mtime  # the signal; the checkpoint is older than this
    saved = (job.run / stopped["checkpoint"] / "manifest.json").stat().st_mtime
    print(f"checkpoint {saved - asked:.1f} s after the signal, grace {jobs.cluster.grace} s")
    assert 0 < saved - asked < jobs.cluster.grace / 2
    assert chain.step < stopped["step"] < STEPS
    chain.step = stopped["step"]
    jobs.cluster.ask("scontrol", "hold", job.number)  # other tests want the nodes meanwhile
    same_until_now(job.run, reference.run)


@pytest.fixture(scope="module")
def other_version(directory: Path) -> dict[str, str]:
    """Node n5 finds another version of accelerate before the installed one."""
    info = directory / "other" / "accelerate-1.15.99.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 1.15.99\n")
    path = f"{directory / 'other'}:$PYTHONPATH"
    return {"ENV_SETUP": f'if [[ $SLURMD_NODENAME == n5 ]]; then export PYTHONPATH="{path}"; fi'}


MISTAKES = {
    "wrong-config": (("--optim.lr_rate=1",), {}, "unknown key in [optim] 'lr_rate'"),
    "wrong-batch": (("--batch.global_size=25",), {}, "equal shares for 8 ranks"),
    "missing-shards": (("--data.pairs=/no/such/train-*.tar",), {}, "/no/such/train-*.tar"),
    "no-output": ((), {"RUN_DIR": "/proc/none/run"}, "run directory /proc/none/run cannot be made"),
    "other-version": ((), None, "node n5: accelerate is 1.15.99, on the other nodes "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_the_job_at_once(
    name: str, jobs: Jobs, recipe: str, other_version: dict[str, str]
) -> None:
    words, environment, reason = MISTAKES[name]
    environment = other_version if environment is None else environment
    job = jobs.submit(name, recipe, *words, environment=environment)
    assert job.wait_for_end(120) == "FAILED"
    print(f"{name}: failed after {job.seconds():.0f} s")
    assert job.seconds() < FAIL_WITHIN
    assert reason in "\n".join(job.output.splitlines()[-4:]), job.output[-3000:]
    job.wait_until_gone()
    assert job.field("Restarts") == "0"


def test_a_job_out_of_time_saves_and_runs_again(jobs: Jobs, chain: Chain, reference: Job) -> None:
    """The limit is put so near that Slurm's next look, within half a minute, sends the signal."""
    job = chain.job
    jobs.cluster.ask("scontrol", "release", job.number)
    job.wait_for_steps(chain.step + 4, restarts=1)
    now = status(job.run)
    assert now["restart_count"] == 1 and now["outcome"] == "running"
    last = now["last_stop"]
    assert (last["outcome"], last["reason"]) == ("preempted", "preempted by Slurm")
    assert (last["step"], last["restart_count"]) == (chain.step, 0)
    assert f"resumed at step {chain.step}" in job.output
    frozen = job.rank_process("n8")
    os.kill(frozen, signal.SIGSTOP)  # the run must not be over by then
    try:
        running = time.time() - datetime.fromisoformat(job.field("StartTime")).timestamp()
        minutes = int(running // 60) + 3  # the script's signal comes 5 minutes before the end
        jobs.cluster.ask("scontrol", "update", f"jobid={job.number}", f"timelimit={minutes}")
        jobs.cluster.wait((job.run / "STOP").exists, 90, "the signal")
    finally:
        os.kill(frozen, signal.SIGCONT)
    job.wait_until_requeued(2)
    stopped = status(job.run)
    assert stopped["outcome"] == "preempted" and "time limit near" in stopped["reason"]
    assert chain.step < stopped["step"] < STEPS
    chain.step = stopped["step"]
    asked = (job.run / "STOP").stat().st_mtime
    saved = (job.run / stopped["checkpoint"] / "manifest.json").stat().st_mtime
    assert 0 < saved - asked < 60
    jobs.cluster.ask("scontrol", "update", f"jobid={job.number}", "timelimit=UNLIMITED")
    jobs.cluster.ask("scontrol", "hold", job.number)
    same_until_now(job.run, reference.run)


def test_the_rank_that_failed_first_is_named(jobs: Jobs, recipe: str) -> None:
    """Killed as the kernel kills what takes too much memory; its peer's error is an echo."""
    job = jobs.submit("killed", recipe, options=("--nodes=2",))
    job.wait_for_steps(3)
    node = jobs.cluster.ask("scontrol", "show", "hostnames", job.field("NodeList")).split()[1]
    os.kill(job.rank_process(node), signal.SIGKILL)
    assert job.wait_for_end(120) == "FAILED"
    job.wait_until_gone()
    assert f"first failure: node {node}, rank 1: killed by SIGKILL" in job.output


def test_a_killed_node_sends_the_job_back(jobs: Jobs, chain: Chain, reference: Job) -> None:
    job = chain.job
    jobs.cluster.ask("scontrol", "release", job.number)
    job.wait_for_steps(chain.step + 4, restarts=2)
    assert jobs.cluster.kill_node(3) >= 3  # launcher, rank and shell
    job.wait_until_requeued(3)
    job.wait_until_gone()
    assert "first failure: node n3: it no longer answers" in job.output
    assert status(job.run)["outcome"] == "failed"
    same_until_now(job.run, reference.run)


def test_fewer_nodes_go_on_where_eight_were(
    jobs: Jobs, recipe: str, chain: Chain, reference: Job, tiny_data: Path
) -> None:
    """While n3 is away: another job takes a copy of the run to its end, on four nodes."""
    run = shutil.copytree(chain.job.run, jobs.directory / "four")
    for name in ("status.json", ".lock"):  # the copy belongs to nobody yet
        (run / name).unlink(missing_ok=True)
    job = jobs.submit("four", recipe, options=("--nodes=4",))
    assert job.wait_for_end() == "COMPLETED", job.output[-4000:]
    assert "rank 3 of a world of 4" in job.output
    assert "saved by 8 ranks, continuing with 4" in job.output
    found, wanted = history(run), history(reference.run)
    assert [line[:3] for line in found] == [line[:3] for line in wanted]
    pairs = [(float.fromhex(a[3]), float.fromhex(b[3])) for a, b in zip(found, wanted, strict=True)]
    worst = max(abs(one - other) for one, other in pairs)
    print(f"largest difference of a step's loss on four nodes: {worst:.1e}")
    assert worst <= 1e-5
    plan = build_streams(tiny_config(tiny_data)).plan
    for kind, batches in (("text", plan.n_text), ("pair", plan.n_pair)):
        steps = [s for s in range(len(found)) if plan.kind(s) == kind]
        for start in range(0, len(steps) - batches + 1, batches):  # every whole pass
            items = [int(i) for s in steps[start : start + batches] for i in plan.batch_ids(s)]
            assert len(items) == len(set(items)) == batches * 24


def test_the_disturbed_run_ends_as_the_undisturbed_one(
    jobs: Jobs, chain: Chain, reference: Job
) -> None:
    jobs.cluster.start_node(3)
    job = chain.job
    assert job.wait_for_end() == "COMPLETED", job.output[-4000:]
    assert int(job.field("Restarts")) == 3
    assert status(job.run)["outcome"] == "finished" and status(job.run)["restart_count"] == 3
    assert history(job.run) == history(reference.run)
    assert weights_hash(job.run / "final") == weights_hash(reference.run / "final")


def test_a_cancelled_job_stays_away(chain: Chain) -> None:
    """Long after Slurm would have started a requeued job again."""
    assert chain.jobs[0].field("JobState") == "CANCELLED" and chain.jobs[0].field("Restarts") == "0"


def test_a_job_that_leads_nowhere_gives_up(stuck: Job, chain: Chain) -> None:
    """The job of `chain` is the control: as many restarts, but each from another checkpoint."""
    assert stuck.wait_for_end() == "FAILED", stuck.output[-3000:]
    assert int(stuck.field("Restarts")) == int(chain.job.field("Restarts")) == 3
    assert stuck.steps() == 0
    reason = f"no progress over 3 restarts: the newest checkpoint of {stuck.run} is still that of"
    assert reason in stuck.output.splitlines()[-1]
    after = status(stuck.run)
    assert after["outcome"] == "failed" and after["reason"].startswith(reason)
    stuck.wait_until_gone()


# -- at the very end ------------------------------------------------------------------------------


def test_no_secret_was_written(jobs: Jobs, reference: Job) -> None:
    """Slurm keeps its users' environment in its own state directory; nothing of ours does."""
    assert files_with(jobs.cluster.directory / "state", SECRET)  # control: it was there to be found
    assert files_with(jobs.directory, SECRET) == []
    for path in REPOSITORY.iterdir():
        if path.is_dir() and path.name not in (".git", ".venv", "tests"):
            assert files_with(path, SECRET) == []
    assert not (REPOSITORY / ".deepspeed_env").exists()
    assert {r["kind"] for r in records(reference.run)} == {"train"}  # and the scan saw a run
