"""Building the quickstart: what is written, that nothing leaks, restarts, and refusals."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dalr_scale.data.shards.features_store import open_features
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.stream.source import Source
from dalr_scale.errors import UserError
from dalr_scale.eval.graded import load_graded
from dalr_scale.models.tokenizer import load_tokenizer, unknown_share
from dalr_scale.quickstart import build
from dalr_scale.quickstart.build import QuickstartData, QuickstartSpec, build_quickstart
from dalr_scale.quickstart.scenes import partition
from dalr_scale.quickstart.sheet import contact_sheet
from dalr_scale.quickstart.teachers import CONTEXT_LENGTH
from dalr_scale.teachers.models import load_image_teacher, load_text_teacher

TINY = QuickstartSpec(
    train_scenes=24,
    heldout_scenes=8,
    captions_per_scene=2,
    text_only_captions=20,
    graded_pairs=12,
    teacher_steps=2,
    teacher_batch=8,
    teacher_width=32,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> QuickstartData:
    with pytest.MonkeyPatch.context() as patch:
        # rank 0 of several builds alone: the features command must not take its share only
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "8")
        return build_quickstart(tmp_path_factory.mktemp("quickstart"), TINY, progress=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def scenes_of(shards: list[Path]) -> set[int]:
    texts = [part for shard in shards for part in shard.read_bytes().split(b'{"scene": ')[1:]]
    return {int(text.split(b",")[0]) for text in texts}


def test_everything_is_there(data: QuickstartData):
    features = {"image": "clip", "text0": "clip-text", "tokens": "clip-tokens"}
    train = Source(data.train, features=features, with_images=True)
    assert (train.num_samples, train.num_items) == (24, 48)
    assert all(train.feature_dim(role) == 32 for role in features)
    heldout = Source(data.heldout, features={"image": "clip", "caption": "clip-text"})
    assert heldout.num_samples == 8
    assert Source(data.text).num_items == 20
    assert len(load_graded(data.graded_dev).pairs) == len(load_graded(data.graded_test).pairs) == 12
    directory = data.train[0].parent
    assert expand_shards([str(directory / "train-*.tar")]) == data.train  # not the feature shards
    assert set(data.seconds) == {"data", "tokenizer", "teacher", "features"}


def test_features_are_those_of_the_saved_teacher(data: QuickstartData):
    source = Source(data.train, features={"image": "clip"}, with_images=True)
    records = source.read(np.arange(4))
    teacher = load_text_teacher(f"open_clip:{data.teacher}", tokens=True)
    stored = open_features(data.train[0], "clip-text").read(np.arange(4)).values
    expected, _, _ = teacher.encode(records.sentences)
    np.testing.assert_allclose(stored, expected.numpy(), atol=2e-3)
    assert (teacher.width, teacher.token_width) == (32, 32)
    assert load_image_teacher(f"open_clip:{data.teacher}").width == 32


def test_the_tokenizer_knows_every_sentence(data: QuickstartData):
    tokenizer = load_tokenizer(data.tokenizer)
    sentences = Source(data.train).read(np.arange(48)).sentences
    sentences += [text for pair in load_graded(data.graded_test).pairs for text in pair]
    assert unknown_share(tokenizer, sentences) == 0
    assert tokenizer.pad_token_id == 0
    lengths = [len(tokenizer(sentence)["input_ids"]) for sentence in sentences]
    assert max(lengths) <= CONTEXT_LENGTH


def test_held_out_scenes_were_never_drawn_for_training(data: QuickstartData):
    train, _, test = partition(TINY.seed)
    drawn, held = scenes_of(data.train), scenes_of(data.heldout)
    assert (len(drawn), len(held)) == (24, 8)
    assert drawn <= set(train.tolist()) and held <= set(test.tolist())
    assert not drawn & held


def test_a_second_call_changes_nothing(data: QuickstartData):
    directory = data.teacher.parent
    before = contents(directory)
    again = build_quickstart(directory, TINY, progress=False)
    assert again.seconds == {} and again.train == data.train
    assert contents(directory) == before


def test_the_data_depend_on_the_specification_alone(
    data: QuickstartData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for stage in ("_teach", "_store_features"):
        monkeypatch.setattr(build, stage, lambda *_: None)
    same = build_quickstart(tmp_path / "same", TINY, progress=False)
    for ours, theirs in (
        (same.train, data.train),
        (same.heldout, data.heldout),
        (same.text, data.text),
        ([same.graded_dev], [data.graded_dev]),
    ):
        assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    other = dataclasses.replace(TINY, seed=TINY.seed + 1)
    changed = build_quickstart(tmp_path / "other", other, progress=False)
    assert changed.train[0].read_bytes() != same.train[0].read_bytes()


def test_an_interrupted_stage_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_teach", fail)
        with pytest.raises(KeyboardInterrupt):
            build_quickstart(tmp_path, TINY, progress=False)
    shard = (tmp_path / "train-000000.tar").stat()
    done = build_quickstart(tmp_path, TINY, progress=False)
    assert set(done.seconds) == {"teacher", "features"}
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == shard.st_mtime_ns

    (done.teacher / "model.safetensors").unlink()
    assert set(build_quickstart(tmp_path, TINY, progress=False).seconds) == {"teacher", "features"}


def test_two_jobs_do_not_build_at_once(tmp_path: Path):
    """The second one waits: at its first look the first one has released the directory."""
    holder = """
import fcntl, pathlib, sys, time
directory = pathlib.Path(sys.argv[1])
lock = open(directory / ".lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(0.5)
(directory / "foreign.tar").touch()  # what the one that waited must find
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path], stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"foreign\.tar is not of this program's making"):
            build_quickstart(tmp_path, TINY, progress=False)


def test_foreign_and_other_data_are_refused(data: QuickstartData, tmp_path: Path):
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="not of this program's making"):
        build_quickstart(tmp_path, TINY, progress=False)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"mine"

    directory = data.teacher.parent
    other = QuickstartSpec(**(json.loads((directory / "quickstart.json").read_text())["spec"]))
    assert other == TINY
    with pytest.raises(UserError, match="other settings"):
        build_quickstart(directory, QuickstartSpec(), progress=False)


@pytest.mark.parametrize(
    "wrong", [{"train_scenes": 5000}, {"teacher_width": 40}, {"told_share": 1.5}, {"seed": -1}]
)
def test_impossible_settings_are_refused(wrong: dict):
    with pytest.raises(UserError, match=next(iter(wrong))):
        QuickstartSpec(**wrong)


def test_contact_sheet(tmp_path: Path):
    contact_sheet(tmp_path / "new" / "sheet.png", rows=1, columns=2)
    assert (tmp_path / "new" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
