"""Damage to checkpoints is found, named, and never costs the older ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_worlds import SoloWorld, flip_bit, forge_manifest, save, state_at
from hypothesis import given, settings
from hypothesis import strategies as st

from dalr_scale.errors import UserError
from dalr_scale.run import manifest
from dalr_scale.run.checkpoint import Checkpoint, find_checkpoint, prune
from dalr_scale.run.manifest import MANIFEST, MANIFEST_SUM, _sum_line, read_manifest, verify
from dalr_scale.run.status import read_status

FILES = [MANIFEST, MANIFEST_SUM, "latest", "weights.safetensors", "model/shard0.bin"]
WORLD = SoloWorld()


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """Syncing costs a slow disk 30 ms a file; test_checkpoint_faults.py shows that it is done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two good checkpoints."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def found(run: Path) -> Checkpoint:
    checkpoint = find_checkpoint(run, WORLD)
    assert checkpoint is not None
    return checkpoint


def test_newest_is_found_with_its_state(run: Path) -> None:
    checkpoint = found(run)
    assert checkpoint.path == run / "checkpoints" / "step-2"
    assert checkpoint.state == state_at(2)
    assert checkpoint.fingerprint == {"torch": "2.15"}
    assert {entry.path for entry in checkpoint.manifest.files} == set(FILES[2:])
    assert read_status(run)["checkpoint"] == "checkpoints/step-2"  # type: ignore[index]


def test_steps_are_ordered_as_numbers(run: Path) -> None:
    save(run, 10)
    assert found(run).step == 10


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, WORLD) is None


def test_the_sum_file_works_with_the_usual_tool(run: Path) -> None:
    command = ["sha256sum", "-c", MANIFEST_SUM]
    subprocess.run(command, cwd=run / "checkpoints" / "step-2", check=True, capture_output=True)


@pytest.mark.parametrize("share", [0, 1, 50, 99])
@pytest.mark.parametrize("name", FILES)
def test_truncation_falls_back(
    run: Path, name: str, share: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoints" / "step-2" / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * share // 100])
    assert found(run).step == 1
    assert name in caplog.text and "sha256" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_deleted_file_falls_back(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "step-2" / name).unlink()
    assert found(run).step == 1
    assert name in caplog.text


def test_a_hundred_flipped_bits_are_a_hundred_finds(run: Path) -> None:
    draw = random.Random(5)
    directory = run / "checkpoints" / "step-2"
    for number in range(100):
        path = directory / FILES[number % len(FILES)]
        bit = draw.randrange(8 * path.stat().st_size)
        flip_bit(path, bit)
        assert verify(directory, WORLD)[1], f"bit {bit} of {path.name} not noticed"
        flip_bit(path, bit)
    assert not verify(directory, WORLD)[1]


def test_control_without_the_hash_a_flipped_bit_passes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(run / "checkpoints" / "step-2" / "weights.safetensors", 77)
    assert found(run).step == 1
    monkeypatch.setattr(manifest, "check_file", lambda directory, entry: None)
    assert found(run).step == 2


def test_rejection_names_file_expected_and_actual(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = run / "checkpoints" / "step-2"
    expected = {e.path: e.sha256 for e in read_manifest(directory).files}["latest"]
    flip_bit(directory / "latest", 3)
    found(run)
    message = caplog.text
    assert "step-2: latest: expected" in message and expected in message
    assert message.count("sha256 ") == 2


def test_all_bad_is_an_error_that_lists_them(run: Path) -> None:
    for step in (1, 2):
        flip_bit(run / "checkpoints" / f"step-{step}" / "latest", 0)
    with pytest.raises(UserError, match=r"(?s)no checkpoint in .*step-2: latest.*step-1: latest"):
        find_checkpoint(run, WORLD)


def test_vanished_checkpoints_do_not_start_from_scratch(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="step-2, but there is no checkpoint"):
        find_checkpoint(run, WORLD)


def test_unfinished_saves_are_never_read(run: Path) -> None:
    (run / "checkpoints" / "step-2").rename(run / "checkpoints" / ".tmp-step-3")
    assert found(run).step == 1


# Names and links that lead elsewhere


@pytest.mark.parametrize("name", ["../out.bin", "model/../../out.bin", "/etc/hostname", "", "a\0b"])
def test_paths_out_of_the_checkpoint_are_refused(run: Path, name: str) -> None:
    # The file is there and its hash is right: the path alone is the reason.
    (run / "checkpoints" / "out.bin").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    entry = {"path": name, "size": 0, "sha256": empty}
    directory = run / "checkpoints" / "step-2"
    forge_manifest(directory, lambda plain: plain["files"].append(entry))
    assert any("path refused" in problem for problem in verify(directory, WORLD)[1])
    assert found(run).step == 1


def test_control_a_forged_manifest_with_an_inner_file_is_accepted(run: Path) -> None:
    directory = run / "checkpoints" / "step-2"
    forge_manifest(directory, lambda plain: plain["files"].sort(key=lambda e: e["sha256"]))
    assert verify(directory, WORLD)[1] == []


@pytest.mark.parametrize("name", ["latest", "model", MANIFEST])
def test_links_are_refused(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-2" / name
    path.rename(run / "moved")
    path.symlink_to(run / "moved")
    assert found(run).step == 1


def test_a_linked_checkpoint_is_refused(run: Path) -> None:
    directory = run / "checkpoints" / "step-2"
    directory.rename(run / "moved")
    directory.symlink_to(run / "moved")
    assert found(run).step == 1


def test_the_checkpoint_directory_itself_may_be_a_link(run: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("scratch") / "checkpoints"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    assert found(run).step == 2
    assert save(run, 3) is not None and found(run).step == 3


def test_planted_file_is_refused_and_dot_files_are_not(run: Path) -> None:
    directory = run / "checkpoints" / "step-2"
    (directory / ".nfs0001").write_bytes(b"x")
    assert found(run).step == 2
    (directory / "model" / "shard1.bin").write_bytes(b"x")
    assert found(run).step == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].append(m["files"][0]),
        lambda m: m["files"][0].update(sha256="0"),
        lambda m: m["files"][0].update(path=["x"]),
        lambda m: m.update(schema=99),
        lambda m: m.update(step=5),
        lambda m: m.pop("files"),
        lambda m: m["state"].update(global_batch=0),
        lambda m: m["state"].pop("seed"),
        lambda m: m["state"].update(extra=1),
    ],
)
def test_malformed_manifests_are_rejected(run: Path, change) -> None:
    forge_manifest(run / "checkpoints" / "step-2", change)
    assert found(run).step == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(["schema", "step", "files", "state", "fingerprint", "all"]), value=JSON)
def test_any_json_is_rejected_with_a_reason(tmp_path_factory, key: str, value) -> None:
    directory = tmp_path_factory.mktemp("forged")
    plain = {"schema": 1, "step": 1, "world_size": 1, "saved_at": "", "fingerprint": {}}
    plain |= {"files": [], "state": state_at(1).to_json()}
    data = json.dumps(value if key == "all" else plain | {key: value}).encode()
    (directory / MANIFEST).write_bytes(data)
    (directory / MANIFEST_SUM).write_bytes(_sum_line(data))
    read, problems = verify(directory, WORLD)
    assert problems or read is not None


# Pruning


@settings(max_examples=25, deadline=None)
@given(good=st.lists(st.booleans(), min_size=3, max_size=7), keep=st.integers(-1, 4))
def test_pruning_keeps_enough_valid_ones(tmp_path_factory, good: list[bool], keep: int) -> None:
    run = tmp_path_factory.mktemp("run")
    for step, is_good in enumerate(good, 1):
        save(run, step)
        if not is_good:
            flip_bit(run / "checkpoints" / f"step-{step}" / "latest", 1)
    prune(run, WORLD, keep=keep)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    valid = [step for step, is_good in enumerate(good, 1) if is_good]
    kept = valid[-max(2, keep) :]
    assert {f"step-{step}" for step in kept} <= left
    if len(kept) == max(2, keep):
        assert left == {f"step-{step}" for step in range(kept[0], len(good) + 1)}


def test_saving_prunes_to_keep(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-5", "step-6", "step-7"}


# Saving the same step again


def test_replayed_step_sets_the_bad_one_aside(run: Path) -> None:
    directory = run / "checkpoints" / "step-2"
    for number in (1, 2):
        flip_bit(directory / "latest", 0)
        assert found(run).step == 1
        assert save(run, 2) == directory
        assert found(run).step == 2
        assert (run / "checkpoints" / f"step-2.rejected-{number}").is_dir()


def test_saving_twice_without_a_step_between_writes_once(run: Path) -> None:
    def write(directory: Path) -> None:
        raise AssertionError("written again")

    assert save(run, 2, write=write) == run / "checkpoints" / "step-2"


def test_valid_checkpoint_with_another_state_is_kept_aside(run: Path) -> None:
    save(run, 2, state=state_at(2, best_score=0.5, best_step=2))
    assert found(run).state.best_score == 0.5
    # Killed between the two renames, the one moved away would be the newest there is.
    shutil.rmtree(run / "checkpoints" / "step-2")
    shutil.rmtree(run / "checkpoints" / "step-1")
    assert found(run).path.name == "step-2.rejected-1"
