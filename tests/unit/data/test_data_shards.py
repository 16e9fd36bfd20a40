"""The tar walk against hostile archives, against the webdataset package, and shard lists."""

from __future__ import annotations

import ast
import gzip
import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import END, oracle_samples, tar_header, tar_member, write_pairs

from dalr_scale.data.shards import files as shards_module
from dalr_scale.data.shards.files import expand_shards, sample_key, split_name, walk_tar
from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards
from dalr_scale.errors import UserError

GOOD = tar_member(b"a.txt", b"a caption\n")


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return tar_member(b"pax", b"".join(records), kind)


def pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + len(str(len(body) + 2))
    return b"%d" % length + body


LONG_PAX = b"".join(pax_record(b"k%05d" % n, b"v") for n in range(4000))  # 60 kB

HOSTILE = {
    "empty": b"",
    "no end marker": GOOD,
    "half an end marker": GOOD + bytes(512),
    "cut in the payload": (GOOD + tar_member(b"b.txt", b"x" * 900) + END)[:2100],
    "cut on a 512 border": tar_member(b"b.txt", b"x" * 900)[:1024],
    "cut in a header": (GOOD + GOOD)[:1300],
    "zeroed block inside": GOOD + bytes(512) + tar_member(b"b.txt", b"x") + END,
    "data after the end": GOOD + END + b"x" * 512,
    "negative size, octal": tar_header(b"a.txt", b"-0000000001\0") + END,
    "negative size, base 256": tar_header(b"a.txt", b"\xff" * 12) + END,
    "size 2**60": tar_header(b"a.txt", b"\x80" + (1 << 60).to_bytes(11, "big")) + END,
    "size 8 GB": tar_header(b"a.txt", 8 * 10**9) + END,
    "size not a number": tar_header(b"a.txt", b"12x\0") + END,
    "size blank": tar_header(b"a.txt", b"\0" * 12) + END,
    "checksum": GOOD.replace(b"a.txt", b"b.txt", 1) + END,
    "no ustar magic": tar_header(b"a.txt", 0, magic=b"") + END,
    "unknown type, huge size": tar_header(b"a.txt", 8 * 10**9, b"Z") + END,
    "unknown type": tar_header(b"a.txt", 0, b"Z") + END,
    "symbolic link": tar_header(b"a.txt", 0, b"2") + END,
    "hard link": tar_header(b"a.txt", 0, b"1") + END,
    "character device": tar_header(b"a.txt", 0, b"3") + END,
    "named pipe": tar_header(b"a.txt", 0, b"6") + END,
    "sparse": tar_header(b"a.txt", 0, b"S") + END,
    "directory with a size": tar_member(b"a", b"x", b"5") + END,
    "GNU name of a megabyte": tar_member(b"L", b"a" * (1 << 20), b"L") + GOOD + END,
    "PAX header of a megabyte": pax(b"9" * (1 << 20)) + GOOD + END,
    "PAX length too long": pax(b"99 path=x\n") + GOOD + END,
    "PAX length of zero": pax(b"0 path=x\n") + GOOD + END,
    "PAX without length": pax(b"path=x\n") + GOOD + END,
    "PAX negative size": pax(pax_record(b"size", b"-5")) + GOOD + END,
    "PAX huge size": pax(pax_record(b"size", b"9" * 30)) + GOOD + END,
    "PAX sparse": pax(pax_record(b"GNU.sparse.major", b"1")) + GOOD + END,
    "PAX chain": pax(pax_record(b"path", b"b.txt")) * 50 + GOOD + END,
    "duplicate": GOOD + GOOD + END,
    "duplicate through ./": GOOD + tar_member(b"./a.txt", b"x") + END,
    "parent directory": tar_member(b"../a.txt", b"x") + END,
    "parent directory inside": tar_member(b"a/../../b.txt", b"x") + END,
    "absolute": tar_member(b"/etc/a.txt", b"x") + END,
    "not UTF-8": tar_member(b"\xff\xfe.txt", b"x") + END,
    "escape sequence": tar_member(b"\x1b[2Ja.txt", b"x") + END,
    "no name": tar_member(b"", b"x") + END,
    "gzip": gzip.compress(GOOD + END),
    "not a tar": b"<html>not found</html>" * 100,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.timeout(10)
def test_hostile_archive_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"x\.tar: "):
        list(walk_tar(path))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "name",
    [
        *("a.pyd", "a.pkl", "a.pickle", "a.pth", "a.pt", "a.ten", "a.mp", "a.cbor", "a.exe"),
        *("a.PKL", "a.Pickle", "a.jpg.pkl", "a.pkl.txt", "a.txt.gz", "a.tar", "a.py", "a.so"),
        *("a", "a.", "a.txt.", ".hidden/a"),
    ],
)
def test_foreign_extensions_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_member(name.encode(), b"x") + END)
    with pytest.raises(UserError, match="allowed extensions"):
        list(walk_tar(path))


def test_sound_variants_are_accepted(tmp_path: Path) -> None:
    """The control of the hostile list: the same shapes, done right, are read."""
    path = tmp_path / "x.tar"
    long_name = b"f" * 150 + b".txt"
    path.write_bytes(
        tar_header(b"./", 0, b"5")
        + pax(pax_record(b"comment", b"by git"), kind=b"g")
        + GOOD
        + pax(LONG_PAX)
        + tar_member(b"b.txt", b"2")
        + pax(pax_record(b"path", "ü.txt".encode()), pax_record(b"mtime", b"1.5"))
        + tar_member(b"ignored", b"33")
        + tar_member(b"././@LongLink", long_name + b"\0", b"L")
        + tar_member(long_name[:100], b"444")
        + pax(pax_record(b"size", b"4"))
        + tar_header(b"e.txt", 0)
        + b"5555".ljust(512, b"\0")
        + tar_header(b"f.txt", b"\x80" + (3).to_bytes(11, "big"))
        + b"666".ljust(512, b"\0")
        + END
        + bytes(8192)
    )
    found = [(m.name, path.read_bytes()[m.offset : m.offset + m.size]) for m in walk_tar(path)]
    assert found == [
        ("a.txt", b"a caption\n"),
        ("b.txt", b"2"),
        ("ü.txt", b"33"),
        (long_name.decode(), b"444"),
        ("e.txt", b"5555"),
        ("f.txt", b"666"),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_agrees_with_the_standard_library(form: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for number, name in enumerate(["a.txt", "d/b.jpg", f"{'p' * 90}/{'q' * 60}.txt"]):
            info = tarfile.TarInfo(name)
            info.size = 500 * number
            info.mtime = 1234.5 if form == tarfile.PAX_FORMAT else 1234
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive.getmembers()]
    assert [tuple(member) for member in walk_tar(path)] == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_archives_give_a_user_error_or_members(
    data: st.DataObject, tmp_path_factory
) -> None:
    """Any damage ends in a UserError or in members inside the file, never in anything else."""
    content = bytearray(
        GOOD + pax(pax_record(b"path", b"c.txt")) + tar_member(b"b.txt", b"xy") + END
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(content)
    try:
        members = list(walk_tar(path))
    except UserError:
        return
    assert all(member.offset + member.size <= len(content) for member in members)


@pytest.mark.timeout(10)
def test_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match="not a regular file"):
        list(walk_tar(tmp_path / "x.tar"))
    with pytest.raises(UserError, match=r"y\.tar: cannot be opened"):
        list(walk_tar(tmp_path / "y.tar"))


def test_webdataset_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    """The package's own reader is the oracle: same keys, same bytes, same order."""
    shards = write_pairs(tmp_path, 7, per_shard=3)
    assert [shard.name for shard in shards] == [f"pairs-{n:06d}.tar" for n in range(3)]
    for shard in shards:
        own: dict[str, dict[str, bytes]] = {}
        content = shard.read_bytes()
        for member in walk_tar(shard):
            key, extension = split_name(member.name)
            own.setdefault(key, {})[extension] = content[
                member.offset : member.offset + member.size
            ]
        oracle = {sample.pop("__key__"): sample for sample in oracle_samples(shard)}
        assert list(own) == list(oracle)
        assert own == oracle


def test_writer_is_deterministic_and_never_overwrites_unasked(tmp_path: Path) -> None:
    first = [s.read_bytes() for s in write_pairs(tmp_path / "a", 5, per_shard=2)]
    assert [s.read_bytes() for s in write_pairs(tmp_path / "b", 5, per_shard=2)] == first
    with pytest.raises(UserError, match="--overwrite"):
        write_text_shards(["x"], tmp_path / "a", "pairs")
    write_pairs(tmp_path / "a", 1, per_shard=2, prefix="other")  # another prefix is no conflict
    left = write_text_shards(["x"], tmp_path / "a", "pairs", overwrite=True)
    assert sorted((tmp_path / "a").glob("pairs-*")) == left


def test_writer_leaves_nothing_after_an_exception(tmp_path: Path) -> None:
    write_text_shards(["old"], tmp_path, "t")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        ShardSetWriter(tmp_path, "t", samples_per_shard=1, overwrite=True) as writer,
    ):
        writer.write("a", {"txt": b"new"})
        writer.write("b", {"txt": b"new"})
        raise RuntimeError("stop")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a\nb", "a\\b", "twice"])
def test_writer_refuses_keys_that_readers_would_split(key: str, tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, "t", samples_per_shard=9) as writer:
        writer.write("twice", {"txt": b"x"})
        with pytest.raises(ValueError, match="key"):
            writer.write(key, {"txt": b"x"})
        with pytest.raises(ValueError, match="members"):
            writer.write("ok", {"pkl": b"x"})


def test_text_shards_pack_lines_and_drop_blank_ones(tmp_path: Path) -> None:
    sentences = ["one", " ", "two\u2028words\there", "", "three", "\ud800half"]
    shards = write_text_shards(sentences, tmp_path, "t", per_member=2, members_per_shard=1)
    texts = [sample["txt"] for shard in shards for sample in oracle_samples(shard)]
    assert texts == [b"one\ntwo words here\n", b"three\n?half\n"]
    with pytest.raises(UserError, match="no sentence"):
        write_text_shards(["", " \n"], tmp_path, "blank")


def test_shard_lists(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b.tar", "b.clip.features.tar", "b.tar.idx"):
        (tmp_path / name).touch()

    def names(*patterns: str) -> list[str]:
        return [path.name for path in expand_shards(patterns, tmp_path)]

    assert names("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
    assert names("{a-0,b}.tar", "a-0.tar") == ["a-0.tar", "b.tar"]
    assert names("b*.tar") == ["b.tar"]
    assert names(".") == names(str(tmp_path)) == ["a-0.tar", "a-1.tar", "b.tar"]
    for pattern in ("a-{0..2}.tar", "c.tar", "c*.tar", "a-{3..1}.tar", "{0..9999999}.tar"):
        with pytest.raises(UserError, match=r"check the path|no shard|range"):
            names(pattern)
    with pytest.raises(UserError, match="no shards were named"):
        names()


@pytest.mark.parametrize(
    "text",
    [
        "pipe:touch canary",
        "http://h/a.tar",
        "file:a.tar",
        "s3://b/a.tar",
        "-",
        "{pipe:touch canary}",
    ],
)
def test_urls_and_commands_are_never_opened(text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="URL or a command"):
        expand_shards([text])
    assert not (tmp_path / "canary").exists()


def test_no_reading_code_uses_a_foreign_tar_reader_or_pickle() -> None:
    """Only the writer may touch webdataset, and nothing touches tarfile or pickle."""
    package = Path(shards_module.__file__).parents[1]
    users = {"tarfile": set(), "pickle": set(), "webdataset": set()}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                users.get(name.partition(".")[0], set()).add(path.name)
    assert users == {"tarfile": set(), "pickle": set(), "webdataset": {"writer.py"}}


def test_sample_keys_of_image_files() -> None:
    assert sample_key("a/b.c.jpg") == "a/b_c"
    assert sample_key("plain") == "plain"
    assert sample_key("x.d/plain") == "x_d/plain"
    assert sample_key("a\\b\n.PNG") == "a_b_"
