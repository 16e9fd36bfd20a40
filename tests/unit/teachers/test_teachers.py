"""Frozen teachers: towers, poolers, tokens, tokenizers, and what is refused."""

import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from dalr_scale.errors import UserError
from dalr_scale.models.encoder import SentenceEncoder, encode_sentences, load_tokenizer
from dalr_scale.models.tokenizer import compare_tokenizers, same_tokenizer, tokenizer_hash
from dalr_scale.teachers.models import load_image_teacher, load_text_teacher

SENTENCES = ["a dog runs", "the red cat sleeps on the beach", "man"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"model_type": "bert", "intermediate_size": 32, "max_position_embeddings": 40} | SIZES


def vocabulary(extra: list[str]) -> list[str]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [piece for c in "abcdefghijklmnopqrstuvwxyz" for piece in (c, f"##{c}")]
    return special + letters + extra


def make_tokenizer(path, extra=("the", "dog", "cat")):
    path.write_text("\n".join(vocabulary(list(extra))) + "\n")
    return load_tokenizer(path)


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(tmp_path / "vocab.txt")
    encoder = SentenceEncoder.from_config(BERT, tokenizer, "mean").eval()
    encoder.save(tmp_path / "bert")
    return encoder


@pytest.fixture
def clip_directory(tmp_path):
    """A tiny open_clip model with a WordPiece tokenizer, as a local directory."""
    directory = tmp_path / "clip"
    tokenizer = make_tokenizer(tmp_path / "clip-vocab.txt")
    tokenizer.save_pretrained(directory)
    text = {"context_length": 12, "vocab_size": len(tokenizer), "width": 16, "heads": 2}
    text |= {"layers": 2, "pool_type": "eos", "eos_id": 3, "hf_tokenizer_name": "local"}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{directory}")
    assert model.logit_scale.ndim == 0
    save_file(model.state_dict(), directory / "model.safetensors")
    return directory


def test_text_teacher_gives_pooled_and_token_features(bert, tmp_path):
    teacher = load_text_teacher(f"hf:{tmp_path / 'bert'}", "mean", tokens=True)
    pooled, tokens, mask = teacher.encode(SENTENCES)
    torch.testing.assert_close(pooled, encode_sentences(bert, SENTENCES))
    batch = bert.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = bert.backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert tokens.shape == (3, hidden.shape[1] - 1, 16) and teacher.token_width == 16
    torch.testing.assert_close(tokens, hidden[:, 1:])  # the first token is left out ...
    # ... and the end token is kept: one more than the word pieces.
    pieces = [len(bert.tokenizer.tokenize(text)) for text in SENTENCES]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [n + 1 for n in pieces]


def test_poolers_differ_and_none_is_guessed(bert, tmp_path):
    mean = load_text_teacher(str(tmp_path / "bert"), "mean").encode(SENTENCES)[0]
    cls = load_text_teacher(str(tmp_path / "bert"), "cls_before_pooler").encode(SENTENCES)[0]
    assert (mean - cls).abs().max() > 0.1
    with pytest.raises(UserError, match="needs a pooler"):
        load_text_teacher(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="has its own pooling"):
        load_text_teacher("open_clip:anything", "mean")


def test_without_tokens_none_are_returned_and_order_is_kept(bert, tmp_path):
    teacher = load_text_teacher(str(tmp_path / "bert"), "mean")
    pooled, tokens, mask = teacher.encode(SENTENCES)
    assert tokens is None and mask is None
    swapped = teacher.encode(SENTENCES[::-1])[0]
    torch.testing.assert_close(pooled, swapped.flip(0))


def test_long_sentences_are_cut_where_asked(bert, tmp_path):
    teacher = load_text_teacher(str(tmp_path / "bert"), "mean", tokens=True, max_length=6)
    assert teacher.encode(["dog " * 50])[1].shape[1] == 5
    assert teacher.facts["max_length"] == 6


def test_teachers_stay_frozen_and_in_evaluation_mode(bert, clip_directory, tmp_path):
    for teacher in (
        load_text_teacher(str(tmp_path / "bert"), "mean"),
        load_text_teacher(f"open_clip:{clip_directory}"),
        load_image_teacher(str(clip_directory)),
    ):
        teacher.train()
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(parameter.ndim > 0 for parameter in teacher.parameters())
    pooled = load_text_teacher(str(tmp_path / "bert"), "mean").encode(SENTENCES)[0]
    assert not pooled.requires_grad
    # Control: the same model in training mode is not deterministic (dropout).
    assert not torch.equal(*(run_training_mode(bert) for _ in range(2)))


def run_training_mode(encoder):
    batch = encoder.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return encoder.train()(batch["input_ids"], batch["attention_mask"])


def test_open_clip_towers_equal_the_library(clip_directory):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{clip_directory}")
    ids = open_clip.get_tokenizer(f"local-dir:{clip_directory}")(SENTENCES)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    image, text = (
        load_image_teacher(f"open_clip:{clip_directory}"),
        load_text_teacher(f"open_clip:{clip_directory}", tokens=True),
    )
    pixels = image.transform(photo)
    with torch.no_grad():
        torch.testing.assert_close(pixels, transform(photo))
        torch.testing.assert_close(image.encode(pixels[None]), model.encode_image(pixels[None]))
        pooled, tokens, mask = text.encode(SENTENCES)
        torch.testing.assert_close(pooled, model.encode_text(ids))
    assert (image.width, text.width, text.token_width) == (24, 24, 16)
    real = (ids != 0)[:, 1:]
    assert mask.sum(1).tolist() == real.sum(1).tolist()
    assert tokens.shape == (3, int(real.sum(1).max()), 16)
    # The pooled feature is the projected state of the end token, which is the last real one.
    last = tokens[torch.arange(3), mask.sum(1) - 1]
    torch.testing.assert_close(last @ model.text_projection, pooled)
    pickle.loads(pickle.dumps(image.transform))  # loader workers receive it


def test_a_named_architecture_with_a_checkpoint_file(tmp_path):
    weights = tmp_path / "rn50.pt"
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="is no safetensors file"):
        load_image_teacher(f"RN50@{weights}")
    with pytest.raises(UserError, match="is no safetensors file"):
        load_image_teacher("RN50@missing.safetensors")


def test_a_pretrained_tag_names_a_hub_repository(clip_directory, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(clip_directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    teacher = load_image_teacher("ViT-B-32@laion2b_s34b_b79k")
    assert teacher.width == load_image_teacher(str(clip_directory)).width
    assert [name for name, _ in asked] == ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]
    assert not any(pattern.endswith((".pt", ".bin")) for pattern in asked[0][1])
    with pytest.raises(UserError, match="no tag of ViT-B-32"):
        load_image_teacher("ViT-B-32@laion3b")


def test_clip_tokenizer_counts_tokens_up_to_the_end_token(clip_directory):
    config = json.loads((clip_directory / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    text |= {"vocab_size": 49408, "pool_type": "argmax"}
    del text["hf_tokenizer_name"]
    (clip_directory / "open_clip_config.json").write_text(json.dumps(config))
    (clip_directory / "model.safetensors").unlink()
    model = open_clip.create_model(f"local-dir:{clip_directory}")
    save_file(model.state_dict(), clip_directory / "model.safetensors")
    teacher = load_text_teacher(f"open_clip:{clip_directory}", tokens=True)
    # In this vocabulary the padding id 0 is also the word piece "!".
    assert teacher.encode(["a ! dog", "a dog"])[2].sum(1).tolist() == [4, 3]


def test_open_clip_weights_must_be_safetensors_finite_and_complete(clip_directory):
    weights = load_file(clip_directory / "model.safetensors")
    save_file(
        weights | {"visual.proj": weights["visual.proj"] * torch.nan},
        clip_directory / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"visual\.proj holds values that are not finite"):
        load_image_teacher(str(clip_directory))
    partial = {k: v for k, v in weights.items() if k != "visual.proj"}
    save_file(partial, clip_directory / "model.safetensors")
    with pytest.raises(UserError, match="does not load"):
        load_image_teacher(str(clip_directory))
    (clip_directory / "model.safetensors").unlink()
    torch.save(weights, clip_directory / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors weights"):
        load_image_teacher(str(clip_directory))
    (clip_directory / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="not an open_clip directory"):
        load_image_teacher(str(clip_directory))


def test_a_pickle_beside_the_safetensors_is_not_read(clip_directory):
    # open_clip itself would prefer this name over model.safetensors.
    (clip_directory / "open_clip_pytorch_model.bin").write_bytes(b"not a model")
    with pytest.raises(Exception):  # noqa: B017 - the control: the library trips over it
        open_clip.create_model(f"local-dir:{clip_directory}")
    assert load_image_teacher(str(clip_directory)).width == 24


def test_tokenizers_are_compared_by_what_decides_the_ids(tmp_path):
    first = make_tokenizer(tmp_path / "a.txt")
    same = make_tokenizer(tmp_path / "b.txt")
    other = make_tokenizer(tmp_path / "c.txt", ("the", "cat", "dog"))
    cased = BertTokenizer(vocab=str(tmp_path / "a.txt"), do_lower_case=False)
    first(["a", "a dog"], padding=True, truncation=True, max_length=4)  # state that must not count
    compare_tokenizers(first, same)
    assert same_tokenizer(first, same) and tokenizer_hash(first) == tokenizer_hash(same)
    with pytest.raises(UserError, match="60 and 60 entries, 2 of the student's at another place"):
        compare_tokenizers(first, other)
    with pytest.raises(UserError, match="same vocabulary, but other settings"):
        compare_tokenizers(first, cased)


def test_teacher_with_another_vocabulary_reads_raw_sentences(bert, tmp_path):
    # A student's ids would mean other words here; the teacher's own tokenizer is what counts.
    student = make_tokenizer(tmp_path / "student.txt", ("cat", "dog", "the"))
    teacher = load_text_teacher(str(tmp_path / "bert"), "mean")
    batch = student(SENTENCES, padding=True, return_tensors="pt")
    own = teacher.encode(SENTENCES)[0]
    wrong = teacher.encode_ids(batch["input_ids"], batch["attention_mask"])[0]
    assert (own - wrong).abs().max() > 0.01
    torch.testing.assert_close(own, encode_sentences(bert, SENTENCES))
