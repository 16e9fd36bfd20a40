"""Exported directories, read by the tools they are written for, and the commands around them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from export_models import build, make_run
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from dalr_scale.cli import main as cli
from dalr_scale.commands.export import export
from dalr_scale.errors import UserError
from dalr_scale.models.encoder import SentenceEncoder, encode_sentences, pool

SENTENCES = [
    "a dog runs",
    "The red cat sleeps on the beach, quite loudly!",
    "man",
    "",
    "a dog " * 60,  # longer than the model: every tool must cut at the same place
]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooler", ["mean", "cls_before_pooler", "cls"])
def test_three_loaders_give_the_same_embeddings(kind, pooler, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = build(tmp_path, kind, pooler)
    directory = export(encoder.save(tmp_path / "model"), tmp_path / "out")
    ours = encode_sentences(SentenceEncoder.from_directory(directory), SENTENCES)

    model, tokenizer = (
        AutoModel.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    batch = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        plain = pool(hidden, batch["attention_mask"], pooler, model)

    other = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    theirs = torch.from_numpy(other.encode(SENTENCES))
    for found in (plain, theirs, encode_sentences(encoder, SENTENCES)):
        torch.testing.assert_close(found, ours, atol=1e-6, rtol=0)
    # Negative control: the comparison notices another pooling.
    wrong = hidden[:, 0] if pooler == "mean" else hidden[:, 1]
    assert (wrong - ours).abs().max() > 1e-2


def test_export_takes_the_best_encoder_of_a_run(tmp_path):
    run = make_run(tmp_path)
    assert cli(["export", str(run), "--output", str(tmp_path / "best")]) == 0
    assert cli(["export", str(run), "--output", str(tmp_path / "last"), "--which", "final"]) == 0
    for name, source in (("best", "best"), ("last", "final")):
        copied = load_file(tmp_path / name / "model.safetensors")
        original = load_file(run / source / "model.safetensors")
        assert copied.keys() == original.keys()
        assert all(torch.equal(copied[key], original[key]) for key in copied)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "| STS-B-dev | 61.25 |" in card and "Pooling: `mean`" in card
    assert "Base: bert, from scratch" in card


def test_scores_of_a_finished_run_reach_the_card(tmp_path):
    run = make_run(tmp_path)
    (run / "result.json").write_text(json.dumps({"unit": "x 100", "trained": {"STS-B": 58.12}}))
    export(run, tmp_path / "out")
    assert "| STS-B | 58.12 |" in (tmp_path / "out" / "README.md").read_text()


def test_export_does_not_overwrite_unasked(tmp_path, capsys):
    run = make_run(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    assert cli(["export", str(run), "--output", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (target / "precious").exists()
    assert cli(["export", str(run), "--output", str(target), "--overwrite"]) == 0
    assert not (target / "precious").exists() and (target / "config.json").exists()


def test_damaged_weights_are_not_exported(tmp_path, capsys):
    run = make_run(tmp_path)
    path = run / "best" / "model.safetensors"
    weights = load_file(path)
    weights["embeddings.LayerNorm.bias"][3] = torch.inf
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"embeddings\.LayerNorm\.bias holds values that are not"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_an_encoder_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    with pytest.raises(UserError, match="has no finished encoder"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="has no final encoder"):
        export(run, tmp_path / "out", which="final")


def test_commands_print_help_and_run_as_modules(capsys):
    for name in ("evaluate", "export", "features"):
        with pytest.raises(SystemExit, match="0"):
            cli([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: dalr-scale {name}")
    words = [sys.executable, "-m", "dalr_scale", "features", "none.tar", "--name", "x"]
    shown = subprocess.run(
        [*words, "--from-npz", "none.npz"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert shown.returncode == 2 and shown.stderr.startswith("error: ")
    assert "none.tar" in shown.stderr and "Traceback" not in shown.stderr
