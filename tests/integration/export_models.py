"""Tiny encoders and run directories for the tests of exported models."""

from pathlib import Path

import torch

from dalr_scale.models.encoder import SentenceEncoder, load_tokenizer

POSITIONS = 30


def build(directory: Path, kind="bert", pooler="mean", tokenizer=None) -> SentenceEncoder:
    if tokenizer is None:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "!"]
        letters = [piece for c in "abcdefghijklmnopqrstuvwxyz" for piece in (c, f"##{c}")]
        vocab = directory / "vocab.txt"
        vocab.write_text("\n".join([*special, *letters, "dog", "the", "cat"]) + "\n")
        tokenizer = load_tokenizer(vocab)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": kind, "intermediate_size": 64, "max_position_embeddings": POSITIONS}
    torch.manual_seed(0)
    return SentenceEncoder.from_config(config | sizes, tokenizer, pooler).eval()


def make_run(directory: Path) -> Path:
    """A run directory with a best and a final encoder."""
    run = directory / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    encoder = build(directory)
    encoder.save(run / "best", scores={"STS-B-dev": 61.25})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)
    encoder.save(run / "final")
    return run
