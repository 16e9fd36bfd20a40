"""The sentence encoder: pooling, loading, saving, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from common import tiny_config
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from dalr_scale.errors import UserError
from dalr_scale.models.encoder import (
    POOLERS,
    SentenceEncoder,
    encode_sentences,
    load_tokenizer,
    pool,
)
from dalr_scale.models.tokenizer import length_sorted_batches, unknown_share
from dalr_scale.training.build import build_encoder

WORDS = ["the", "dog", "cat", "runs", "sleeps", "on", "in", "beach", "man", "plays", "big", "red"]
SENTENCES = ["a dog runs", "the small red cat sleeps on the beach", "man", "a big dog plays"]


def write_vocab(path: Path) -> Path:
    letters = [piece for c in "abcdefghijklmnopqrstuvwxyz" for piece in (c, f"##{c}")]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join(special + letters + WORDS) + "\n")
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write_vocab(tmp_path / "vocab.txt"))


def tiny(kind: str = "bert") -> dict:
    if kind == "distilbert":
        return {"model_type": kind, "dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": kind, "intermediate_size": 32, "max_position_embeddings": 40} | sizes


def build(tokenizer, kind="bert", pooler="mean") -> SentenceEncoder:
    torch.manual_seed(0)
    return SentenceEncoder.from_config(tiny(kind), tokenizer, pooler).eval()


@pytest.mark.parametrize(("pooler", "apart"), [("", True), ("cls_before_pooler", False)])
def test_a_new_encoder_pools_by_mean_and_tells_sentences_apart(
    tiny_data: Path, pooler: str, apart: bool
) -> None:
    """Mean pooling is the default because the first token's state hardly differs.

    It is nearly the same for every sentence in an untrained encoder, and the contrastive loss stays
    at log N.
    """
    torch.manual_seed(0)
    encoder = build_encoder(tiny_config(tiny_data, {"model.pooler": pooler}))
    assert encoder.pooler == (pooler or "mean")
    words = (tiny_data / "vocab.txt").read_text().split()[5:]
    sentences = [" ".join(words[3 * i : 3 * i + 5]) for i in range(12)]
    states = torch.nn.functional.normalize(encode_sentences(encoder.eval(), sentences), dim=1)
    closest = float((states @ states.T - 2 * torch.eye(12)).max())
    assert (closest < 0.99) if apart else (closest > 0.9999)


def test_an_encoder_directory_keeps_its_own_pooler(
    tiny_data: Path, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    build(tokenizer, pooler="cls_before_pooler").save(tmp_path / "model")
    changes = {
        "model.encoder": str(tmp_path / "model"),
        "model.architecture": {},
        "model.pooler": "",
    }
    config = tiny_config(tiny_data, changes | {"data.tokenizer": ""})
    assert build_encoder(config).pooler == "cls_before_pooler"


def test_mean_pooling_ignores_padding_and_cls_takes_the_first_token():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 3.0]]
    assert pool(hidden, mask, "cls_before_pooler").tolist() == [[1.0, 2.0]]
    with pytest.raises(UserError, match="unknown pooler 'max'"):
        pool(hidden, mask, "max")


def test_mean_of_half_precision_states_is_summed_in_float32():
    hidden = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    hidden[0, 0, 0] = 1.0078125
    pooled = pool(hidden, torch.ones(1, 4096), "mean")
    assert pooled.dtype == torch.bfloat16
    assert pooled.item() == 1.0  # a running bfloat16 sum would stop growing at 256


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("pooler", POOLERS)
def test_saved_directory_loads_to_the_same_embeddings(kind, pooler, tokenizer, tmp_path):
    if (kind, pooler) == ("distilbert", "cls"):
        with pytest.raises(UserError, match="no MLP pooler"):
            build(tokenizer, kind, pooler)
        return
    encoder = build(tokenizer, kind, pooler)
    encoder.save(tmp_path / "model")
    again = SentenceEncoder.from_directory(tmp_path / "model")
    assert again.pooler == pooler
    assert torch.equal(encode_sentences(encoder, SENTENCES), encode_sentences(again, SENTENCES))
    names = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".md"}


def test_another_pooler_gives_other_embeddings(tokenizer, tmp_path):
    build(tokenizer).save(tmp_path / "model")
    mean = SentenceEncoder.from_directory(tmp_path / "model")
    cls = SentenceEncoder.from_directory(tmp_path / "model", "cls_before_pooler")
    gap = (encode_sentences(mean, SENTENCES) - encode_sentences(cls, SENTENCES)).abs().max()
    assert gap > 0.1


def test_embedding_does_not_depend_on_padding_or_batch(tokenizer):
    for kind in ("bert", "roberta"):
        encoder = build(tokenizer, kind)
        alone = torch.cat([encode_sentences(encoder, [text]) for text in SENTENCES])
        together = encode_sentences(encoder, SENTENCES)
        torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
        # Negative control: without the mask, padding changes the result.
        ids = tokenizer(SENTENCES, padding=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            unmasked = encoder(ids, torch.ones_like(ids))
        assert (unmasked - alone).abs().max() > 1e-3


def test_encoding_keeps_order_duplicates_and_training_mode(tokenizer):
    encoder = build(tokenizer).train()
    texts = [SENTENCES[1], SENTENCES[0], SENTENCES[1], SENTENCES[2]]
    out = encode_sentences(encoder, texts, batch_size=2)
    assert encoder.training and not out.requires_grad and out.dtype == torch.float32
    assert torch.equal(out[0], out[2])
    encoder.eval()
    torch.testing.assert_close(out[1], encode_sentences(encoder, [SENTENCES[0]])[0])


def test_length_sorted_batches_cover_every_row_once_and_truncate(tokenizer):
    batches = list(length_sorted_batches(tokenizer, SENTENCES, max_length=6, batch_size=3))
    rows = [row for chosen, _, _ in batches for row in chosen]
    lengths = [n for _, _, mask in batches for n in mask.sum(1).tolist()]
    assert sorted(rows) == [0, 1, 2, 3]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 6


def test_no_pooler_is_built_unless_it_is_used(tokenizer):
    assert not any("pooler" in name for name, _ in build(tokenizer).named_parameters())
    assert any("pooler" in name for name, _ in build(tokenizer, pooler="cls").named_parameters())


def test_every_parameter_gets_a_gradient(tokenizer):
    for pooler in POOLERS:
        encoder = build(tokenizer, pooler=pooler).train()
        batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        encoder(batch["input_ids"], batch["attention_mask"]).square().sum().backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tokenizer, use_reentrant):
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    grads = []
    for enabled in (False, True):
        encoder = build(tokenizer).train()
        encoder.gradient_checkpointing(enabled, use_reentrant=use_reentrant)
        torch.manual_seed(1)
        encoder(batch["input_ids"], batch["attention_mask"]).square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
        layers = [m for m in encoder.backbone.modules() if hasattr(m, "gradient_checkpointing")]
        assert layers and all(layer.gradient_checkpointing == enabled for layer in layers)
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_roberta_reserves_positions_up_to_its_padding_id(tokenizer):
    assert build(tokenizer, "bert").max_length == 40
    assert build(tokenizer, "roberta").max_length == 39  # padding id 0 takes one position
    long = " ".join(["dog"] * 100)
    for kind in ("bert", "roberta"):
        encoder = build(tokenizer, kind)
        cut = encode_sentences(encoder, [long])
        assert cut.isfinite().all()
        assert torch.equal(cut, encode_sentences(encoder, [long], max_length=1000))


def test_config_errors_name_the_mistake(tokenizer):
    cases = [
        ({"hidden_size": 16}, 'needs "model_type"'),
        ({"model_type": "brt"}, "knows no model type 'brt'"),
        (tiny() | {"hiden_size": 16}, "did you mean 'hidden_size'"),
        (tiny() | {"vocab_size": 10}, "vocab_size 10 is smaller"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            SentenceEncoder.from_config(config, tokenizer, "mean")


def test_directory_without_stated_pooling_needs_a_pooler(tokenizer, tmp_path):
    directory = build(tokenizer).save(tmp_path / "model")
    (directory / "modules.json").unlink()
    with pytest.raises(UserError, match="does not say how it pools"):
        SentenceEncoder.from_directory(directory)
    assert SentenceEncoder.from_directory(directory, "mean").pooler == "mean"


def test_old_sentence_transformers_layout_with_a_subdirectory(tokenizer, tmp_path):
    encoder = build(tokenizer)
    directory = encoder.save(tmp_path / "model")
    inner = directory / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).rename(inner / name)
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": "x.models.Normalize"})
    (directory / "modules.json").write_text(json.dumps(modules))
    again = SentenceEncoder.from_directory(directory)
    assert torch.equal(encode_sentences(encoder, SENTENCES), encode_sentences(again, SENTENCES))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "cls"}, "cls_before_pooler"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
    ],
)
def test_pooling_of_sentence_transformers_is_read(pooling, expected, tokenizer, tmp_path):
    directory = build(tokenizer).save(tmp_path / "model")
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if expected is None:
        with pytest.raises(UserError, match="only cls and mean"):
            SentenceEncoder.from_directory(directory)
    else:
        assert SentenceEncoder.from_directory(directory).pooler == expected


def test_foreign_modules_are_refused_without_an_explicit_pooler(tokenizer, tmp_path):
    directory = build(tokenizer, pooler="cls").save(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    del config["dalr_scale"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Transformer, Pooling, Dense"):
        SentenceEncoder.from_directory(directory)
    assert (
        SentenceEncoder.from_directory(directory, "cls_before_pooler").pooler == "cls_before_pooler"
    )


def test_pickle_weights_and_custom_code_are_refused(tokenizer, tmp_path):
    directory = build(tokenizer).save(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    foreign = config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}
    marker = tmp_path / "executed"
    (directory / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    (directory / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(UserError, match="without custom code"):
        SentenceEncoder.from_directory(directory)
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin instead of model\.safetensors"):
        SentenceEncoder.from_directory(directory)
    assert not marker.exists()


def test_incomplete_and_misshaped_weights_are_refused(tokenizer, tmp_path):
    directory = build(tokenizer).save(tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    partial = {k: v for k, v in weights.items() if "layer.1.output.dense.bias" not in k}
    save_file(partial, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack encoder\.layer\.1\.output\.dense\.bias"):
        SentenceEncoder.from_directory(directory)
    weights["embeddings.LayerNorm.bias"] = torch.zeros(7)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not load"):
        SentenceEncoder.from_directory(directory)


def test_cls_pooler_is_not_invented_for_a_checkpoint_without_one(tokenizer, tmp_path):
    directory = build(tokenizer).save(tmp_path / "model")
    with pytest.raises(UserError, match="no MLP pooler"):
        SentenceEncoder.from_directory(directory, "cls")


def test_save_refuses_to_overwrite_and_leaves_the_old_directory_on_failure(tokenizer, tmp_path):
    encoder = build(tokenizer)
    directory = encoder.save(tmp_path / "model", scores={"STS-B": 71.5})
    assert "| STS-B | 71.50 |" in (directory / "README.md").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        encoder.save(directory)
    before = (directory / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(encoder.parameters())[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        encoder.save(directory, overwrite=True)
    assert (directory / "model.safetensors").read_bytes() == before
    with torch.no_grad():
        next(encoder.parameters())[0, 0] = 1.0
    encoder.save(directory, overwrite=True)
    assert (directory / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "vocab.txt"]


def test_a_replacement_that_was_killed_half_way_is_undone(tokenizer, tmp_path):
    directory = build(tokenizer).save(tmp_path / "model")
    weights = (directory / "model.safetensors").read_bytes()
    (tmp_path / ".model.new-1").mkdir()
    directory.rename(tmp_path / ".model.old-1")  # killed between the two renames
    with pytest.raises(UserError, match="--overwrite"):
        build(tokenizer).save(directory)
    assert (directory / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "vocab.txt"]


def test_save_takes_consolidated_weights_and_checks_them(tokenizer, tmp_path):
    encoder, other = build(tokenizer), build(tokenizer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    state = {name: value.to(torch.bfloat16) for name, value in other.state_dict().items()}
    directory = encoder.save(tmp_path / "model", state_dict=state)
    stored = load_file(directory / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    name = "embeddings.LayerNorm.weight"
    assert torch.equal(stored[name], state[f"backbone.{name}"].float())
    for broken, message in (
        ({k: v for k, v in state.items() if name not in k}, "lack embeddings"),
        (state | {f"backbone.{name}": torch.zeros(0)}, r"shape \(0,\), the model needs \(16,\)"),
    ):
        with pytest.raises(UserError, match=message):
            encoder.save(tmp_path / "other", state_dict=broken)
    assert not (tmp_path / "other").exists()


def test_package_directory_and_missing_names():
    with pytest.raises(UserError, match="'no_such_package' is not installed"):
        SentenceEncoder.from_directory("package:no_such_package/model")
    with pytest.raises(UserError, match="has no directory 'model'"):
        SentenceEncoder.from_directory("package:json")
    with pytest.raises(UserError, match=r"no model directory \./nowhere"):
        SentenceEncoder.from_directory("./nowhere")


def test_tokenizer_from_a_vocabulary_file_lower_cases_when_the_vocabulary_does(tokenizer, tmp_path):
    assert tokenizer.tokenize("The DOG") == ["the", "dog"]
    assert unknown_share(tokenizer, ["the dog", "\u0416"]) == pytest.approx(1 / 3)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "vocab.txt", bare)
    assert load_tokenizer(bare).get_vocab() == tokenizer.get_vocab()


def test_empty_vocabulary_is_noticed(tmp_path):
    # In transformers 5 this argument builds a tokenizer of five special tokens, without an error.
    empty = BertTokenizer(vocab_file=str(write_vocab(tmp_path / "vocab.txt")))
    assert len(empty) < 10
    empty.save_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no words"):
        load_tokenizer(tmp_path / "empty")


def test_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = tiny("roberta") | {"pad_token_id": 1}
    with pytest.raises(UserError, match="padding id is 1, the tokenizer's 0"):
        SentenceEncoder.from_config(config, tokenizer, "mean")
    directory = build(tokenizer).save(tmp_path / "model")
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300)]
    big = tmp_path / "big.txt"
    big.write_text((tmp_path / "vocab.txt").read_text() + "\n".join(words) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    shutil.copy(big, directory / "vocab.txt")
    with pytest.raises(UserError, match="tokens, the model only"):
        SentenceEncoder.from_directory(directory)
