"""``dalr-scale prepare`` with pictures: layouts, lists, skips, refusals and reruns."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalr_scale import index, prepare
from dalr_scale.cli import run_command
from dalr_scale.data import prepare_pairs
from dalr_scale.data.index_file import index_path
from dalr_scale.data.shards import expand_shards
from dalr_scale.data.source import Source

NAMES = [f"{number}_ab.jpg" for number in range(12)]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def texts(name: str) -> list[str]:
    return [f'{name[:-4]} "on" a rope, {line}' for line in range(5)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(jpeg(number))
    return folder


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def captions_csv(folder: Path, names: list[str] = NAMES) -> Path:
    lines = [f"{name},{quoted(text)}" for name in names for text in texts(name)]
    path = folder / "captions.csv"
    path.write_text("\n".join(["image,caption", *lines]) + "\n")
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run_command(prepare.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def contents(output: Path) -> dict[str, tuple[bytes, list[str]]]:
    """Return key -> (picture, captions) of all shards of a folder."""
    source = Source(expand_shards([str(output)]), with_images=True)
    records = source.read(np.arange(source.num_items))
    assert records.images is not None
    found: dict[str, tuple[bytes, list[str]]] = {}
    for item, (text, image) in enumerate(zip(records.sentences, records.images, strict=True)):
        key = source.describe(item).split("'")[1]
        found.setdefault(key, (image, []))[1].append(text)
    return found


def everything() -> dict[str, tuple[bytes, list[str]]]:
    return {name[:-4]: (jpeg(number), texts(name)) for number, name in enumerate(NAMES)}


LAYOUTS = {
    "CSV": lambda: "\n".join(
        ["image,caption", *(f"{n},{quoted(t)}" for n in NAMES for t in texts(n))]
    ),
    "CSV with other columns and a byte-order mark": lambda: "\n".join(
        ["\ufeffid,Caption,Image", *(f"7,{quoted(t)},{n}" for n in NAMES for t in texts(n))]
    ),
    "CSV without header, captions unquoted": lambda: "\n".join(
        f"{n},{t}" for n in NAMES for t in texts(n)
    ),
    "token file": lambda: "\n".join(f"{n}#{i}\t{t}" for n in NAMES for i, t in enumerate(texts(n))),
    "TSV, Windows line ends": lambda: "\r\n".join(
        ["image\tcaption", *(f"{n}\t{t}" for n in NAMES for t in texts(n))]
    ),
    "JSON lines": lambda: "\n".join(json.dumps({"image": n, "captions": texts(n)}) for n in NAMES),
    "JSON lines, one caption each": lambda: "\n".join(
        json.dumps({"file_name": n, "caption": t}) for n in NAMES for t in texts(n)
    ),
    "COCO": lambda: json.dumps(
        {
            "info": {"year": 2017},
            "images": [{"id": 70 + i, "file_name": n, "height": 16} for i, n in enumerate(NAMES)],
            "annotations": [
                {"image_id": 70 + i, "id": 9, "caption": t}
                for i, n in enumerate(NAMES)
                for t in texts(n)
            ],
        },
        indent=1,
    ),
    "folders in the names": lambda: "\n".join(
        ["image,caption", *(f"some/folder/{n},{quoted(t)}" for n in NAMES for t in texts(n))]
    ),
    "names without suffix": lambda: "\n".join(
        ["image,caption", *(f"{n[:-4]},{quoted(t)}" for n in NAMES for t in texts(n))]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_caption_layouts(layout, pictures: Path, tmp_path: Path, capsys) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_bytes(layout().encode())
    code, out, err = run(
        capsys, pictures, "--captions", captions, "--output", tmp_path / "o",
        "--samples-per-shard", 5,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "wrote 12 pictures, 60 captions to 3 shards" in out
    assert "left out" not in out
    assert contents(tmp_path / "o") == everything()


def karpathy(folder: Path) -> Path:
    """Every fourth picture is for validation, every sixth for testing; folders in the names."""
    images = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": "val" if number % 4 == 0 else "test" if number % 6 == 1 else "train",
            "sentences": [{"raw": text, "tokens": []} for text in texts(name)],
        }
        for number, name in enumerate(NAMES)
    ]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_splits_of_a_karpathy_file_become_sets(pictures: Path, tmp_path: Path, capsys) -> None:
    arguments = (pictures, "--captions", karpathy(tmp_path), "--output", tmp_path / "o")
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "wrote 12 pictures, 60 captions to 3 shards" in out
    sets = {}
    for name in ("train", "val", "test"):
        source = Source(expand_shards([str(tmp_path / "o" / f"pairs-{name}-*.tar")]))
        sets[name] = {source.describe(n).split("'")[1] for n in range(source.num_items)}
    assert sets["val"] == {"0_ab", "4_ab", "8_ab"}
    assert sets["test"] == {"1_ab", "7_ab"}
    assert len(sets["train"]) == 7 and len(set.union(*sets.values())) == 12
    assert run(capsys, *arguments)[0] == 2  # nothing is overwritten unasked
    chosen = ("--split", "train", "test", "--prefix", "most")
    code, out, _ = run(capsys, *arguments, *chosen)
    assert code == 0 and "wrote 9 pictures, 45 captions to 1 shards" in out
    code, _, err = run(capsys, *arguments, "--split", "trian", "--prefix", "x")
    assert code == 2 and "has no split 'trian', but test, train, val" in err
    plain = (pictures, "--captions", captions_csv(tmp_path), "--output", tmp_path / "p")
    code, _, err = run(capsys, *plain, "--split", "train")
    assert code == 2 and "but no splits" in err


@pytest.mark.parametrize(
    "content",
    [{"images": [{"id": 1}], "annotations": []}, {"images": [{"filename": "a"}]}, {"images": [3]}],
)
def test_documents_of_another_layout_are_refused(
    content: dict, pictures: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content, indent=1))
    code, _, err = run(capsys, pictures, "--captions", path, "--output", tmp_path / "o")
    assert code == 2 and "neither like COCO's" in err and err.count("\n") == 1


def test_links_out_of_the_folder_are_not_followed(pictures: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(99))
    (pictures / "0_ab.jpg").unlink()
    (pictures / "0_ab.jpg").symlink_to(tmp_path / "secret.jpg")
    (pictures / "link.jpg").symlink_to(pictures / "1_ab.jpg")  # inside: a picture like any other
    captions = captions_csv(tmp_path)
    code, out, _ = run(capsys, pictures, "--captions", captions, "--output", tmp_path / "o")
    assert code == 0 and "wrote 11 pictures" in out
    assert "left out 5 captions without a picture ('0_ab.jpg')" in out
    assert "left out 1 pictures without captions ('link.jpg')" in out


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_pictures_gives_the_same_bytes_as_a_folder(
    form: int, pictures: Path, tmp_path: Path, capsys
) -> None:
    archive = tmp_path / "pictures.tar"
    with tarfile.open(archive, "w", format=form) as file:
        file.add(pictures, arcname=".")
    captions = captions_csv(tmp_path)
    run(capsys, pictures, "--captions", captions, "--output", tmp_path / "a")
    code, _, _ = run(capsys, archive, "--captions", captions, "--output", tmp_path / "b")
    assert code == 0
    written = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.tar")}
    assert written == {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.tar")}
    keys = [k for s in expand_shards([str(tmp_path / "a")]) for k in _keys_in_order(s)]
    assert sorted(keys) == sorted(n[:-4] for n in NAMES)
    assert keys != sorted(keys)  # mixed, so that a shard is no run of neighbours


def _keys_in_order(shard: Path) -> list[str]:
    with tarfile.open(shard) as file:
        return [name[:-4] for name in file.getnames() if name.endswith(".jpg")]


def test_lists_choose_pictures(pictures: Path, tmp_path: Path, capsys) -> None:
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    keep.write_text("\n".join([*NAMES[:8], "unknown.jpg"]) + "\n\n")
    drop.write_text("\r\n".join(NAMES[6:10]))
    code, out, _ = run(
        capsys, pictures, "--captions", captions_csv(tmp_path), "--output", tmp_path / "o",
        "--images", keep, "--exclude", drop,
    )  # fmt: skip
    assert code == 0
    assert set(contents(tmp_path / "o")) == {name[:-4] for name in NAMES[:6]}
    assert "left out 4 pictures named in the exclude list ('6_ab.jpg', '7_ab.jpg'" in out
    assert "left out 2 pictures not named in the image list" in out
    assert "left out 1 names in keep.txt without a picture ('unknown.jpg')" in out


def test_skips_are_counted_with_their_reason(pictures: Path, tmp_path: Path, capsys) -> None:
    (pictures / NAMES[0]).write_bytes(b"<html>not found</html>")
    (pictures / NAMES[1]).write_bytes(jpeg(1)[:-300])
    (pictures / NAMES[2]).write_bytes(b"")
    (pictures / NAMES[3]).unlink()
    (pictures / "lonely.jpg").write_bytes(jpeg(99))
    (pictures / ".hidden.jpg").write_bytes(b"")
    (pictures / "notes.md").write_text("x")
    captions = captions_csv(tmp_path)
    with captions.open("a") as file:
        file.write(f'{NAMES[5]},"  "\n{NAMES[5]},\n{NAMES[6]},"two\nlines"\n')
    code, out, _ = run(capsys, pictures, "--captions", captions, "--output", tmp_path / "o")
    assert code == 0
    assert "wrote 8 pictures, 41 captions" in out
    assert "left out 3 unreadable pictures (" in out
    assert "'0_ab.jpg is not a JPEG, PNG or WebP picture'" in out
    assert "'1_ab.jpg cannot be decoded (OSError)'" in out
    assert "'2_ab.jpg has 0 bytes'" in out
    assert "left out 5 captions without a picture ('3_ab.jpg')" in out
    assert "left out 1 pictures without captions ('lonely.jpg')" in out
    assert "left out 2 blank captions" in out
    found = contents(tmp_path / "o")
    assert set(found) == {name[:-4] for name in NAMES[4:]}
    assert found["6_ab"][1][-1] == "two lines"


def test_keys_have_no_dots_and_stay_unique(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "pictures"
    for name in ("a.b.jpg", "a_b.jpg", "v1.0/c.jpg", "c.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(len(name)))
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    (folder / "really_png.jpg").write_bytes(png.getvalue())
    captions = tmp_path / "c.csv"
    names = ["a.b.jpg", "a_b.jpg", "v1.0/c.jpg", "c.jpg", "really_png.jpg"]
    captions.write_text("image,caption\n" + "".join(f"{n},of {n}\n" for n in names))
    assert run(capsys, folder, "--captions", captions, "--output", tmp_path / "o")[0] == 0
    found = {key: value[1] for key, value in contents(tmp_path / "o").items()}
    assert found == {
        "a_b": ["of a.b.jpg"],
        "a_b-2": ["of a_b.jpg"],
        "v1_0/c": ["of v1.0/c.jpg"],
        "c": ["of c.jpg"],
        "really_png": ["of really_png.jpg"],
    }
    with tarfile.open(expand_shards([str(tmp_path / "o")])[0]) as file:
        assert "really_png.png" in file.getnames()


def test_nothing_is_overwritten_unasked(pictures: Path, tmp_path: Path, capsys) -> None:
    captions = captions_csv(tmp_path)
    arguments = [pictures, "--captions", captions, "--output", tmp_path / "o"]
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


def test_a_failed_replacement_keeps_the_old_shards(pictures: Path, tmp_path: Path, capsys) -> None:
    captions = captions_csv(tmp_path)
    arguments = [pictures, "--captions", captions, "--output", tmp_path / "o"]
    run(capsys, *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    for name in NAMES:
        (pictures / name).write_bytes(b"gone bad")
    code, _, err = run(capsys, *arguments, "--overwrite")
    assert code == 2
    assert "none of the 12 chosen pictures can be read" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def _broken(kind: str, tmp_path: Path, pictures: Path) -> list[object]:
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
        return [pictures, "--captions", captions, *output, "--exclude", listing]
    elif kind == "list without match":
        listing.write_text("other.jpg\n")
        return [pictures, "--captions", captions, *output, "--exclude", listing]
    elif kind == "all excluded":
        listing.write_text("\n".join(NAMES))
        return [pictures, "--captions", captions, *output, "--exclude", listing]
    elif kind == "no pictures":
        (tmp_path / "none").mkdir()
        return [tmp_path / "none", "--captions", captions, *output]
    elif kind == "missing source":
        return [tmp_path / "none", "--captions", captions, *output]
    elif kind == "source is no tar":
        return [captions, "--captions", captions, *output]
    elif kind == "cut tar":
        with tarfile.open(tmp_path / "p.tar", "w") as file:
            file.add(pictures, arcname=".")
        content = (tmp_path / "p.tar").read_bytes()
        (tmp_path / "p.tar").write_bytes(content[:5000])
        return [tmp_path / "p.tar", "--captions", captions, *output]
    elif kind == "same source twice":
        return [pictures, pictures, "--captions", captions, *output]
    elif kind == "pictures without --captions":
        return [pictures, *output]
    elif kind == "list without --captions":
        (tmp_path / "t.txt").write_text("x\n")
        return [tmp_path / "t.txt", *output, "--exclude", captions]
    elif kind == "prefix":
        return [pictures, "--captions", captions, *output, "--prefix", "../x"]
    return [pictures, "--captions", captions, *output]


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
    "list without match": "names no picture of the source",
    "all excluded": "leaves no picture",
    "no pictures": "has no picture",
    "missing source": "no such file or folder",
    "source is no tar": "captions.csv: ",
    "cut tar": "p.tar: ",
    "same source twice": "is in another source too",
    "pictures without --captions": "--captions FILE",
    "list without --captions": "give --captions",
    "prefix": "prefix '../x'",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_with_one_sentence(
    kind: str, pictures: Path, tmp_path: Path, capsys
) -> None:
    code, out, err = run(capsys, *_broken(kind, tmp_path, pictures))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert REFUSED[kind] in err
    assert not list((tmp_path / "o").glob("*")) if (tmp_path / "o").exists() else True


def test_a_killed_run_leaves_no_shard_and_can_be_repeated(
    pictures: Path, tmp_path: Path, capsys
) -> None:
    captions = captions_csv(tmp_path)
    arguments = [str(pictures), "--captions", str(captions), "--output", str(tmp_path / "o")]
    script = (
        "import sys, time\n"
        "from dalr_scale.data import prepare_pairs\n"
        "check = prepare_pairs.check_image\n"
        "prepare_pairs._CHUNK = 4\n"
        "prepare_pairs.check_image = lambda data: (time.sleep(0.2), check(data))[1]\n"
        "from dalr_scale.prepare import main\n"
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
    pictures: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (pictures / "5_ab.jpg").write_bytes(b"no picture")
    captions = captions_csv(tmp_path)

    def arguments(output: str) -> list[object]:
        words = (pictures, "--captions", captions, "--samples-per-shard", 2)
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
    pictures: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    captions = captions_csv(tmp_path)
    words = [pictures, "--captions", captions, "--output", tmp_path / "o"]
    words += ["--samples-per-shard", 2]

    commit = prepare_pairs.ShardSetWriter.commit

    def stop(writer, progress: dict) -> None:
        commit(writer, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_pairs.ShardSetWriter, "commit", stop)
        assert run(capsys, *words)[0] == 130
    assert (tmp_path / "o" / ".pairs.partial" / "progress.json").exists()
    (pictures / "3_ab.jpg").write_bytes(jpeg(77))
    assert run(capsys, *words)[0] == 0
    assert contents(tmp_path / "o")["3_ab"][0] == jpeg(77)


def test_both_commands_run_as_modules(pictures: Path, tmp_path: Path) -> None:
    captions = captions_csv(tmp_path)

    def module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"dalr_scale.{name}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = module("prepare", pictures, "--captions", captions, "--output", tmp_path / "o")
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    shard = tmp_path / "o" / "pairs-000000.tar"
    assert index_path(shard).exists()
    done = module("index", tmp_path / "o", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("prepare", "index"):
        assert "usage: dalr-scale" in module(name, "--help").stdout
    assert module("prepare", tmp_path / "none", "--output", tmp_path).returncode == 2


@pytest.fixture
def data_root() -> Path:
    root = os.environ.get("DALR_DATA")
    if not root or not (Path(root) / "flickr8k" / "images.tar").exists():
        pytest.skip("set DALR_DATA to a folder with flickr8k/ to prepare real data")
    return Path(root) / "flickr8k"


def test_flickr8k_is_prepared_in_time(data_root: Path, tmp_path: Path, capsys) -> None:
    start = time.perf_counter()
    code, out, _ = run(
        capsys, data_root / "images.tar", "--captions", data_root / "captions.txt",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert time.perf_counter() - start < 60
    assert out.splitlines()[0].startswith("wrote 8,091 pictures, 40,455 captions to 9 shards")
    assert len(out.splitlines()) == 1
    for path in tmp_path.glob("*.idx"):
        path.unlink()
    start = time.perf_counter()
    assert index.main([str(tmp_path)]) == 0
    assert time.perf_counter() - start < 5
    source = Source(expand_shards([str(tmp_path)]))
    assert (source.num_items, source.num_samples) == (40_455, 8_091)


def test_flickr8k_without_the_evaluation_text(data_root: Path, tmp_path: Path, capsys) -> None:
    drop = data_root / "images_overlapping_eval_text.txt"
    code, out, _ = run(
        capsys, data_root / "images.tar", "--captions", data_root / "captions.txt",
        "--images", data_root / "train_images.txt", "--exclude", drop, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert "left out 1,196 pictures named in the exclude list" in out
    left_out = {name.rpartition(".")[0] for name in drop.read_text().split()}
    assert not left_out & set(contents(tmp_path))
