"""The index: what it points at, what it refuses, and that no change goes unnoticed."""

from __future__ import annotations

import os
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_tools import END, image_bytes, jpeg, oracle_samples, tar_member, write_pairs

from dalr_scale import cli
from dalr_scale.commands import index as index_command
from dalr_scale.data.shards.check import check_shard
from dalr_scale.data.shards.features_store import write_features
from dalr_scale.data.shards.index_file import CAPTION_LIMIT, IndexHeader, current_index, index_path
from dalr_scale.data.shards.indexing import build_index, ensure_index
from dalr_scale.data.stream.source import Source
from dalr_scale.errors import UserError
from dalr_scale.run.files import write_durably


def shard_of(directory: Path, *members: tuple[str, bytes]) -> Path:
    path = directory / "x.tar"
    path.write_bytes(b"".join(tar_member(name.encode(), data) for name, data in members) + END)
    return path


def test_rows_point_at_the_bytes_that_webdataset_delivers(tmp_path: Path) -> None:
    text = "  first \r\n\n \t \nzwölf\x0b\nlast".encode()
    shard = shard_of(
        tmp_path,
        ("a.jpg", jpeg(1)),
        ("a.txt", text),
        ("d/b.json", b"{}"),
        ("d/b.txt", b"\n"),
        ("c.png", jpeg(2)),
        ("t.TXT", b"only text\n"),
    )
    index = ensure_index(shard).load()
    content = shard.read_bytes()
    rows = [
        (content[offset : offset + size].decode(), sample, line)
        for offset, size, _, sample, line in index.items.tolist()
    ]
    assert rows == [("first", 0, 0), ("zwölf", 0, 3), ("last", 0, 4), ("only text", 3, 0)]
    assert index.keys() == ["a", "d/b", "c", "t"]
    assert index.samples["first_item"].tolist() == [0, 3, 3, 3]
    assert index.header.images == 2
    for row, sample in zip(index.samples, oracle_samples(shard), strict=True):
        start, size = int(row["image"]), int(row["image_size"])
        assert content[start : start + size] == sample.get("jpg", sample.get("png", b""))
        assert zlib.crc32(content[start : start + size]) == row["image_crc32"]


def test_huge_captions_are_cut_between_characters(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, ("a.txt", b"x" + "ü".encode() * CAPTION_LIMIT + b"\nnext\n"))
    index = ensure_index(shard).load()
    assert index.items["size"].tolist() == [CAPTION_LIMIT - 1, 4]


BAD = {
    "no caption": ([("a.jpg", jpeg())], "no usable sample"),
    "blank captions": ([("a.txt", b" \n\n")], "no usable sample"),
    "no member": ([], "no usable sample"),
    "not UTF-8": ([("a.txt", b"\xff\xfe\n")], "line 1 of sample 'a' is not UTF-8"),
    "lone surrogate": ([("a.txt", b"\xed\xa0\x80\n")], "not UTF-8"),
    "two images": ([("a.jpg", jpeg()), ("a.png", b"x"), ("a.txt", b"x")], "several images"),
    "same extension": ([("a.txt", b"x"), ("a.TXT", b"x")], "two members of one kind"),
    "empty image": ([("a.jpg", b""), ("a.txt", b"x")], "empty or huge image"),
    "torn sample": ([("a.jpg", jpeg()), ("b.txt", b"x"), ("a.txt", b"x")], "are not adjacent"),
    "pickle": ([("a.txt", b"x"), ("a.pkl", b"x")], "allowed extensions"),
}


@pytest.mark.parametrize(("members", "message"), BAD.values(), ids=BAD.keys())
def test_unusable_shards_are_refused_by_name(members: list, message: str, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, *members)
    with pytest.raises(UserError, match=message) as raised:
        ensure_index(shard)
    assert str(raised.value).startswith(str(shard))
    assert not index_path(shard).exists()


def test_what_cannot_be_used_is_quarantined_and_the_rest_stays(tmp_path: Path) -> None:
    torn = jpeg(2)[:-200]
    shard = shard_of(
        tmp_path,
        ("a.jpg", jpeg(1)),
        ("a.txt", b"one\n\xff\nthree\n"),
        ("b.jpg", b""),
        ("b.txt", b"lost\n"),
        ("c.jpg", jpeg(1)),
        ("d.txt", b"x\n"),
        ("d.TXT", b"y\n"),
        ("e.jpg", torn),
        ("e.txt", b"torn\n"),
    )
    index = ensure_index(shard).load()
    assert index.items[["sample", "line"]].tolist() == [(0, 0), (0, 2), (4, 0)]
    assert [line.removeprefix(f"{shard}: ") for line in index.quarantine()] == [
        "line 2 of sample 'a' is not UTF-8",
        "sample 'b' has an empty or huge image",
        "sample 'c' has no caption",
        "sample 'd' has two members of one kind",
    ]
    assert len(index.quarantine(incomplete=False)) == 3
    before = Source([shard]).fingerprint
    deep = ensure_index(shard, deep=True).load()
    assert "sample 'e' has an image that cannot be decoded" in deep.quarantine()[-1]
    assert deep.items["sample"].tolist() == [0, 0]
    assert ensure_index(shard).header.deep  # not undone by an ordinary look
    assert Source([shard]).fingerprint != before
    assert Source([shard], with_images=True).read(np.arange(2)).sentences == ["one", "three"]


def test_a_image_bomb_is_quarantined_from_its_header(tmp_path: Path) -> None:
    small = image_bytes(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    shard = shard_of(tmp_path, ("a.png", bomb), ("a.txt", b"x"), ("b.txt", b"y"))
    started = time.perf_counter()
    assert "cannot be decoded" in ensure_index(shard, deep=True).load().quarantine()[0]
    assert time.perf_counter() - started < 1


def test_a_sound_index_is_used_and_a_stale_one_is_built_again(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    first = ensure_index(shard)
    written = index_path(shard).stat().st_ino
    assert ensure_index(shard) == first
    assert index_path(shard).stat().st_ino == written
    os.utime(shard, ns=(1, 1))
    assert current_index(shard) is None
    assert ensure_index(shard).header == replace(first.header, mtime_ns=1)
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"caption 0 of image 1", b"caption 0 of image X"))
    assert ensure_index(shard).header.sha256 != first.header.sha256


def test_every_flipped_bit_of_the_shard_is_found(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 2, per_shard=9)[0]
    ensure_index(shard)
    content = shard.read_bytes()
    assert check_shard(shard) == []
    places = np.random.default_rng(0).integers(0, len(content) * 8, 100)
    for place in places.tolist():
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        shard.write_bytes(damaged)
        assert check_shard(shard), f"bit {place} of {len(content) * 8}"
    shard.write_bytes(content)
    assert check_shard(shard) == []  # written again with a new time: no fault


def test_webdataset_alone_does_not_notice_a_flipped_payload(tmp_path: Path) -> None:
    """The control: without the checksums of the index the damage would be trained on."""
    shard = write_pairs(tmp_path, 2, per_shard=9)[0]
    before = len(oracle_samples(shard))
    shard.write_bytes(shard.read_bytes().replace(b"caption 0", b"captixn 0"))
    assert len(oracle_samples(shard)) == before


@pytest.mark.parametrize("keep", [0, 50, 95, 0.5, -1])
def test_damaged_index_is_built_again(keep: float, tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    good = ensure_index(shard)
    path = index_path(shard)
    content = path.read_bytes()
    cut = int(keep * len(content)) if 0 < keep < 1 else int(keep)
    path.write_bytes(content[:cut])
    assert current_index(shard) is None
    assert ensure_index(shard) == good
    assert path.read_bytes() == content


def test_flipped_index_is_refused_on_loading(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    header_size = len(ensure_index(shard).header.pack())
    content = bytearray(index_path(shard).read_bytes())
    content[header_size + 5] ^= 1
    index_path(shard).write_bytes(content)
    with pytest.raises(UserError, match="is damaged; remove it"):
        ensure_index(shard).load()


@pytest.mark.parametrize(
    ("position", "value"),
    [
        ("offset", 2**64 - 1),
        ("offset", 10**9),
        ("size", 2**32 - 1),
        ("sample", 2**32 - 1),
    ],
)
def test_hostile_rows_are_refused_even_with_right_checksums(
    position: str, value: int, tmp_path: Path
) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    file = ensure_index(shard)
    index = file.load()
    items = index.items.copy()
    items[position][1] = value
    body = items.tobytes() + index.samples.tobytes() + bytes(index.key_block)
    header = replace(file.header, body_crc32=zlib.crc32(body))
    index_path(shard).write_bytes(header.pack() + body)
    with pytest.raises(UserError, match="is damaged"):
        ensure_index(shard).load()


def test_hostile_counts_are_not_believed(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    header = ensure_index(shard).header
    for name in ("items", "samples", "key_bytes"):
        fake = replace(header, **{name: 2**60})
        assert IndexHeader.unpack(fake.pack()) == fake  # the header itself is sound
        index_path(shard).write_bytes(fake.pack() + bytes(100))
        assert current_index(shard) is None


def test_header_survives_packing() -> None:
    header = IndexHeader(1, -5, 3, 4, 5, 6, "ab" * 32, 2**32 - 1)
    assert IndexHeader.unpack(header.pack()) == header
    for damage in (header.pack()[:-1], b"X" + header.pack()[1:], struct.pack("<I", 0) * 24):
        assert IndexHeader.unpack(damage) is None


def test_unwritable_directory_keeps_the_index_in_memory(tmp_path: Path, monkeypatch) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]

    def refuse(*_: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("dalr_scale.data.shards.indexing.write_index", refuse)
    file = ensure_index(shard)
    assert not index_path(shard).exists()
    assert len(file.load().items) == 15


def test_building_is_deterministic_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    assert build_index(shard) == build_index(shard)
    ensure_index(shard)
    assert {path.name for path in tmp_path.iterdir()} == {shard.name, index_path(shard).name}


def test_hosts_that_share_process_numbers_do_not_share_temporary_files(
    tmp_path: Path, monkeypatch
) -> None:
    """Containers on several hosts all count from 1, and write into one shared directory."""
    shard = write_pairs(tmp_path, 2, per_shard=9)[0]
    used: list[str] = []
    replace_file = Path.replace

    def note(source: Path, target: Path) -> None:
        used.append(source.name)
        replace_file(source, target)

    monkeypatch.setattr(Path, "replace", note)
    for host in ("one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        index_path(shard).unlink(missing_ok=True)
        ensure_index(shard)
        options = {"level": "sample", "manifest_extra": {}, "overwrite": True}
        write_features(shard, "clip", np.ones((2, 3)), **options)
        write_durably(tmp_path / "status.json", b"{}")
    assert len(used) == len(set(used)) == 6, used


def test_command_builds_checks_and_reports(tmp_path: Path, capsys, same_environment) -> None:
    shards = write_pairs(tmp_path, 5, per_shard=2)
    assert index_command.main([str(tmp_path), "--check"]) == 1
    assert "missing; run dalr-scale index" in capsys.readouterr().out
    assert not index_path(shards[0]).exists()  # checking writes nothing
    assert index_command.main([str(tmp_path)]) == 0
    assert "built" in capsys.readouterr().out
    assert index_command.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("up to date") == 3
    assert index_command.main([str(tmp_path), "--check"]) == 0
    assert "3 shards checked, 0 faults" in capsys.readouterr().out
    content = shards[1].read_bytes()
    shards[1].write_bytes(content.replace(b"caption 3 of image 2", b"caption 3 of image 9"))
    assert index_command.main([str(tmp_path), "--check"]) == 1
    assert "line 4 of sample 'pairs0002' has changed" in capsys.readouterr().out
    with pytest.raises(UserError, match="none"):
        index_command.main([str(tmp_path / "none")])
    assert cli.main(["index", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
