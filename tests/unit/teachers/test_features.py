"""The command that stores teacher features beside shards."""

import dataclasses
import io
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dalr_scale.commands.features import main
from dalr_scale.data.shards.features_store import features_path, open_features
from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards
from dalr_scale.distributed import world as world_module
from dalr_scale.errors import UserError
from dalr_scale.models.encoder import SentenceEncoder, load_tokenizer
from dalr_scale.teachers.extract import FeatureRequest, store_features
from dalr_scale.teachers.models import load_image_teacher, load_text_teacher

CAPTIONS = [["a dog runs", "the dog is on the beach"], ["a red cat"], ["man", "a big man", "cat"]]


def image_bytes(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path):
    with ShardSetWriter(tmp_path / "shards", "pairs", samples_per_shard=2) as writer:
        for i, lines in enumerate(CAPTIONS):
            text = "".join(f"{line}\n" for line in lines)
            writer.write(f"img_{i}", {"png": image_bytes(i), "txt": text.encode()})
    return writer.shards


@pytest.fixture
def bert(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [piece for c in "abcdefghijklmnopqrstuvwxyz" for piece in (c, f"##{c}")]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *letters, "dog", "the"]) + "\n")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "bert", "intermediate_size": 16, "max_position_embeddings": 40} | sizes
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    return SentenceEncoder.from_config(config, tokenizer, "mean").save(tmp_path / "bert")


@pytest.fixture
def clip_directory(tmp_path, bert):
    directory = tmp_path / "clip"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((bert / name).read_bytes())
    text = {"context_length": 16, "vocab_size": 59, "width": 16, "heads": 2, "layers": 1}
    text |= {"pool_type": "eos", "eos_id": 3, "hf_tokenizer_name": "local"}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{directory}")
    save_file(model.state_dict(), directory / "model.safetensors")
    return directory


def run(shards, *words):
    return main([*map(str, shards), "--quiet", "--device", "cpu", *map(str, words)])


def test_text_features_have_one_row_an_item(shards, bert):
    assert (
        run(shards, "--name", "t", "--text-teacher", bert, "--pooler", "mean", "--batch-size", 2)
        == 0
    )
    teacher = load_text_teacher(str(bert), "mean")
    for shard, captions in zip(shards, (CAPTIONS[:2], CAPTIONS[2:]), strict=True):
        table = open_features(shard, "t")
        lines = [line for lines in captions for line in lines]
        expected = teacher.encode(lines)[0].numpy()
        assert (table.level, table.rows, table.dim) == ("item", len(lines), 16)
        np.testing.assert_allclose(table.read(np.arange(len(lines))).values, expected, atol=2e-3)
        assert table.manifest["pooling"] == "mean" and table.manifest["model"] == "bert"
        assert len(table.manifest["tokenizer_sha256"]) == 64


@pytest.mark.parametrize("kind", ["hf", "open_clip"])
def test_token_features_follow_the_items(kind, shards, bert, clip_directory):
    words = (
        ("--text-teacher", bert, "--pooler", "mean")
        if kind == "hf"
        else ("--caption-teacher", clip_directory)
    )
    run(shards, "--name", "tok", "--tokens", "--batch-size", 2, *words)
    teacher = (
        load_text_teacher(str(bert), "mean", tokens=True)
        if kind == "hf"
        else load_text_teacher(f"open_clip:{clip_directory}", tokens=True)
    )
    table = open_features(shards[0], "tok")
    lines = CAPTIONS[0] + CAPTIONS[1]
    _, tokens, mask = teacher.encode(lines)
    values, lengths, faults = table.read(np.arange(len(lines)))
    assert lengths is not None and not faults
    for row, stored in enumerate(np.split(values, np.cumsum(lengths)[:-1])):
        np.testing.assert_allclose(stored, tokens[row][mask[row]].numpy(), atol=4e-3)


def test_image_and_caption_features(shards, clip_directory):
    run(shards, "--name", "img", "--image-teacher", clip_directory, "--batch-size", 1)
    run(shards, "--name", "cap", "--caption-teacher", clip_directory)
    teacher = load_image_teacher(str(clip_directory))
    table = open_features(shards[0], "img")
    pixels = [teacher.transform(Image.open(io.BytesIO(image_bytes(i)))) for i in (0, 1)]
    assert (table.level, table.rows, table.dim) == ("sample", 2, 24)
    np.testing.assert_allclose(
        table.read(np.arange(2)).values, teacher.encode(torch.stack(pixels)).numpy(), atol=4e-3
    )
    assert open_features(shards[1], "cap").rows == 3


def test_packed_text_shards(tmp_path, bert):
    shards = write_text_shards([f"dog {'a' * i}" for i in range(1, 8)], tmp_path, "w", per_member=3)
    run(shards, "--name", "t", "--text-teacher", bert, "--pooler", "mean")
    assert open_features(shards[0], "t").rows == 7


def test_finished_shards_are_skipped_and_other_features_refused(shards, bert, capsys):
    words = ("--name", "t", "--text-teacher", bert, "--pooler", "mean")
    run(shards, *words)
    features_path(shards[1], "t").unlink()  # as after an interruption
    before = features_path(shards[0], "t").stat().st_mtime_ns
    run(shards, *words)
    assert "1 of 2 shards have these features already" in capsys.readouterr().err
    assert features_path(shards[0], "t").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds other features"):
        run(shards, "--name", "t", "--text-teacher", bert, "--pooler", "cls_before_pooler")
    run(shards, *words, "--overwrite")
    assert features_path(shards[0], "t").stat().st_mtime_ns > before


def test_ranks_share_the_shards(shards, bert, monkeypatch):
    words = ("--name", "t", "--text-teacher", bert, "--pooler", "mean")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert run(shards, *words) == 0
        done.append([features_path(shard, "t").exists() for shard in shards])
    assert done == [[True, False], [True, True], [True, True]]


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, bert, clip_directory):
    sentences = [f"dog {'ab ' * (n % 7)}" for n in range(40)]
    found = []
    for world in (1, 2, 3):
        directory = tmp_path / str(world)
        write_text_shards(sentences, directory, "w", per_member=4, members_per_shard=2)
        paths = sorted(directory.glob("w-??????.tar"))
        for rank in reversed(range(world)):
            for request in (
                FeatureRequest("t", "text", str(bert), pooler="mean", batch_size=3),
                FeatureRequest("k", "text", str(bert), pooler="mean", tokens=True, batch_size=3),
                FeatureRequest("c", "caption", str(clip_directory), batch_size=3),
            ):
                on_cpu = dataclasses.replace(request, device="cpu")
                store_features(paths, on_cpu, rank=rank, world_size=world)
        tars = sorted(directory.glob("*.features.tar"))
        found.append({path.name: path.read_bytes() for path in tars})
    assert len(found[0]) == 15 and found[0] == found[1] == found[2]


def write_npz(path, names, values=None):
    feat = np.arange(len(names) * 4, dtype=np.float32).reshape(-1, 4) if values is None else values
    np.savez(path, feat=feat, names=np.array(names))
    return path


def test_npz_features_are_matched_by_name(shards, tmp_path, capsys):
    names = ["img_2.jpg", "other.jpg", "img_0.jpg", "directory/img_1.jpg"]
    run(shards, "--name", "n", "--from-npz", write_npz(tmp_path / "f.npz", names))
    assert "1 of 4 names are in no shard" in capsys.readouterr().err
    table = open_features(shards[0], "n")
    assert table.level == "sample" and table.read(np.arange(2)).values[:, 0].tolist() == [8.0, 12.0]
    assert open_features(shards[1], "n").read(np.arange(1)).values[0].tolist() == [
        0.0,
        1.0,
        2.0,
        3.0,
    ]


def test_npz_that_does_not_fit_is_refused(shards, tmp_path):
    path = tmp_path / "f.npz"
    cases = [
        (["img_0.jpg", "img_1.jpg"], None, "no features for 1 of the 1 samples"),
        (["a/img_0", "b/img_0", "img_1", "img_2"], None, "the first is 'img_0'"),
        (["img_0.jpg", "img_0.png", "img_1", "img_2"], None, "two features for 'img_0.png'"),
        (["img_0", "img_1", "img_2"], np.ones((2, 4)), "2 features, but 3 names"),
        (["img_0", "img_1", "img_2"], np.full((3, 4), np.nan), "of 'img_0' is not finite"),
        (["img_0", "img_1", "img_2"], np.full((3, 4), 1e6), "not finite in float16"),
        ([b"img_0", b"img_1", b"img_2"], np.ones((3, 4)), "names .n. text"),
    ]
    for names, values, message in cases:
        with pytest.raises(UserError, match=message):
            run(shards, "--name", "n", "--from-npz", write_npz(path, names, values))
    assert not any(features_path(shard, "n").exists() for shard in shards)
    np.savez(path, feat=np.ones((3, 4)), names=np.array(["img_0"] * 3, dtype=object))
    with pytest.raises(UserError, match="is not an npz file"):
        run(shards, "--name", "n", "--from-npz", path)
    with pytest.raises(UserError, match="is not an npz file"):
        run(shards, "--name", "n", "--from-npz", tmp_path / "none.npz")


def test_wrong_options_are_refused(shards, bert, clip_directory):
    for words, message in (
        (("--text-teacher", bert), "needs a pooler"),
        (("--image-teacher", clip_directory, "--tokens"), "--tokens needs"),
        (("--image-teacher", clip_directory, "--pooler", "mean"), "belong to --text-teacher"),
        (("--image-teacher", clip_directory, "--batch-size", 0), "use at least 1"),
        (("--image-teacher", bert), "not an open_clip directory"),
    ):
        with pytest.raises(UserError, match=message):
            run(shards, "--name", "x", *words)
    with pytest.raises(UserError, match="use letters, digits"):
        run(shards, "--name", "../x", "--text-teacher", bert, "--pooler", "mean")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this launch is right on a GPU host")
def test_a_launch_that_starts_one_process_of_two_is_refused(shards, bert, monkeypatch):
    words = ("--name", "t", "--text-teacher", bert, "--pooler", "mean")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(world_module, "_processes_requested_of_parent", lambda: 2)
    with pytest.raises(UserError, match=r"--num_processes 2 -m dalr_scale features"):
        run(shards, *words)
    assert not features_path(shards[0], "t").exists()


def test_unreadable_image_names_its_sample(tmp_path, clip_directory):
    with ShardSetWriter(tmp_path / "bad", "pairs", samples_per_shard=9) as writer:
        writer.write("fine", {"png": image_bytes(0), "txt": b"a dog\n"})
        writer.write("torn", {"png": image_bytes(1)[:90], "txt": b"a cat\n"})
    with pytest.raises(UserError, match="image of sample 'torn' cannot be decoded"):
        run(writer.shards, "--name", "img", "--image-teacher", clip_directory)
