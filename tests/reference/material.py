"""Shards with several teachers, and small pretrained encoders, for runs against the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import (
    CAPTIONS,
    IMAGE_WIDTH,
    IMAGES,
    ORIGIN,
    SENTENCES,
    TEXT_WIDTH,
    WORDS,
    write_tiny_data,
)
from transformers import AutoConfig, AutoModel

from dalr_scale.data.shards.features_store import write_features
from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.models.tokenizer import load_tokenizer, tokenizer_hash

MORE = 90  # sentences of the second text source
WIDTH = 16  # of every student, and of the teacher features "same"
SIZES = {
    "bert": {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 40},
    "roberta": {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 24, "max_position_embeddings": 44, "type_vocab_size": 1},
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
                   "max_position_embeddings": 40},
}  # fmt: skip


def write_material(directory: Path) -> Path:
    """The tiny data of the other tests, with more features and with encoder directories.

    Further feature sets: ``t1`` (12 wide) and ``same`` (16 wide) per caption, ``tok2`` (16 wide)
    per token, ``wide`` (16) and ``near`` (20) per image; ``t0``, ``t1`` and ``same`` per sentence
    of the text shards too, of which there is a second set, ``more``. Encoders: ``bert``,
    ``roberta`` and ``distilbert`` in directory/encoders.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_tiny_data(directory)
    rng = np.random.default_rng(1)
    tokenizer = load_tokenizer(directory / "vocab.txt")
    origin = ORIGIN | {"tokenizer_sha256": tokenizer_hash(tokenizer)}

    def write(shard: Path, name: str, level: str, rows: int, width: int) -> None:
        values = rng.normal(size=(rows, width)).astype(np.float16)
        write_features(shard, name, values, level=level, manifest_extra=origin)

    pairs = [directory / f"train-{number:06d}.tar" for number in (0, 1)]
    images = IMAGES // len(pairs)
    for shard in pairs:
        for name, width in (("t1", TEXT_WIDTH), ("same", WIDTH)):
            write(shard, name, "item", images * CAPTIONS, width)
        write(shard, "wide", "sample", images, WIDTH)
        write(shard, "near", "sample", images, IMAGE_WIDTH)
        offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 8, images * CAPTIONS))])
        values = rng.normal(size=(int(offsets[-1]), WIDTH)).astype(np.float16)
        write_features(
            shard, "tok2", values, level="token", manifest_extra=origin,
            offsets=offsets.astype(np.int64),
        )  # fmt: skip
    sentences = [" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(MORE)]
    write_text_shards(sentences, directory, "more", per_member=64)
    for prefix, rows in (("text", SENTENCES), ("more", MORE)):
        shard = directory / f"{prefix}-000000.tar"
        for name, width in (("t0", TEXT_WIDTH), ("t1", TEXT_WIDTH), ("same", WIDTH)):
            write(shard, name, "item", rows, width)
    for kind in SIZES:
        write_encoder(directory / "encoders" / kind, kind, tokenizer)
    return directory


def write_encoder(directory: Path, kind: str, tokenizer: object) -> None:
    """An encoder as ``save_pretrained`` leaves it, with weights large enough to tell rows apart."""
    torch.manual_seed(5)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), initializer_range=0.2, **ids, **SIZES[kind]
    )  # type: ignore[arg-type]
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)  # type: ignore[attr-defined]
