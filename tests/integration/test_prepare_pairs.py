"""``dalr-scale prepare`` with images: layouts, splits, lists, skips and keys."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from image_directories import NAMES, captions_csv, contents, everything, jpeg, quoted, run, texts
from PIL import Image

from dalr_scale.commands import index
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.stream.source import Source

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
    "directories in the names": lambda: "\n".join(
        ["image,caption", *(f"some/directory/{n},{quoted(t)}" for n in NAMES for t in texts(n))]
    ),
    "names without suffix": lambda: "\n".join(
        ["image,caption", *(f"{n[:-4]},{quoted(t)}" for n in NAMES for t in texts(n))]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_caption_layouts(layout, images: Path, tmp_path: Path, capsys) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_bytes(layout().encode())
    code, out, err = run(
        capsys, images, "--captions", captions, "--output", tmp_path / "o",
        "--samples-per-shard", 5,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "wrote 12 images, 60 captions to 3 shards" in out
    assert "left out" not in out
    assert contents(tmp_path / "o") == everything()


def karpathy(directory: Path) -> Path:
    """Every fourth image is for validation, every sixth for testing; directories in the names."""
    images = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": "val" if number % 4 == 0 else "test" if number % 6 == 1 else "train",
            "sentences": [{"raw": text, "tokens": []} for text in texts(name)],
        }
        for number, name in enumerate(NAMES)
    ]
    path = directory / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_splits_of_a_karpathy_file_become_sets(images: Path, tmp_path: Path, capsys) -> None:
    arguments = (images, "--captions", karpathy(tmp_path), "--output", tmp_path / "o")
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "wrote 12 images, 60 captions to 3 shards" in out
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
    assert code == 0 and "wrote 9 images, 45 captions to 1 shards" in out
    code, _, err = run(capsys, *arguments, "--split", "trian", "--prefix", "x")
    assert code == 2 and "has no split 'trian', but test, train, val" in err
    plain = (images, "--captions", captions_csv(tmp_path), "--output", tmp_path / "p")
    code, _, err = run(capsys, *plain, "--split", "train")
    assert code == 2 and "but no splits" in err


@pytest.mark.parametrize(
    "content",
    [{"images": [{"id": 1}], "annotations": []}, {"images": [{"filename": "a"}]}, {"images": [3]}],
)
def test_documents_of_another_layout_are_refused(
    content: dict, images: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content, indent=1))
    code, _, err = run(capsys, images, "--captions", path, "--output", tmp_path / "o")
    assert code == 2 and "neither like COCO's" in err and err.count("\n") == 1


def test_links_out_of_the_directory_are_not_followed(images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(99))
    (images / "0_ab.jpg").unlink()
    (images / "0_ab.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "link.jpg").symlink_to(images / "1_ab.jpg")  # inside: an image like any other
    captions = captions_csv(tmp_path)
    code, out, _ = run(capsys, images, "--captions", captions, "--output", tmp_path / "o")
    assert code == 0 and "wrote 11 images" in out
    assert "left out 5 captions without an image ('0_ab.jpg')" in out
    assert "left out 1 images without captions ('link.jpg')" in out


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_images_gives_the_same_bytes_as_a_directory(
    form: int, images: Path, tmp_path: Path, capsys
) -> None:
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w", format=form) as file:
        file.add(images, arcname=".")
    captions = captions_csv(tmp_path)
    run(capsys, images, "--captions", captions, "--output", tmp_path / "a")
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


def test_lists_choose_images(images: Path, tmp_path: Path, capsys) -> None:
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    keep.write_text("\n".join([*NAMES[:8], "unknown.jpg"]) + "\n\n")
    drop.write_text("\r\n".join(NAMES[6:10]))
    code, out, _ = run(
        capsys, images, "--captions", captions_csv(tmp_path), "--output", tmp_path / "o",
        "--images", keep, "--exclude", drop,
    )  # fmt: skip
    assert code == 0
    assert set(contents(tmp_path / "o")) == {name[:-4] for name in NAMES[:6]}
    assert "left out 4 images named in the exclude list ('6_ab.jpg', '7_ab.jpg'" in out
    assert "left out 2 images not named in the image list" in out
    assert "left out 1 names in keep.txt without an image ('unknown.jpg')" in out


def test_skips_are_counted_with_their_reason(images: Path, tmp_path: Path, capsys) -> None:
    (images / NAMES[0]).write_bytes(b"<html>not found</html>")
    (images / NAMES[1]).write_bytes(jpeg(1)[:-300])
    (images / NAMES[2]).write_bytes(b"")
    (images / NAMES[3]).unlink()
    (images / "lonely.jpg").write_bytes(jpeg(99))
    (images / ".hidden.jpg").write_bytes(b"")
    (images / "notes.md").write_text("x")
    captions = captions_csv(tmp_path)
    with captions.open("a") as file:
        file.write(f'{NAMES[5]},"  "\n{NAMES[5]},\n{NAMES[6]},"two\nlines"\n')
    code, out, _ = run(capsys, images, "--captions", captions, "--output", tmp_path / "o")
    assert code == 0
    assert "wrote 8 images, 41 captions" in out
    assert "left out 3 unreadable images (" in out
    assert "'0_ab.jpg is not a JPEG, PNG or WebP image'" in out
    assert "'1_ab.jpg cannot be decoded (OSError)'" in out
    assert "'2_ab.jpg has 0 bytes'" in out
    assert "left out 5 captions without an image ('3_ab.jpg')" in out
    assert "left out 1 images without captions ('lonely.jpg')" in out
    assert "left out 2 blank captions" in out
    found = contents(tmp_path / "o")
    assert set(found) == {name[:-4] for name in NAMES[4:]}
    assert found["6_ab"][1][-1] == "two lines"


def test_keys_have_no_dots_and_stay_unique(tmp_path: Path, capsys) -> None:
    directory = tmp_path / "images"
    for name in ("a.b.jpg", "a_b.jpg", "v1.0/c.jpg", "c.jpg"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(jpeg(len(name)))
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    (directory / "really_png.jpg").write_bytes(png.getvalue())
    captions = tmp_path / "c.csv"
    names = ["a.b.jpg", "a_b.jpg", "v1.0/c.jpg", "c.jpg", "really_png.jpg"]
    captions.write_text("image,caption\n" + "".join(f"{n},of {n}\n" for n in names))
    assert run(capsys, directory, "--captions", captions, "--output", tmp_path / "o")[0] == 0
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


@pytest.fixture
def data_root() -> Path:
    root = os.environ.get("DALR_DATA")
    if not root or not (Path(root) / "flickr8k" / "images.tar").exists():
        pytest.skip("set DALR_DATA to a directory with flickr8k/ to prepare real data")
    return Path(root) / "flickr8k"


def test_flickr8k_is_prepared_in_time(data_root: Path, tmp_path: Path, capsys) -> None:
    start = time.perf_counter()
    code, out, _ = run(
        capsys, data_root / "images.tar", "--captions", data_root / "captions.txt",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert time.perf_counter() - start < 60
    assert out.splitlines()[0].startswith("wrote 8,091 images, 40,455 captions to 9 shards")
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
    assert "left out 1,196 images named in the exclude list" in out
    left_out = {name.rpartition(".")[0] for name in drop.read_text().split()}
    assert not left_out & set(contents(tmp_path))
