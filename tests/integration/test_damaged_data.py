"""Training on data that was damaged after it was indexed: counted, replaced, or stopped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from common import records, status, tiny_config, write_config
from launching import train

from dalr_scale.data.shards.indexing import ensure_index

BAD_LINES = 3  # of 170 sentences: 1.8 %


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data in which three sentences differ from what the index says."""
    directory = shutil.copytree(tiny_data, tmp_path / "data")
    shard = directory / "text-000000.tar"
    index = ensure_index(shard).load()
    before = shard.stat()
    with shard.open("r+b") as file:
        for offset in index.items["offset"][[5, 50, 150]].tolist():
            file.seek(offset)
            file.write(b"#")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    return directory


def run(data: Path, directory: Path, *words: str, ranks: int = 1):
    file = write_config(tiny_config(data), directory / "tiny.toml")
    names = [f"--config={file}", f"--run.dir={directory / f'run-{ranks}'}", *words]
    return train(names, directory / f"log-{ranks}.txt", ranks=ranks)


def test_a_few_bad_rows_are_counted_and_training_goes_on(damaged: Path, tmp_path: Path) -> None:
    words = ("--data.max_bad_fraction=0.02", "--eval.every=0", "--eval.graded_dev=")
    words += ("--optim.steps=14",)  # more than one pass over the 7 text batches
    losses = []
    for ranks in (1, 2):
        outcome = run(damaged, tmp_path, *words, ranks=ranks)
        assert outcome.codes == (0,) * ranks, outcome.output
        directory = tmp_path / f"run-{ranks}"
        assert status(directory)["outcome"] == "finished"
        manifest = json.loads(
            (directory / status(directory)["checkpoint"] / "manifest.json").read_text()
        )
        bad = manifest["state"]["bad_items"]["text"]
        assert 1 <= len(bad) <= BAD_LINES
        assert outcome.output.count("replaced by another item") >= len(bad)
        assert "text-000000.tar: line" in outcome.output
        losses.append((bad, [(r["step"], r["stream"], r["ids"]) for r in records(directory)]))
    assert losses[0] == losses[1]


def test_too_many_bad_rows_stop_the_run_with_their_names(damaged: Path, tmp_path: Path) -> None:
    outcome = run(damaged, tmp_path, "--data.max_bad_fraction=0.005", "--optim.steps=14")
    assert outcome.codes == (2,)
    assert "of the text stream cannot be used, more than data.max_bad_fraction" in outcome.output
    assert "text-000000.tar: line" in outcome.output and "of sample '0000000" in outcome.output
    assert status(tmp_path / "run-1")["outcome"] == "failed"
