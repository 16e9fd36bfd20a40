"""Tiny runs for the tests: data, configuration and a look at what a run left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalr_scale.config import Config, build_config
from dalr_scale.config.text import to_toml
from dalr_scale.data.shards.features_store import write_features
from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards

WORDS = ["".join(chr(97 + int(digit)) for digit in str(number + 100)) for number in range(120)]
IMAGES, CAPTIONS, SENTENCES = 72, 2, 170  # with B = 24: 6 paired and 7 text batches a pass
IMAGE_WIDTH, TEXT_WIDTH = 20, 12
ORIGIN = {
    "model": "tiny",
    "revision": "1",
    "pooling": "none",
    "normalized": False,
    "tokenizer_sha256": None,
}


def write_tiny_data(directory: Path) -> Path:
    """Pair and text shards with stored features, a vocabulary and graded pairs.

    Feature sets: ``img`` (20 wide, per image), ``cap`` and ``t0`` (20 and 12, per caption) and
    ``tok`` (12, per token).
    """
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(3, 9)))

    write_text_shards([sentence() for _ in range(SENTENCES)], directory, "text", per_member=64)
    with ShardSetWriter(directory, "train", samples_per_shard=IMAGES // 2) as writer:
        for number in range(IMAGES):
            captions = "\n".join(sentence() for _ in range(CAPTIONS))
            writer.write(f"{number:05d}", {"txt": captions.encode(), "json": b"{}"})
    for shard in writer.shards:
        write_tiny_features(shard, rng, IMAGES // 2)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    pairs = [{"a": sentence(), "b": sentence(), "score": float(rng.random())} for _ in range(30)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (directory / "graded.jsonl").write_text(lines, encoding="utf-8")
    return directory


def write_tiny_features(shard: Path, rng: np.random.Generator, samples: int) -> None:
    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float16)

    items = samples * CAPTIONS
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 8, items))]).astype(np.int64)
    levels = (
        ("img", "sample", normal(samples, IMAGE_WIDTH), None),
        ("cap", "item", normal(items, IMAGE_WIDTH), None),
        ("t0", "item", normal(items, TEXT_WIDTH), None),
        ("tok", "token", normal(int(offsets[-1]), TEXT_WIDTH), offsets),
    )
    for name, level, values, starts in levels:
        write_features(
            shard, name, values, level=level, manifest_extra=ORIGIN, offsets=starts
        )  # fmt: skip


def tiny_layer(data: Path) -> dict[str, dict[str, Any]]:
    """A run of 12 steps over both streams with all seven terms, dropout on."""
    return {
        "run": {"name": "tiny", "seed": 3},
        "data": {
            "shards": str(data),
            "pairs": ["{shards}/train-*.tar"],
            "text": ["{shards}/text-*.tar"],
            "tokenizer": "{shards}/vocab.txt",
            "workers": 1,
        },
        "model": {
            "pooler": "mean",
            "grounding_width": 8,
            "consistency_width": 8,
            "architecture": {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "max_position_embeddings": 40,
            },
        },
        "teachers": {"image": "features:img", "text": ["features:t0"], "tokens": "features:tok"},
        "batch": {"global_size": 24},
        "optim": {"lr": 1e-3, "steps": 12},
        "engine": {"threads": 1, "timeout_minutes": 2.0},
        "eval": {"every": 4, "graded_dev": "{shards}/graded.jsonl"},
        "save": {"every_steps": 5},
        "log": {"every": 5, "tensorboard": False},
    }


def tiny_config(data: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """`tiny_layer` as a configuration; `changes` has dotted names: ``{"optim.steps": 3}``."""
    return build_config([tiny_layer(data), as_layer(changes or {})])


def as_layer(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"optim.steps": 3}`` as ``{"optim": {"steps": 3}}``."""
    layer: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, key = name.split(".", 1)
        layer.setdefault(section, {})[key] = value
    return layer


def write_config(config: Config, path: Path) -> Path:
    """The configuration as a file that ``--config`` reads."""
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in RUN/metrics.jsonl, in file order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of RUN/tensorboard as TensorBoard shows it: tag -> (step, value)s."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


RATES = ("samples_per_second", "data_share")  # what a run's clock decides


def reports(run: Path) -> tuple[list[dict[str, Any]], dict[str, list[tuple[int, float]]]]:
    """All that a run has reported except its rates: metrics.jsonl, and the curves."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k not in RATES} for line in lines]
    kept = {
        tag: points if tag.split("/")[-1] not in RATES else [(step, 0.0) for step, _ in points]
        for tag, points in curves(run).items()
    }
    return found, kept


def history(run: Path) -> list[tuple[int, str, str, str]]:
    """What must not depend on interruptions: step, stream, hash of the item ids, exact loss."""
    return [(r["step"], r["stream"], r["ids"], float.hex(r["loss"])) for r in records(run)]


def weights_hash(directory: Path) -> str:
    """SHA-256 of an exported encoder's weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def tree(directory: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
