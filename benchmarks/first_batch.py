"""Writes many small indexed shards, or times the way from their list to the first batch."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalr_scale.data.shards.features_store import write_features
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.token_id_store import Encoding, write_token_ids
from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.data.stream.loader import LoaderOptions, Sources, make_loader
from dalr_scale.data.stream.order import StreamPlan
from dalr_scale.data.stream.source import Source
from dalr_scale.models.tokenizer import load_tokenizer
from dalr_scale.teachers.models import tokenizer_hash

ROWS, WIDTH, BATCH = 100, 16, 256


def write(directory: Path, shards: int) -> None:
    """Shards of 100 sentences, each with its index, one feature set and its token ids."""
    if (directory / "done").exists():
        return
    sentences = (f"a w{n % 499} w{n % 7} w{n}" for n in range(shards * ROWS))
    paths = write_text_shards(
        sentences, directory, "text", per_member=ROWS, members_per_shard=1, overwrite=True
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *(f"w{n}" for n in range(500))]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_companions, paths, chunksize=100))
    (directory / "done").touch()


def _write_companions(path: Path) -> None:
    ensure_index(path)
    values = np.random.default_rng(0).normal(size=(ROWS, WIDTH))
    write_features(path, "clip", values, level="item", manifest_extra={})
    lines = Source([path]).read(np.arange(ROWS)).sentences
    tokenizer, sha256 = _tokenizer(path.parent)
    write_token_ids(path, lines, tokenizer, sha256)


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> tuple[Any, str]:
    tokenizer = load_tokenizer(directory / "vocab.txt")
    return tokenizer, tokenizer_hash(tokenizer)


def read(directory: Path) -> None:
    """Print the seconds of each part as JSON."""
    torch.set_num_threads(1)
    tokenizer, sha256 = _tokenizer(directory)
    started = time.perf_counter()
    paths = expand_shards([str(directory / "text-*.tar")])
    listed = time.perf_counter()
    source = Source(paths, features={"text0": "clip"})
    source.use_token_ids(Encoding(sha256, 32, tokenizer.pad_token_id))
    opened = time.perf_counter()
    plan = StreamPlan(seed=1, global_batch=BATCH, text_items=source.num_items)
    options = LoaderOptions(plan.n_text, max_length=32, num_workers=1, with_text=False)
    loader = make_loader(plan, Sources(source, None), tokenizer, options)
    batch = next(iter(loader))
    ended = time.perf_counter()
    assert batch.features["text0"].shape == (BATCH, WIDTH)
    times = {"list": listed - started, "open": opened - listed, "batch": ended - opened}
    times = {name: round(value, 3) for name, value in times.items()}
    print(json.dumps({"items": source.num_items, **times, "seconds": round(ended - started, 3)}))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        read(Path(sys.argv[2]))
