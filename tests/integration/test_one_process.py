"""Several trainings in one Python process, as in a notebook or a search over settings."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from common import history, tiny_config, tree, weights_hash, write_config
from launching import accelerate, fork, train

QUICK = ("--optim.steps=2", "--eval.every=0", "--save.every_steps=1", "--data.workers=0")
SEQUENCE = (
    ("zero3", "fp32"),
    ("ddp", "fp64"),
    ("zero2", "bf16"),
    ("zero1", "fp32"),
    ("zero3", "fp32"),
)
FOREIGN = {
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def _in_sequence(calls: list[list[str]], directory: str, environment: dict[str, str]) -> None:
    """Runs the command once for each call; exit statuses, output and the environment after it."""
    from dalr_scale.process import run_command
    from dalr_scale.train import main

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(directory)
    multiprocessing.set_start_method("fork", force=True)
    before, found = dict(os.environ), []
    for call in calls:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run_command(main, call)
        found.append((status, out.getvalue() + err.getvalue()))
    names = {n for n in before.keys() | os.environ if before.get(n) != os.environ.get(n)}
    result = {"calls": found, "environment": sorted(names)}
    Path(directory, "found.json").write_text(json.dumps(result))
    os._exit(0)


def in_sequence(calls: list[list[str]], directory: Path, environment: dict[str, str] | None = None):
    process = fork(_in_sequence, calls, str(directory), environment or {})
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
    return json.loads((directory / "found.json").read_text())


def test_engines_and_precisions_follow_each_other(tiny_data: Path, tmp_path: Path) -> None:
    """Each run is the one that a process of its own makes, whatever ran before it."""
    file = write_config(tiny_config(tiny_data), tmp_path / "tiny.toml")
    calls = [
        [
            *(f"--config={file}", f"--run.dir={tmp_path / str(number)}", *QUICK),
            *(f"--engine.kind={kind}", f"--engine.precision={precision}"),
        ]
        for number, (kind, precision) in enumerate(SEQUENCE)
    ]
    again = [*calls[2], "--run.from_scratch=true"]
    found = in_sequence([*calls, again], tmp_path)
    assert [status for status, _ in found["calls"]] == [0] * 6, found["calls"]
    assert not {n for n in found["environment"] if n.startswith(("ACC", "MAS", "RANK", "WORLD"))}
    assert history(tmp_path / "0") == history(tmp_path / "4")
    assert history(tmp_path / "2") == history(tmp_path / "2.old-1")
    words = [word.replace(f"={tmp_path / '2'}", f"={tmp_path / 'fresh'}") for word in calls[2]]
    outcome = train(words, tmp_path / "fresh.log")
    assert outcome.codes == (0,), outcome.output
    assert history(tmp_path / "fresh") == history(tmp_path / "2")
    assert weights_hash(tmp_path / "fresh/final") == weights_hash(tmp_path / "2/final")


@pytest.mark.parametrize("kind", ["zero2", "ddp"])
def test_a_launchers_configuration_changes_nothing(
    kind: str, tiny_data: Path, tmp_path: Path
) -> None:
    file = write_config(tiny_config(tiny_data), tmp_path / "tiny.toml")
    words = [f"--config={file}", *QUICK, f"--engine.kind={kind}"]
    plain = train([*words, f"--run.dir={tmp_path / 'plain'}"], tmp_path / "plain.log")
    asked = train(
        [*words, f"--run.dir={tmp_path / 'asked'}"], tmp_path / "asked.log", environment=FOREIGN
    )
    assert plain.codes == asked.codes == (0,), asked.output
    assert history(tmp_path / "plain") == history(tmp_path / "asked")
    assert weights_hash(tmp_path / "plain/final") == weights_hash(tmp_path / "asked/final")
    assert "ignored from the launcher's configuration" in asked.output
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR" in asked.output
    assert "ignored from" not in plain.output


def test_contents_decide_whether_a_run_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    """One process: what changed is named and nothing is touched; moved data are the same data."""
    import shutil

    data, moved, run = tmp_path / "data", tmp_path / "moved", tmp_path / "home" / "run"
    shutil.copytree(tiny_data, data)
    shutil.copytree(tiny_data, moved)
    other = shutil.copytree(tiny_data, tmp_path / "other")
    lines = (other / "vocab.txt").read_text().splitlines()
    (other / "vocab.txt").write_text("\n".join([*lines[:5], *reversed(lines[5:])]))
    more = shutil.copytree(tiny_data, tmp_path / "more")
    from dalr_scale.data.shards.writer import write_text_shards

    write_text_shards(["baa bab bac"] * 3, more, "text-new", per_member=3)
    file = write_config(tiny_config(tiny_data), tmp_path / "tiny.toml")
    base = [f"--config={file}", "--run.dir=~/run", *QUICK, "--engine.kind=ddp"]
    scratch = "--run.from_scratch=true"
    limit = "--run.max_minutes=0.00001"  # stops at once, with a checkpoint of step 0

    def words(where: Path, *further: str) -> list[str]:
        return [*base, f"--data.shards={where}", *further]

    found = in_sequence(
        [
            words(data, limit),
            words(other),
            words(more),
            words(other, scratch, "--eval.graded_dev=absent.jsonl", "--eval.every=1"),
            words(moved),
            words(other),
            words(moved),
        ],
        tmp_path,
        {"HOME": str(tmp_path / "home")},
    )["calls"]
    first, vocabulary, shard, late, goes_on, finished, shown = found
    assert first[0] == 0 and not (tmp_path / "~").exists()
    assert vocabulary[0] == 2 and "data.tokenizer: vocab.txt changed" in vocabulary[1]
    assert shard[0] == 2 and "data.text: text-new-000000.tar added" in shard[1]
    assert late[0] == 2 and not (tmp_path / "home" / "run.old-1").exists(), "refused, not moved"
    assert goes_on[0] == 0, goes_on
    assert finished[0] == 2 and "data.tokenizer: vocab.txt changed" in finished[1]
    assert shown[0] == 0 and "is finished" in shown[1]

    shutil.rmtree(run / "checkpoints")
    (run / "status.json").unlink()
    before = {name: h for name, h in tree(run).items() if not name.startswith("log/")}
    home = {"HOME": str(tmp_path / "home")}
    gone, again = in_sequence([words(moved), words(moved, scratch)], tmp_path, home)["calls"]
    assert gone[0] == 2 and "metrics.jsonl has 2 steps" in gone[1] and scratch in gone[1]
    aside = {n: h for n, h in tree(run.with_name("run.old-1")).items() if not n.startswith("log/")}
    assert again[0] == 0 and aside == before


SCRIPT = """
import sys
from dalr_scale.process import run_command
from dalr_scale.train import main
for name in ("first", "second"):
    assert run_command(main, [*sys.argv[1:], f"--run.name={name}"]) == 0
"""


def test_several_ranks_train_twice(tiny_data: Path, tmp_path: Path) -> None:
    """The second process group must not read what the first one left in the launcher's store."""
    (tmp_path / "twice.py").write_text(SCRIPT)
    file = write_config(tiny_config(tiny_data), tmp_path / "a.toml")
    words = ("--use_deepspeed", "--num_processes=2", str(tmp_path / "twice.py"))
    with contextlib.chdir(tmp_path):  # where runs/NAME is
        done = accelerate(*words, f"--config={file}", *QUICK)
    assert done.returncode == 0, done.stdout
    assert history(tmp_path / "runs/second") == history(tmp_path / "runs/first")
