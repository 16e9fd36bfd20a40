"""``dalr-scale prepare`` with text files."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from dalr_scale.commands import prepare
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.stream.source import Source
from dalr_scale.process import run_command

SENTENCES = [f"sentence number {number} , with words" for number in range(3000)]
PLAIN = "\n".join(SENTENCES).encode()
JSONL = "\n".join(json.dumps({"text": text}) for text in SENTENCES).encode()

FILES = {
    "s.txt": PLAIN,
    "s.txt.gz": gzip.compress(PLAIN),
    "s.txt.xz": lzma.compress(PLAIN),
    "s.txt.zst": zstandard.compress(PLAIN),
    "two frames.txt.zst": zstandard.compress(PLAIN[:999]) + zstandard.compress(PLAIN[999:]),
    "s.jsonl": JSONL,
    "s.jsonl.gz": gzip.compress(JSONL),
}


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run_command(prepare.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def sentences_in(output: Path) -> list[str]:
    found = []
    for shard in expand_shards([str(output)]):  # by name: the order they were written in
        source = Source([shard])
        found += source.read(np.arange(source.num_items)).sentences
    return found


@pytest.mark.parametrize("name", FILES)
def test_file_kinds(name: str, tmp_path: Path, capsys) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    code, out, err = run(
        capsys, tmp_path / name, "--output", tmp_path / "o", "--samples-per-shard", 1
    )
    assert (code, err) == (0, "")
    assert out.startswith("wrote 3,000 sentences to 3 shards")
    assert sentences_in(tmp_path / "o") == SENTENCES


def test_several_files_and_directories_keep_their_order(tmp_path: Path, capsys) -> None:
    directory = tmp_path / "in"
    directory.mkdir()
    (directory / "b.txt").write_text("three\n")
    (directory / "a.txt").write_text("one\n\ntwo\n")
    (directory / "readme.md").write_text("no\n")
    (tmp_path / "c.jsonl").write_text('{"sentence": "four"}\n')
    code, out, _ = run(capsys, directory, tmp_path / "c.jsonl", "--output", tmp_path / "o")
    assert code == 0
    assert sentences_in(tmp_path / "o") == ["one", "two", "three", "four"]
    assert "left out 1 blank lines" in out


def test_limit_and_cut(tmp_path: Path, capsys) -> None:
    (tmp_path / "s.txt").write_bytes(PLAIN)
    run(capsys, tmp_path / "s.txt", "--output", tmp_path / "o", "--limit", 7, "--max-chars", 10)
    assert sentences_in(tmp_path / "o") == ["sentence n"] * 7


def test_bad_lines_are_counted(tmp_path: Path, capsys) -> None:
    (tmp_path / "s.txt").write_bytes(
        b"\xef\xbb\xbfgood\n \xc2\xa0 \n\xff\xfe bad\nb\x00d\x1b[2J ok\n"
        + b"x" * (3 << 20)
        + b"\nend"
    )
    code, out, _ = run(capsys, tmp_path / "s.txt", "--output", tmp_path / "o")
    assert code == 0
    assert sentences_in(tmp_path / "o") == ["good", "b\x00d\x1b[2J ok", "x" * 4000, "end"]
    assert "left out 1 blank lines" in out
    assert "left out 1 lines that are not UTF-8 ('s.txt:3')" in out
    assert "left out 1 ends of lines longer than a megabyte" in out
    (tmp_path / "j.jsonl").write_text(
        '{"text": "good"}\n{"text": 5}\nnonsense\n"bare"\n{"other": "x"}\n'
        '{"text": "half \\ud800"}\n' + "[" * 100_000 + "\n"
    )
    code, out, _ = run(capsys, tmp_path / "j.jsonl", "--output", tmp_path / "j")
    assert code == 0
    assert sentences_in(tmp_path / "j") == ["good", "bare", "half ?"]
    assert "left out 4 lines without a JSON text field" in out


BAD = {
    "empty.txt": (b"", "no sentence"),
    "blank.txt": (b"\n \n\n", "no sentence"),
    "cut.txt.gz": (gzip.compress(os.urandom(5000))[:-2000], "cut.txt.gz: cannot be read"),
    "cut.txt.xz": (lzma.compress(PLAIN)[:-20], "cut.txt.xz: cannot be read"),
    "cut.txt.zst": (zstandard.compress(PLAIN)[:-20], "cut.txt.zst: cannot be read"),
    "fake.txt.zst": (PLAIN, "fake.txt.zst: cannot be read"),
    "fake.txt.xz": (PLAIN, "fake.txt.xz: cannot be read"),
    "fake.txt.gz": (PLAIN, "fake.txt.gz: cannot be read"),
    "table.parquet": (b"PAR1", "table.parquet: is not a text file"),
    "shard.tar": (b"x", "finished shards only need dalr-scale index"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_and_leave_nothing(name: str, tmp_path: Path, capsys) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    code, out, err = run(capsys, tmp_path / name, "--output", tmp_path / "o")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "o").glob("*"))


def test_a_compressed_bomb_stays_small_in_memory(tmp_path: Path) -> None:
    """150 MB of one line in a file of 25 kB: only a bounded part is ever held."""
    path = tmp_path / "bomb.txt.xz"
    path.write_bytes(lzma.compress(b"x" * (150 << 20), preset=0))
    script = (
        "import sys, webdataset\n"
        "from resource import RUSAGE_SELF, getrusage\n"
        "from dalr_scale.commands.prepare import main\n"
        "before = getrusage(RUSAGE_SELF).ru_maxrss\n"
        "code = main(sys.argv[1:])\n"
        "print(code, getrusage(RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(path), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote 1 sentences" in done.stdout
    code, kilobytes = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert int(kilobytes) < 50_000


def test_real_sentences(tmp_path: Path, capsys) -> None:
    root = os.environ.get("DALR_DATA")
    source = Path(root or "") / "wiki" / "wiki_en_sentences_1m.txt.xz"
    if not root or not source.exists():
        pytest.skip("set DALR_DATA to a directory with wiki/ to prepare real text")
    code, out, _ = run(capsys, source, "--output", tmp_path, "--limit", 100_000)
    assert code == 0
    assert out.startswith("wrote 100,000 sentences to 2 shards")
    with lzma.open(source, "rt", encoding="utf-8") as file:
        expected = [" ".join(next(file).split()) for _ in range(100_000)]
    assert sentences_in(tmp_path) == expected
