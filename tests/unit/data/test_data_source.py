"""Sources: numbering, reading by number, stored features, and damage met while reading."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from shard_tools import END, captions_of, jpeg, tar_member, write_pairs

from dalr_scale.data.shards.features_store import (
    feature_names,
    features_path,
    open_features,
    write_features,
)
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.data.stream import open_shard as open_shard_module
from dalr_scale.data.stream import source as source_module
from dalr_scale.data.stream.source import Source
from dalr_scale.errors import UserError


def values_for(rows: int, dim: int = 4) -> np.ndarray:
    return np.arange(rows * dim, dtype=np.float16).reshape(rows, dim)


def test_items_are_read_in_any_order(tmp_path: Path) -> None:
    source = Source(write_pairs(tmp_path, 7, per_shard=3), with_images=True)
    assert (source.num_items, source.num_samples) == (35, 7)
    everything = source.read(np.arange(35))
    assert everything.image_ids.tolist() == [n for n in range(7) for _ in range(5)]
    expected = {f"pairs {text}" for n in range(7) for text in captions_of(n)}
    assert set(everything.sentences) == expected
    ids = np.random.default_rng(0).permutation(35)[:20]
    part = source.read(ids)
    assert part.sentences == [everything.sentences[n] for n in ids]
    assert part.image_ids.tolist() == [n // 5 for n in ids]
    assert part.images is not None
    for text, image in zip(part.sentences, part.images, strict=True):
        assert image == jpeg(int(text.rsplit(" ", 1)[1]))
    samples = source.read(np.arange(0, 35, 5)).images
    assert samples == source.read_images(np.arange(7))
    assert source.read(np.array([], np.int64)).sentences == []
    for bad in (-1, 35):
        with pytest.raises(ValueError, match=r"0 \.\.\. 34"):
            source.read(np.array([bad]))


def test_numbering_follows_content_not_names(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 9, per_shard=3)
    before = Source(shards)
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, shard in enumerate(reversed(shards)):
        shard.rename(moved / f"{number}-renamed.tar")
    after = Source(sorted(moved.glob("*.tar")))
    ids = np.arange(before.num_items)
    assert after.fingerprint == before.fingerprint
    assert after.read(ids).sentences == [
        f"pairs caption {n % 5} of image {p}" for n, p in enumerate(_pictures(after))
    ]
    assert Source(after.shards[:2]).fingerprint != before.fingerprint
    (moved / "copy.tar").write_bytes(after.shards[0].read_bytes())
    with pytest.raises(UserError, match="same content"):
        Source(sorted(moved.glob("*.tar")))
    with pytest.raises(UserError, match="no shards"):
        Source([])


def _pictures(source: Source) -> list[int]:
    texts = source.read(np.arange(source.num_items)).sentences
    return [int(text.rsplit(" ", 1)[1]) for text in texts]


def test_text_items_have_no_image(tmp_path: Path) -> None:
    sentences = [f"sentence {n}" for n in range(50)]
    shards = write_text_shards(sentences, tmp_path, "t", per_member=8, members_per_shard=3)
    source = Source(shards)
    records = source.read(np.arange(50))
    assert sorted(records.sentences) == sorted(sentences)
    assert set(records.image_ids.tolist()) == {-1}
    with pytest.raises(UserError, match="have no image"):
        Source(shards, with_images=True)


def test_features_are_joined_by_sample_item_and_token(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 7, per_shard=3)
    for shard in shards:
        header = ensure_index(shard).header
        start = int(shard.stem[-1]) * 100
        extra = {"model": "m", "normalized": False}
        lengths = np.arange(header.items) % 3 + 1
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.repeat(np.arange(header.items), lengths)[:, None] * np.ones(2)
        write_features(
            shard, "img", values_for(header.samples) + start, level="sample", manifest_extra=extra
        )
        write_features(
            shard, "cap", values_for(header.items, 3) + start, level="item", manifest_extra=extra
        )
        write_features(shard, "tok", tokens, level="token", offsets=offsets, manifest_extra=extra)
        assert feature_names(shard) == ["cap", "img", "tok"]
    roles = {"image": "img", "text0": "cap", "tokens": "tok"}
    source = Source(shards, features=roles)
    assert [source.feature_dim(role) for role in roles] == [4, 3, 2]
    ids = np.random.default_rng(1).permutation(35)[:16]
    records = source.read(ids)
    assert records.features["image"].dtype == np.float32
    assert records.token_features is not None
    tokens, mask = records.token_features
    assert tokens.shape == (16, int(mask.sum(1).max()), 2)
    for row, (item, text) in enumerate(zip(ids, records.sentences, strict=True)):
        image, line = int(text.rsplit(" ", 1)[1]), int(text.split()[2])
        local = image % 3 * 5 + line
        assert records.features["image"][row, 0] == image // 3 * 100 + image % 3 * 4
        assert records.features["text0"][row, 0] == image // 3 * 100 + local * 3
        assert mask[row].sum() == local % 3 + 1
        assert (tokens[row][mask[row]] == local).all()
        assert not tokens[row][~mask[row]].any()
        assert source.describe(int(item)).endswith(f"sample 'pairs{image:04d}', line {line + 1}")
    assert source.fingerprint != Source(shards).fingerprint
    with pytest.raises(UserError, match="no stored features for 'caption'"):
        source.feature_dim("caption")
    with pytest.raises(UserError, match="level token cannot serve as 'image'"):
        Source(shards, features={"image": "tok"})


def test_text_with_image_features_has_image_ids(tmp_path: Path) -> None:
    """Shards may leave the images out once their features are stored."""
    shard = tmp_path / "x.tar"
    members = [tar_member(b"%d.txt" % n, b"one\ntwo\n") for n in range(3)]
    shard.write_bytes(b"".join(members) + END)
    write_features(shard, "clip", values_for(3), level="sample", manifest_extra={})
    source = Source([shard], features={"image": "clip"})
    assert source.read(np.arange(6)).image_ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(source_module, "_OPEN_FILES", 10)
    source = Source(write_pairs(tmp_path, 12, per_shard=1))
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert len(source.read(np.arange(60)).sentences) == 60
    assert len(source._cache) == 3
    assert len(os.listdir("/proc/self/fd")) <= open_before + 10


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    source = Source(write_pairs(tmp_path, 4, per_shard=2))
    expected = source.read(np.arange(20)).sentences
    assert pickle.loads(pickle.dumps(source)).read(np.arange(20)).sentences == expected


@pytest.mark.parametrize("what", ["caption 2 of image 1", "image"])
def test_damage_during_the_run_names_shard_and_sample(what: str, tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    source = Source([shard], with_images=True)
    good = shard.read_bytes()
    target = jpeg(1) if what == "image" else what.encode()
    with shard.open("r+b") as file:  # same size: only the checksum tells
        file.seek(good.index(target) + len(target) // 2)
        file.write(b"#")
    with pytest.raises(UserError, match=r"pairs-000000\.tar: .* 'pairs0001' differs from what"):
        source.read(np.arange(15))


def test_a_file_system_that_fails_is_asked_again(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(source_module, "_RETRY_SECONDS", (0.0, 0.0))
    shards = write_pairs(tmp_path, 6, per_shard=3)
    source = Source(shards)
    read, failures = open_shard_module.read_exactly, []

    def stumble(descriptor: int, size: int, offset: int) -> bytes:
        if len(failures) < limit:
            failures.append(offset)
            raise OSError(5, "Input/output error")
        return read(descriptor, size, offset)

    monkeypatch.setattr(open_shard_module, "read_exactly", stumble)
    limit = 2
    assert len(source.read(np.arange(30)).sentences) == 30
    assert caplog.text.count("trying again") == 2
    failures.clear()
    limit = 3
    with pytest.raises(UserError, match=r"Input/output error\) after 3 tries; restore it"):
        source.read(np.arange(30))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_changed_is_a_fault_of_its_row(shard: Path, value: float) -> None:
    path = write_features(shard, "clip", values_for(3), level="sample", manifest_extra={})
    content = path.read_bytes()
    start = content.index(values_for(3).tobytes()) + 8  # the first value of the second row
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.float16(value).tobytes())
    records = Source([shard], features={"image": "clip"}).read(np.arange(15), strict=False)
    assert sorted(records.faults) == [5, 6, 7, 8, 9]
    assert all("feature of sample 1 has changed" in why for why in records.faults.values())
    assert all(why.endswith("(sample 'pairs0001')") for why in records.faults.values())
    with pytest.raises(UserError, match="have changed"):
        open_features(shard, "clip").verify()


def test_a_shard_that_shrinks_or_vanishes_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(source_module, "_RETRY_SECONDS", (0.0, 0.0))
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    source = Source([shard])
    shard.write_bytes(b"short")
    with pytest.raises(UserError, match="changed since it was indexed"):
        source.read(np.arange(3))
    shard.unlink()
    with pytest.raises(UserError, match=str(shard)):
        source.read(np.arange(3))


# --- stored features that do not fit -----------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_pairs(tmp_path, 3, per_shard=9)[0]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_claiming(shape: str, descr: str = "<f2") -> bytes:
    """A small array file whose header claims any shape it likes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24)


def plant(shard: Path, values: bytes, **changes: object) -> Path:
    """Put a feature shard with these values and a changed manifest beside a shard."""
    manifest = {
        "schema": 1,
        "name": "clip",
        "level": "sample",
        "dim": 4,
        "rows": 3,
        "shard_sha256": ensure_index(shard).header.sha256,
        "values_sha256": "",
    } | changes
    path = features_path(shard, "clip")
    members = [("manifest.json", json.dumps(manifest).encode()), ("values.npy", values)]
    path.write_bytes(
        b"".join(tar_member(f"00000000.{name}".encode(), data) for name, data in members) + END
    )
    return path


class _Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("canary",)


BAD_ARRAYS = {
    "rows": npy(values_for(4)),
    "width": npy(values_for(3, 5)),
    "float32": npy(values_for(3).astype(np.float32)),
    "big endian": npy(values_for(3).astype(">f2")),
    "Fortran order": npy(np.asfortranarray(values_for(3))),
    "one axis": npy(values_for(3).reshape(-1)),
    "objects": npy(np.array([[_Attack()]], dtype=object)),
    "4 TB": npy_claiming("(1099511627776, 2)"),
    "wrapping product": npy_claiming("(4294967296, 4294967296)"),
    "negative": npy_claiming("(-3, -4)"),
    "no rows": npy_claiming("(0, 4)"),
    "header of lies": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    "endless header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "version 9": b"\x93NUMPY\x09\x00" + bytes(100),
    "code": npy_claiming("__import__('os').mkdir('canary')"),
    "empty": b"",
    "truncated": npy(values_for(3))[:-1],
}


@pytest.mark.parametrize("values", BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_bad_feature_arrays_are_refused_unopened(
    values: bytes, shard: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant(shard, values)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"clip\.features\.tar: .*compute these features again"):
        Source([shard], features={"image": "clip"})
    assert time.perf_counter() - start < 1
    assert not (tmp_path / "canary").exists()


def test_the_planted_features_are_sound_without_the_fault(shard: Path) -> None:
    plant(shard, npy(values_for(3)))
    records = Source([shard], features={"image": "clip"}).read(np.array([5]))
    assert records.features["image"].tolist() == [[4, 5, 6, 7]]


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"level": "shard"},
        {"level": "item"},
        {"level": "token"},
        {"name": "other"},
        {"dim": 5},
        {"dim": None},
        {"rows": 2},
        {"shard_sha256": "00"},
        {"values_sha256": 7},
    ],
)
def test_bad_manifests_are_refused(changes: dict, shard: Path) -> None:
    plant(shard, npy(values_for(3)), **changes)
    with pytest.raises(UserError, match="compute these features again"):
        open_features(shard, "clip")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b" " * (2 << 20)])
def test_manifests_that_are_no_object_are_refused(text: bytes, shard: Path) -> None:
    path = plant(shard, npy(values_for(3)))
    path.write_bytes(
        tar_member(b"00000000.manifest.json", text)
        + tar_member(b"00000000.values.npy", npy(values_for(3)))
        + END
    )
    with pytest.raises(UserError, match="compute these features again"):
        open_features(shard, "clip")


def test_missing_and_foreign_members(shard: Path) -> None:
    with pytest.raises(UserError, match="missing; compute the feature set 'clip'"):
        Source([shard], features={"image": "clip"})
    path = features_path(shard, "clip")
    path.write_bytes(tar_member(b"00000000.values.npy", npy(values_for(3))) + END)
    with pytest.raises(UserError, match="has no member"):
        open_features(shard, "clip")
    path.write_bytes(tar_member(b"00000000.values.pkl", b"x") + END)
    with pytest.raises(UserError, match="allowed extensions"):
        open_features(shard, "clip")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_when_read(value: float, shard: Path) -> None:
    values = values_for(3)
    values[1, 2] = value
    plant(shard, npy(values))
    source = Source([shard], features={"image": "clip"})
    assert source.read(np.arange(5)).features["image"].shape == (5, 4)
    with pytest.raises(UserError, match="feature of sample 1 is not finite"):
        source.read(np.arange(15))
    with pytest.raises(UserError, match="row 1 of the values is not finite"):
        write_features(shard, "x", values, level="sample", manifest_extra={})


def test_widths_must_agree_between_shards(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 2, per_shard=1)
    for shard, dim in zip(shards, (4, 5), strict=True):
        write_features(shard, "clip", values_for(1, dim), level="sample", manifest_extra={})
    with pytest.raises(UserError, match=r"width \d, but \d in other shards"):
        Source(shards, features={"image": "clip"})


def test_features_of_a_changed_shard_are_refused(shard: Path) -> None:
    write_features(shard, "clip", values_for(3), level="sample", manifest_extra={})
    shard.write_bytes(shard.read_bytes().replace(b"caption 0", b"Caption 0"))
    with pytest.raises(UserError, match="another state of pairs-000000"):
        Source([shard], features={"image": "clip"})


def test_writing_features(shard: Path) -> None:
    extra = {"model": "m", "level": "overruled"}
    path = write_features(shard, "clip", values_for(3), level="sample", manifest_extra=extra)
    first = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_features(shard, "clip", values_for(3), level="sample", manifest_extra=extra)
    write_features(
        shard, "clip", values_for(3), level="sample", manifest_extra=extra, overwrite=True
    )
    assert path.read_bytes() == first
    manifest = open_features(shard, "clip").manifest
    assert manifest["model"] == "m"
    assert (manifest["level"], manifest["rows"], manifest["dim"]) == ("sample", 3, 4)
    refused = [
        ({"values": values_for(4), "level": "sample"}, "4 rows for 3 samples"),
        ({"values": values_for(3), "level": "item"}, "3 rows for 15 items"),
        ({"values": values_for(3)[0], "level": "sample"}, "must be"),
        (
            {"values": values_for(3).astype(np.float32) * 1e6, "level": "sample"},
            "not finite in float16",
        ),
        ({"values": values_for(3), "level": "other"}, "not one of"),
        ({"values": values_for(15), "level": "token"}, "offsets go with level token"),
        ({"values": values_for(3), "level": "token", "offsets": np.arange(4)}, "for 15 items"),
        (
            {"values": values_for(15), "level": "token", "offsets": np.r_[0, 0, np.arange(2, 16)]},
            "do not rise",
        ),
    ]
    for arguments, message in refused:
        with pytest.raises(UserError, match=message):
            write_features(shard, "x", manifest_extra={}, **arguments)
    with pytest.raises(UserError, match="name"):
        write_features(shard, "../x", values_for(3), level="sample", manifest_extra={})


def test_changed_feature_values_are_found_by_the_check(shard: Path) -> None:
    path = write_features(shard, "clip", values_for(3), level="sample", manifest_extra={})
    open_features(shard, "clip").verify()
    content = path.read_bytes()
    path.write_bytes(content.replace(values_for(3).tobytes(), (values_for(3) + 1).tobytes()))
    with pytest.raises(UserError, match="values have changed"):
        open_features(shard, "clip").verify()
