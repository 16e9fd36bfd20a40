"""Mistakes in settings and files: one clear line before training, and nothing written over."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import ORIGIN, PICTURES, as_layer, tiny_config, tiny_layer, tree, write_config

from dalr_scale import train
from dalr_scale.assembly import build_streams
from dalr_scale.cli import run_command
from dalr_scale.config import BatchConfig, build_config
from dalr_scale.data.features_store import write_features
from dalr_scale.errors import UserError
from dalr_scale.ranges import check_arithmetic

Refuse = Callable[..., str]


class NoExit:
    """The command's own view of ``os``; forked loader workers still leave by the real one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _exit(self, code: int) -> None:
        pytest.fail(f"ended by os._exit({code})")


@pytest.fixture
def refuse(
    tiny_data: Path,
    tmp_path: Path,
    same_environment: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refuse:
    """Runs the command with a mistake in a folder that holds work; returns its one line."""
    monkeypatch.delenv("DALR_DATA", raising=False)
    monkeypatch.setattr(train, "os", NoExit())
    file = write_config(tiny_config(tiny_data), tmp_path / "tiny.toml")
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    for name in ("best/model.safetensors", "metrics.jsonl", "before.json", "config.toml"):
        (run / name).write_text("precious")

    def kept() -> dict[str, str]:
        return {n: h for n, h in tree(run).items() if not n.startswith("log/") and n != ".lock"}

    def refuse(*words: str) -> str:
        before = kept()
        code = run_command(train.main, [f"--config={file}", f"--run.dir={run}", *words])
        errors = capsys.readouterr().err
        assert code == 2, errors
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, errors
        assert kept() == before
        return errors[errors.index("error: ") :].strip()

    return refuse


MISTAKES = [
    ("--optim.lr_rate=1", "unknown key in \\[optim\\] 'lr_rate'; did you mean"),
    ("--config.file=none", "unknown section 'config'"),
    ("--batch.micro_size=25", "micro_size = 25 does not fit the 24 rows"),
    ("--data.pairs={shards}/none-*.tar", "none-\\*.tar"),
    ("--data.text=/no/such/folder/text-*.tar", "/no/such/folder"),
    ("--data.pairs=pipe:cat x.tar", "pipe:"),
    ("--teachers.image=features:nope", "train-000000.*nope"),
    ("--teachers.image=clip", "'clip' must be features:NAME or open_clip:FOLDER"),
    ("--teachers.image=hf:/x", "'hf:/x' must be features:NAME or open_clip:FOLDER"),
    ("--teachers.text=minilm", "'minilm' must be features:NAME or hf:FOLDER or open_clip"),
    ("--objective.g2l_norm=axis", "hf:FOLDER teacher, or --objective.g2l_norm=token"),
    ("--teachers.image=", "needs image features: set teachers.image"),
    ("--teachers.image=features:t0 --teachers.image=features:tok", "tok"),
    ("--teachers.text=", "needs a sentence teacher: set teachers.text"),
    ("--teachers.text=hf:/none", "needs its pooler in teachers.text_poolers"),
    ("--teachers.text=hf:/none --teachers.text_poolers=mean", "/none"),
    ("--teachers.text_weights=[0.3, 0.7]", "2 entries for 1 teachers"),
    ("--teachers.tokens=features:t0", "t0"),
    ("--objective.preset=dalr-reference", "--objective.g2l_norm=token"),
    ("--objective.teacher_tokenizer=must_match", "'t0'.*another tokenizer than the student's"),
    ("--objective.image_projection=identity", "encoder is 16 wide and the image features 20"),
    ("--data.tokenizer=", "needs data.tokenizer"),
    ("--data.tokenizer={shards}/none.txt", "none.txt"),
    ("--data.tokenizer={shards}/graded.jsonl", "graded.jsonl"),
    ("--batch.global_size=150", "144 items, fewer than one global batch of 150"),
    ("--batch.global_size=1", "at least 2 rows"),
    ("--data.pairs= --data.text=", "data.pairs and data.text are both empty"),
    ("--data.pairs=", "in data.pairs, or set --objective.preset=simcse"),
    ("--data.pairs= --objective.cross_weight=0", "in data.pairs, or set"),
    ("--data.pair_fraction=0.5 --data.text=", "there is no text stream"),
    ("--eval.graded_dev={shards}/none.jsonl", "none.jsonl"),
    ("--eval.graded_test={shards}/vocab.txt", "vocab.txt"),
    ("--eval.retrieval={shards}/none-*.tar", "none-\\*.tar"),
    ("--eval.tasks=STS-B-dev", "set --data.root or the environment variable DALR_DATA"),
    ("--eval.tasks=STS-B-dev --data.root=/no/such", "/no/such"),
    ("--eval.tasks=STS99 --data.root=/no/such", "STS99"),
    ("--eval.select=STS12", "eval.select = 'STS12' is not one of the tasks graded-dev"),
    ("--model.encoder=/no/such", "exactly one of model.encoder"),
    ("--model.encoder=/no/such --model.architecture={}", "model.encoder brings its own"),
    ("--model.encoder=/no/such --model.architecture={} --data.tokenizer=", "/no/such"),
    ("--model.architecture={}", "exactly one of model.encoder"),
    ("--model.architecture.model_type=brt", "brt"),
    ("--model.architecture.hidden_size=15", "architecture"),
    ("--data.max_length=41", "41 exceeds the encoder's 40 positions"),
    ("--engine.precision=fp64", "fp64 exists on --engine.kind=ddp only"),
    ("--engine.ds_config=/no/such.json", "/no/such.json"),
    ("--data.builder=quickstart --data.builder_options.imges=3", "imges"),
]


@pytest.mark.parametrize(("words", "problem"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_lost(
    words: str, problem: str, refuse: Refuse
) -> None:
    given = ["--" + part.strip() for part in words.split("--") if part]
    message = refuse(*given)
    assert message.count("\n") == 0
    assert re.search(problem, message), message


def test_wrong_folders_are_refused(tiny_data: Path, refuse: Refuse, tmp_path: Path) -> None:
    """A file in the place of the run folder, and a teacher of another width in one shard."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    second = sorted(data.glob("train-*[0-9].tar"))[1]
    values = np.zeros((PICTURES // 2, 5), np.float16)
    write_features(
        second, "img", values, level="sample", manifest_extra=ORIGIN, overwrite=True
    )  # fmt: skip
    assert second.stem in refuse(f"--data.shards={data}")
    (tmp_path / "file").write_text("precious")
    assert "file" in refuse(f"--run.dir={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"
    assert "none.toml" in refuse("--config=" + str(tmp_path / "none.toml"))


def test_features_of_two_widths_cannot_be_mixed(refuse: Refuse) -> None:
    words = ("--teachers.text=features:t0,features:cap", "--objective.teacher_mix=features")
    assert "(12, 20) cannot be mixed" in refuse(*words)


@pytest.mark.parametrize("numbers", list(itertools.product((1, 2, 3), repeat=3)), ids=str)
def test_the_batch_arithmetic_names_its_numbers(numbers: tuple[int, int, int]) -> None:
    size, micro, ranks = numbers
    config = dataclasses.replace(build_config([]), batch=BatchConfig(size, micro))
    if size >= 2 and size % ranks == 0 and micro <= size // ranks:
        assert check_arithmetic(config, ranks) == size // ranks
        return
    with pytest.raises(UserError) as error:
        check_arithmetic(config, ranks)
    message = str(error.value)
    assert f"batch.global_size = {size}" in message or f"batch.micro_size = {micro}" in message
    assert "\n" not in message


def test_ragged_batches_are_kept_on_request(tiny_data: Path) -> None:
    """144 pairs are 6 full batches; 170 sentences are 7 and a rest of 2."""
    keep = tiny_config(tiny_data, {"objective.tail": "keep"})
    drop = tiny_config(tiny_data)
    assert [build_streams(config).plan.n_text for config in (keep, drop)] == [8, 7]


def test_a_shard_without_a_usable_sample_is_named(tiny_data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "text-000009.tar"
    empty.write_bytes(bytes(1024))
    layer = as_layer({"data.text": [str(empty)], "objective.preset": "simcse", "data.pairs": []})
    with pytest.raises(UserError, match="text-000009"):
        build_streams(build_config([tiny_layer(tiny_data), layer]))


def test_the_same_settings_without_a_mistake_are_accepted(tiny_data: Path) -> None:
    """Control for the table above: it is the mistake that is refused."""
    assert build_streams(tiny_config(tiny_data)).total_steps == 12
