"""What a run depends on: every field counts, files by content, and the message names them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_worlds import SoloWorld, run_ranks
from common import tiny_config

from dalr_scale.config import Config, build_config
from dalr_scale.data.shards.files import shard_names
from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.errors import UserError
from dalr_scale.training.build import build_streams
from dalr_scale.training.fingerprint import (
    changes,
    check_fingerprint,
    file_contents,
    run_fingerprint,
    settings_of,
)

SAVED = {
    "versions": {"torch": "2.15.0", "deepspeed": "0.19.8", "triton": None},
    "optimizer": {"betas": [0.9, 0.999], "lr": 3e-5},
    "objective": {"preset": "dalr"},
}


def leaves(tree: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, value in tree.items():
        inner = (*prefix, name)
        found += leaves(value, inner) if isinstance(value, dict) else [inner]
    return found


@pytest.mark.parametrize("path", leaves(SAVED), ids=".".join)
@pytest.mark.parametrize("change", ["other", "removed"])
def test_every_field_of_the_fingerprint_counts(path: tuple[str, ...], change: str) -> None:
    now = json.loads(json.dumps(SAVED))
    if change == "other":
        now[path[0]][path[1]] = "other"
    else:
        del now[path[0]][path[1]]
    with pytest.raises(UserError, match=r"\.".join(path) + ": checkpoint "):
        check_fingerprint(SAVED, now, allow_change=False)
    lines = check_fingerprint(SAVED, now, allow_change=True)
    assert len(lines) == 1 and lines[0].startswith(".".join(path))


def test_equal_fingerprints_pass_also_with_tuples() -> None:
    now = SAVED | {"optimizer": {"lr": 3e-5, "betas": (0.9, 0.999)}}
    assert check_fingerprint(SAVED, now, allow_change=False) == []


# Of a run


def of(config: Config, world: Any = None, precision: str = "fp32") -> dict[str, Any]:
    streams = build_streams(config)
    found = run_fingerprint(
        config,
        world or SoloWorld(),
        precision=precision,
        total_steps=streams.total_steps,
        data=streams.fingerprint,
        shards=streams.contents,
    )
    return json.loads(json.dumps(found))


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_data, tmp_path / "data")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    directory = tmp_path / "encoder"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / ".cache").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"):
        (directory / name).write_text(name)
    for name in ("README.md", ".cache/x.json"):
        (directory / name).write_text(name)
    return directory


def test_moved_and_renamed_files_are_the_same(data: Path, tmp_path: Path) -> None:
    saved = of(tiny_config(data))
    moved = tmp_path / "moved"
    shutil.move(data, moved)
    text = sorted(moved.glob("text-*.tar"))[0]
    text.rename(moved / "text-zz.tar")
    (moved / "vocab.txt").rename(moved / "words.txt")
    now = of(tiny_config(moved, {"data.tokenizer": str(moved / "words.txt")}))
    assert changes(saved, now) == []


def test_each_changed_file_is_named(data: Path, encoder: Path) -> None:
    teachers = {"teachers.text": [f"hf:{encoder}", "features:t0"]}
    config = tiny_config(data, teachers | {"engine.ds_config": str(data / "ds.json")})
    (data / "ds.json").write_text("{}")
    saved = of(config)
    assert check_fingerprint(saved, of(config), allow_change=False) == []

    (data / "vocab.txt").write_text((data / "vocab.txt").read_text() + "x")
    (data / "ds.json").write_text("{ }")
    (data / "graded.jsonl").write_text("")
    (encoder / "config.json").write_text("other")
    (encoder / "README.md").write_text("other")
    write_text_shards(["baa bab"] * 3, data, "text-new", per_member=3)
    assert changes(saved, of(config)) == [
        "data.text: text-new-000000.tar added",
        "data.tokenizer: vocab.txt changed",
        "engine.ds_config: ds.json changed",
        "eval.graded_dev: graded.jsonl changed",
        "teachers.text[0]: config.json changed",
    ]
    (data / "train-000001.tar").unlink()
    assert "train-000001.tar removed" in changes(saved, of(config))[0]


def test_another_feature_set_is_named_with_its_shard(data: Path) -> None:
    saved = of(tiny_config(data))
    config = tiny_config(data, {"teachers.text": ["features:cap"]})
    lines = changes(saved, of(config))
    assert any(line.startswith("config.teachers.text") for line in lines)
    wanted = "train-000000.tar (text0 features) changed, train-000001.tar (text0 features) changed"
    assert f"data.pairs: {wanted}" in lines


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_encoder_counts_with_every_file_that_is_read(
    name: str, data: Path, encoder: Path
) -> None:
    changed = {"model.encoder": str(encoder), "model.architecture": {}, "data.tokenizer": ""}
    config = tiny_config(data, changed)
    saved = of(config)
    assert set(saved["contents"]["model.encoder"]) == {
        *("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json")
    }
    (encoder / name).write_text("other")
    assert changes(saved, of(config)) == [f"model.encoder: {name} changed"]


def test_models_that_are_no_paths_count_by_their_name(data: Path) -> None:
    config = tiny_config(data, {"teachers.image": "open_clip:ViT-B-32@absent-tag/x/y"})
    assert file_contents(config)["teachers.image"] == {"ViT-B-32@absent-tag/x/y": "by its name"}


def test_versions_of_kernels_and_file_formats_count(data: Path) -> None:
    saved = of(tiny_config(data))
    names = ("dalr_kernels", "tokenizers", "safetensors")
    assert all(saved["versions"][name] for name in names)
    assert "open_clip_torch" not in saved["versions"]
    online = tiny_config(data, {"teachers.caption": "open_clip:x", "model.pooler": "mean"})
    assert "open_clip_torch" in of(online)["versions"]


@pytest.mark.parametrize(
    ("changed", "precision", "named"),
    [
        ({"optim.name": "sgd"}, "fp32", 'optim.name: checkpoint "adamw", now "sgd"'),
        ({"engine.kind": "zero3"}, "fp32", 'engine.kind: checkpoint "zero2", now "zero3"'),
        ({}, "bf16", 'precision: checkpoint "fp32", now "bf16"'),
    ],
)
def test_what_no_resume_can_change_is_refused_even_if_allowed(
    changed: dict[str, Any], precision: str, named: str, data: Path
) -> None:
    saved = of(tiny_config(data))
    with pytest.raises(UserError, match="no resume can change this") as caught:
        check_fingerprint(saved, of(tiny_config(data, changed), None, precision), allow_change=True)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    free = of(tiny_config(data, {"optim.lr": 1.0}))
    assert len(check_fingerprint(saved, free, allow_change=True)) == 1  # control


def test_a_checkpoint_of_an_earlier_version_says_what_it_lacks(data: Path) -> None:
    config = tiny_config(data)
    saved = of(config)
    old = {key: value for key, value in saved.items() if key not in ("contents", "precision")}
    old["config"] = json.loads(json.dumps(dataclasses.asdict(config)))
    for section in ("log", "save"):
        del old["config"][section]
    old["config"]["run"] = saved["config"]["run"]
    old["config"]["engine"] = {**saved["config"]["engine"], "ds_config": ""}
    for key in ("root", "shards", "workers", "max_bad_fraction", "remote", "cache"):
        del old["config"]["data"][key]
    lines = check_fingerprint(old, saved, allow_change=True)
    assert lines[0] == 'precision: checkpoint absent, now "fp32"'
    assert lines[1].startswith("contents: not recorded in this checkpoint") and len(lines) == 2


def test_rank_0_reads_and_all_ranks_know(data: Path) -> None:
    config = tiny_config(data)
    (one, two) = run_ranks(2, lambda world: of(config, world))
    assert one == two == of(config)
    (data / "vocab.txt").chmod(0)
    (data / "vocab.txt").unlink()
    (data / "vocab.txt").mkdir()
    (data / "vocab.txt" / "x.json").symlink_to("x.json")
    assert of(config)["contents"]["data.tokenizer"] == {}


def test_equal_shard_names_are_told_apart() -> None:
    shards = [Path("a/x.tar"), Path("b/x.tar"), Path("y.tar"), Path("c/a/x.tar")]
    assert shard_names(shards) == ["a/x.tar (0)", "b/x.tar", "y.tar", "a/x.tar (3)"]


def test_what_an_empty_setting_stands_for_is_recorded(tiny_data: Path) -> None:
    """Another default of a later version then shows as a change, by name."""
    two = tiny_config(tiny_data, {"model.pooler": "", "teachers.text": ["features:a", "hf:b"]})
    settings = settings_of(two)
    assert settings["model"]["pooler"] == "mean"
    assert settings["teachers"]["text_weights"] == [0.33, 0.67]
    before = {"config": settings | {"model": settings["model"] | {"pooler": ""}}}
    (line,) = changes(before, {"config": settings})
    assert line == 'config.model.pooler: checkpoint "", now "mean"'


def test_a_run_from_before_there_were_added_terms_continues() -> None:
    now = {"config": settings_of(Config())}
    saved = json.loads(json.dumps(now))
    assert saved["config"]["objective"].pop("terms") == {}
    assert changes(saved, now) == []
    added = build_config([{"objective": {"terms": {"uniformity": 0.1}}}])
    (line,) = changes(saved, {"config": settings_of(added)})  # control
    assert line == "config.objective.terms.uniformity: checkpoint absent, now 0.1"
