"""``dalr-scale prepare`` with images: refusals, interruptions, reruns; nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from image_directories import NAMES, captions_csv, contents, everything, jpeg, run

from dalr_scale.data.prepare import pairs as prepare_pairs
from dalr_scale.data.shards.index_file import index_path


def test_nothing_is_overwritten_unasked(images: Path, tmp_path: Path, capsys) -> None:
    captions = captions_csv(tmp_path)
    arguments = [images, "--captions", captions, "--output", tmp_path / "o"]
    run(capsys, *arguments, "--samples-per-shard", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "pairs-000000.tar: exists already" in err
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before
    assert run(capsys, *arguments, "--prefix", "again")[0] == 0
    stale = tmp_path / "o" / "pairs-000003.clip.features.tar"
    stale.write_bytes(b"features of the old shard")
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    names = {path.name for path in (tmp_path / "o").glob("pairs*")}
    assert names == {"pairs-000000.tar", "pairs-000000.tar.idx"}
    assert contents(tmp_path / "o" / "pairs-000000.tar") == everything()


def test_a_failed_replacement_keeps_the_old_shards(images: Path, tmp_path: Path, capsys) -> None:
    captions = captions_csv(tmp_path)
    arguments = [images, "--captions", captions, "--output", tmp_path / "o"]
    run(capsys, *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    for name in NAMES:
        (images / name).write_bytes(b"gone bad")
    code, _, err = run(capsys, *arguments, "--overwrite")
    assert code == 2
    assert "none of the 12 chosen images can be read" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def _broken(kind: str, tmp_path: Path, images: Path) -> list[object]:
    """Return the arguments of a faulty call."""
    captions = captions_csv(tmp_path)
    output = ["--output", tmp_path / "o"]
    listing = tmp_path / "list.txt"
    if kind == "empty captions":
        captions.write_text("")
    elif kind == "header only":
        captions.write_text("image,caption\n")
    elif kind == "blank captions":
        captions.write_text(f"image,caption\n{NAMES[0]},\n{NAMES[1]},  \n")
    elif kind == "no header":
        captions.write_text("some,words\nand,more\n")
    elif kind == "binary captions":
        captions.write_bytes(jpeg(0))
    elif kind == "broken JSON":
        captions.write_text('{"image": "0_ab.jpg", "caption": "x"}\n{"image": \n')
    elif kind == "short row":
        captions.write_text(f"image,caption\n{NAMES[0]},x\n{NAMES[1]}\n")
    elif kind == "open quote":
        captions.write_text(f'image,caption\n{NAMES[0]},"x\n' + "y\n" * 100_000)
    elif kind == "no match":
        captions.write_text("image,caption\nother.jpg,x\n")
    elif kind == "missing captions":
        captions.unlink()
    elif kind == "empty list":
        listing.write_text("\n")
        return [images, "--captions", captions, *output, "--exclude", listing]
    elif kind == "list without match":
        listing.write_text("other.jpg\n")
        return [images, "--captions", captions, *output, "--exclude", listing]
    elif kind == "all excluded":
        listing.write_text("\n".join(NAMES))
        return [images, "--captions", captions, *output, "--exclude", listing]
    elif kind == "no images":
        (tmp_path / "none").mkdir()
        return [tmp_path / "none", "--captions", captions, *output]
    elif kind == "missing source":
        return [tmp_path / "none", "--captions", captions, *output]
    elif kind == "source is no tar":
        return [captions, "--captions", captions, *output]
    elif kind == "cut tar":
        with tarfile.open(tmp_path / "p.tar", "w") as file:
            file.add(images, arcname=".")
        content = (tmp_path / "p.tar").read_bytes()
        (tmp_path / "p.tar").write_bytes(content[:5000])
        return [tmp_path / "p.tar", "--captions", captions, *output]
    elif kind == "same source twice":
        return [images, images, "--captions", captions, *output]
    elif kind == "images without --captions":
        return [images, *output]
    elif kind == "list without --captions":
        (tmp_path / "t.txt").write_text("x\n")
        return [tmp_path / "t.txt", *output, "--exclude", captions]
    elif kind == "prefix":
        return [images, "--captions", captions, *output, "--prefix", "../x"]
    return [images, "--captions", captions, *output]


REFUSED = {
    "empty captions": "captions.csv: is empty",
    "header only": "captions.csv: has no caption",
    "blank captions": "captions.csv: has no caption",
    "no header": "neither a header",
    "binary captions": "is not UTF-8",
    "broken JSON": "line 2 is not like",
    "short row": "has 1 columns",
    "open quote": "not a readable CSV",
    "no match": "none of its images (e.g. 'other.jpg')",
    "missing captions": "cannot be read",
    "empty list": "list.txt: is empty",
    "list without match": "names no image of the source",
    "all excluded": "leaves no image",
    "no images": "has no image",
    "missing source": "no such file or directory",
    "source is no tar": "captions.csv: ",
    "cut tar": "p.tar: ",
    "same source twice": "is in another source too",
    "images without --captions": "--captions FILE",
    "list without --captions": "give --captions",
    "prefix": "prefix '../x'",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_with_one_sentence(
    kind: str, images: Path, tmp_path: Path, capsys
) -> None:
    code, out, err = run(capsys, *_broken(kind, tmp_path, images))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert REFUSED[kind] in err
    assert not list((tmp_path / "o").glob("*")) if (tmp_path / "o").exists() else True


def test_a_killed_run_leaves_no_shard_and_can_be_repeated(
    images: Path, tmp_path: Path, capsys
) -> None:
    captions = captions_csv(tmp_path)
    arguments = [str(images), "--captions", str(captions), "--output", str(tmp_path / "o")]
    script = (
        "import sys, time\n"
        "from dalr_scale.data import prepare_pairs\n"
        "check = prepare_pairs.check_image\n"
        "prepare_pairs._CHUNK = 4\n"
        "prepare_pairs.check_image = lambda data: (time.sleep(0.2), check(data))[1]\n"
        "from dalr_scale.commands.prepare import main\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, *arguments])
    partial = tmp_path / "o" / ".pairs.partial" / "pairs-000000.tar"
    end = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists()
    assert not list((tmp_path / "o").glob("*.tar"))
    assert run(capsys, *arguments)[0] == 0
    assert not partial.parent.exists()
    assert contents(tmp_path / "o") == everything()


def test_an_interrupted_run_goes_on_at_its_last_full_shard(
    images: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (images / "5_ab.jpg").write_bytes(b"no image")
    captions = captions_csv(tmp_path)

    def arguments(output: str) -> list[object]:
        words = (images, "--captions", captions, "--samples-per-shard", 2)
        return [*words, "--output", tmp_path / output]

    _, whole, _ = run(capsys, *arguments("whole"))
    check, seen = prepare_pairs.check_image, []

    def count(data: bytes) -> str:
        seen.append(data)
        if len(seen) == 10 and not (tmp_path / "resumed").exists():
            (tmp_path / "resumed").touch()
            raise KeyboardInterrupt
        return check(data)

    monkeypatch.setattr(prepare_pairs, "check_image", count)
    monkeypatch.setattr(prepare_pairs, "_CHUNK", 3)
    assert run(capsys, *arguments("o"))[0] == 130
    partial = tmp_path / "o" / ".pairs.partial"
    assert (partial / "progress.json").exists() and not list((tmp_path / "o").glob("*.tar"))
    first = len(seen)
    code, out, _ = run(capsys, *arguments("o"))
    assert code == 0 and out.replace("/o", "/whole") == whole
    assert len(seen) - first < 12 and not partial.exists()
    for shard in (tmp_path / "whole").glob("*.tar"):
        assert (tmp_path / "o" / shard.name).read_bytes() == shard.read_bytes()


def test_another_job_does_not_go_on_with_what_is_there(
    images: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    captions = captions_csv(tmp_path)
    words = [images, "--captions", captions, "--output", tmp_path / "o"]
    words += ["--samples-per-shard", 2]

    commit = prepare_pairs.ShardSetWriter.commit

    def stop(writer, progress: dict) -> None:
        commit(writer, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_pairs.ShardSetWriter, "commit", stop)
        assert run(capsys, *words)[0] == 130
    assert (tmp_path / "o" / ".pairs.partial" / "progress.json").exists()
    (images / "3_ab.jpg").write_bytes(jpeg(77))
    assert run(capsys, *words)[0] == 0
    assert contents(tmp_path / "o")["3_ab"][0] == jpeg(77)


def test_both_commands_run_as_modules(images: Path, tmp_path: Path) -> None:
    captions = captions_csv(tmp_path)

    def module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dalr_scale", name, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = module("prepare", images, "--captions", captions, "--output", tmp_path / "o")
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    shard = tmp_path / "o" / "pairs-000000.tar"
    assert index_path(shard).exists()
    done = module("index", tmp_path / "o", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("prepare", "index"):
        assert "usage: dalr-scale" in module(name, "--help").stdout
    assert module("prepare", tmp_path / "none", "--output", tmp_path).returncode == 2
