"""Worker processes and signals: they outlive a job manager's signals and obey their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dalr_scale.data.shards.writer import write_text_shards

SETUP = """
    import os, sys, time
    from pathlib import Path
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from dalr_scale.data.stream.loader import LoaderOptions, Sources, make_loader
    from dalr_scale.data.stream.order import StreamPlan
    from dalr_scale.data.stream.source import Source

    core = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, "[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    tokenizer(["parallel use before the fork"] * 8)
    text = Source(sorted(Path(sys.argv[1]).glob("*.tar")))
    options = LoaderOptions(total_steps=10**6, max_length=8, num_workers=2)
    plan = StreamPlan(1, 2, text.num_items)
    loader = make_loader(plan, Sources(text, None), tokenizer, options)
    batches = iter(loader)
    for _ in range(4):  # both workers have started when each has delivered
        next(batches)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(*children, flush=True)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_text_shards((f"sentence {n}" for n in range(20)), tmp_path, "t")
    return tmp_path


def start(directory: Path, script: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a process with a running loader and return it with the pids of its workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SETUP) + textwrap.dedent(script), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2, process.communicate()
    return process, workers


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


def test_workers_ignore_signals_and_go_on(directory: Path) -> None:
    process, workers = start(
        directory, "sys.stdin.readline()\nfor _ in range(50): next(batches)\nprint('50 more')"
    )
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        for pid in workers:
            os.kill(pid, number)
    time.sleep(0.3)
    assert not any(map(gone, workers))
    out, error = process.communicate("go\n", timeout=60)
    assert out == "50 more\n"
    assert process.returncode == 0, error
    assert "TOKENIZERS_PARALLELISM" not in error
    assert wait_until_gone(workers, 10)


def test_an_exit_with_an_open_loader_does_not_hang(directory: Path) -> None:
    process, workers = start(directory, "raise RuntimeError('stop')")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert wait_until_gone(workers, 10)


def test_workers_leave_when_their_parent_is_killed(directory: Path) -> None:
    process, workers = start(directory, "time.sleep(600)")
    process.kill()
    process.communicate(timeout=60)
    assert wait_until_gone(workers, 20)


def test_a_killed_worker_is_an_error_not_a_hang(directory: Path) -> None:
    process, workers = start(directory, "sys.stdin.readline()\nfor _ in batches: pass")
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate("go\n", timeout=60)
    assert process.returncode == 1
    assert str(workers[0]) in error
    assert wait_until_gone(workers, 10)


@pytest.mark.soak
def test_plainly_ignoring_the_signal_would_hang_the_exit(directory: Path, monkeypatch) -> None:
    """The control: with SIG_IGN a process that fails with an open loader never ends."""
    ignore = (
        "    import signal, dalr_scale.data.stream.loader as module\n"
        "    module._start_worker = lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    )
    monkeypatch.setattr(
        sys.modules[__name__], "SETUP", SETUP.replace("    core =", f"{ignore}    core =", 1)
    )
    process, workers = start(directory, "raise RuntimeError('stop')")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=20)
    process.kill()
    process.communicate()
    assert wait_until_gone(workers, 20)
