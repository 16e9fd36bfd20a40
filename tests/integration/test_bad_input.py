"""Mistakes in settings and files: one clear line before training, and nothing written over."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import IMAGES, ORIGIN, as_layer, tiny_config, tiny_layer, tree, write_config

from dalr_scale import train
from dalr_scale.commands import plan
from dalr_scale.config import BatchConfig, build_config
from dalr_scale.config.limits import check_arithmetic
from dalr_scale.data.shards.features_store import write_features
from dalr_scale.errors import UserError
from dalr_scale.estimate import predict
from dalr_scale.process import run_command
from dalr_scale.training import prepared, session
from dalr_scale.training.build import build_streams

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
    """Runs the command with a mistake in a directory that holds work; returns its one line."""
    monkeypatch.delenv("DALR_DATA", raising=False)
    monkeypatch.setattr(session, "os", NoExit())
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
        assert planned([f"--config={file}", f"--run.dir={run}", *words], capsys) == lines[0]
        return errors[errors.index("error: ") :].strip()

    return refuse


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which the dry run refuses the same words; "" where it plans them."""
    code = run_command(plan.main, [*words, "--no-timing", "--device=auto"])
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), errors
    return lines[0] if lines else ""


MISTAKES = [
    ("--optim.lr_rate=1", "unknown key in \\[optim\\] 'lr_rate'; did you mean"),
    ("--config.file=none", "unknown section 'config'"),
    ("--batch.micro_size=25", "micro_size = 25 does not fit the 24 rows"),
    ("--data.pairs={shards}/none-*.tar", "none-\\*.tar"),
    ("--data.text=/no/such/directory/text-*.tar", "/no/such/directory"),
    ("--data.pairs=pipe:cat x.tar", "pipe:"),
    ("--teachers.image=features:nope", "train-000000.*nope"),
    ("--teachers.image=clip", "'clip' must be features:NAME or open_clip:DIRECTORY"),
    ("--teachers.image=hf:/x", "'hf:/x' must be features:NAME or open_clip:DIRECTORY"),
    ("--teachers.text=minilm", "'minilm' must be features:NAME or hf:DIRECTORY or open_clip"),
    ("--objective.g2l_norm=axis", "hf:DIRECTORY teacher, or --objective.g2l_norm=token"),
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
    ("--data.builder=quickstart --data.builder_options.seed=x", "seed = 'x' must be of type int"),
    ("--data.builder=quickstart --data.builder_options.seed=-1", "seed = -1"),
    ("--optim.warmup=12", "optim.warmup = 12 leaves none of the run's 12 steps"),
    ("--optim.steps=0 --optim.epochs=2 --optim.warmup=26", "26 leaves none of the run's 26 steps"),
    ("--optim.steps=12 --optim.epochs=2", "optim.steps = 12 and optim.epochs = 2 both"),
    ("--engine.kind=ddp --engine.ds_config=/x.json", "engine.kind = ddp does not use"),
    ("--engine.kind=ddp --engine.offload_optimizer=true", "not with ddp"),
    ("--engine.ds_config={shards}/graded.jsonl", "graded.jsonl is not valid JSON"),
    ("--engine.ds_config=ds_configs/zero3.json", "is 3, but this run has 2 \\(engine.kind"),
    ("--engine.timeout_minutes=1e22", "engine.timeout_minutes = 1e\\+22 is out of range"),
    ("--run.seed=1234567890123456789012", "run.seed = 1234567890123456789012 is out of range"),
    ("--data.workers=1000000000", "data.workers = 1000000000 is out of range"),
    ("--objective.alternation=reference --data.pair_fraction=0.5", "both say which batches"),
    ("--model.architecture.hidden_size=99999999999", "model.architecture cannot be built"),
    ("--model.architecture.num_attention_heads=0", "model.architecture cannot be built"),
]


@pytest.mark.parametrize(("words", "problem"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_lost(
    words: str, problem: str, refuse: Refuse
) -> None:
    given = ["--" + part.strip() for part in words.split("--") if part]
    message = refuse(*given)
    assert message.count("\n") == 0
    assert re.search(problem, message), message


@pytest.fixture
def no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_world(*_: Any) -> None:
        pytest.fail("a process group was about to start")

    monkeypatch.setattr("dalr_scale.training.session.start_world", start_world)


FROM_SETTINGS = [
    "--batch.micro_size=25",
    "--teachers.image=clip",
    "--teachers.text_weights=[0.3, 0.7]",
    "--model.encoder=/no/such",
    "--optim.warmup=12",
    "--engine.precision=fp64",
    "--engine.ds_config=/no/such.json",
    "--eval.select=STS12",
    "--data.builder=quickstart --data.builder_options.imges=3",
]


@pytest.mark.usefixtures("no_world")
@pytest.mark.parametrize("words", FROM_SETTINGS)
def test_settings_are_refused_before_a_process_group_exists(words: str, refuse: Refuse) -> None:
    assert refuse(*words.split())


# Changes that each are right or wrong for themselves, and in pairs.
CHANGES = [
    *(words for words, _ in MISTAKES if "quickstart" not in words and "hidden_size=9" not in words),
    "--objective.preset=simcse",
    "--objective.preset=mcse",
    "--objective.tail=keep",
    "--data.text_weights=[2]",
    "--data.pair_fraction=0.25",
    "--engine.kind=ddp",
    "--engine.kind=ddp --engine.precision=fp64",
    "--engine.kind=zero3",
    "--engine.ds_config=ds_configs/zero2.json",
    "--batch.global_size=12",
    "--optim.steps=0",
    "--eval.retrieval={shards}/train-*.tar",
    "--eval.graded_test={shards}/graded.jsonl",
    "--model.pooler=cls",
    "--batch.dropout_keys=row",
]


@pytest.mark.parametrize("seed", range(16))
def test_the_dry_run_refuses_what_training_refuses(
    seed: int,
    tiny_data: Path,
    tmp_path: Path,
    same_environment: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random pairs of changes; training is stopped where it would build its optimizer."""

    def accepted(*_: Any) -> None:
        raise UserError("accepted")

    monkeypatch.setattr(prepared, "build_optimizer", accepted)
    monkeypatch.setattr(predict, "loss_bytes_per_row", lambda model, *, paired: 0)
    monkeypatch.setattr(session, "os", NoExit())
    monkeypatch.delenv("DALR_DATA", raising=False)
    file = write_config(tiny_config(tiny_data), tmp_path / "tiny.toml")
    changes = random.Random(seed).sample(CHANGES, 2)
    words = [f"--{part.strip()}" for change in changes for part in change.split("--") if part]
    words = [f"--config={file}", f"--run.dir={tmp_path / 'run'}", *words]
    assert run_command(train.main, words) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert planned(words, capsys) == ("" if line == "error: accepted" else line), words


def test_wrong_directories_are_refused(tiny_data: Path, refuse: Refuse, tmp_path: Path) -> None:
    """A file in the place of the run directory, and a teacher of another width in one shard."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    second = sorted(data.glob("train-*[0-9].tar"))[1]
    values = np.zeros((IMAGES // 2, 5), np.float16)
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
        assert check_arithmetic(config.batch, ranks) == size // ranks
        return
    with pytest.raises(UserError) as error:
        check_arithmetic(config.batch, ranks)
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
