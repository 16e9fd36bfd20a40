"""``dalr-scale tokens``: token ids beside the shards, so that training need not tokenise.

A training run finds the ids by the hash of its tokenizer and uses them when all of its shards have
them; the batches are the same with and without. Shards that have their ids are skipped, and under a
launcher each rank takes its share of the shards.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.token_id_store import open_token_ids, write_token_ids
from dalr_scale.data.stream.source import Source
from dalr_scale.distributed.world import refuse_single_process
from dalr_scale.errors import UserError
from dalr_scale.models.tokenizer import load_tokenizer
from dalr_scale.teachers.models import tokenizer_hash


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0. Under a launcher this rank does its share of the shards."""
    parser = argparse.ArgumentParser(
        prog="dalr-scale tokens",
        description="Store the token ids of every caption and sentence beside the shards.",
    )
    parser.add_argument("shards", nargs="+", help="shard files, directories, globs or brace ranges")
    parser.add_argument(
        "--tokenizer", required=True, help="the student's tokenizer: a directory or a vocab.txt"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    refuse_single_process("dalr_scale tokens")
    shards = expand_shards(args.shards)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    written = _store(shards[rank::world], args.tokenizer, rank > 0 or args.quiet)
    print(f"{written} token shards written, {len(shards[rank::world]) - written} were there")
    return 0


def _store(shards: Sequence[Path], tokenizer_path: str, quiet: bool) -> int:
    # Off by default after a fork only; this process does nothing else meanwhile.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer(tokenizer_path)
    sha256 = tokenizer_hash(tokenizer)
    written = 0
    for shard in tqdm(shards, desc="shards", unit="", disable=quiet or None):
        if not _is_there(shard, sha256):
            source = Source([shard])
            sentences = source.read(np.arange(source.num_items)).sentences
            write_token_ids(shard, sentences, tokenizer, sha256)
            written += 1
    return written


def _is_there(shard: Path, sha256: str) -> bool:
    """Whether sound ids of this state of the shard are there; others are created again."""
    try:
        return open_token_ids(shard, sha256) is not None
    except UserError:
        return False
