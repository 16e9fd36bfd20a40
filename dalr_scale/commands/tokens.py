"""``dalr-scale tokens``: token ids next to the shards, so that training need not tokenize.

A training run finds the ids by the hash of its tokenizer and uses them when all of its shards have
them; the batches are the same with and without. Shards that have their ids are skipped, and under a
launcher each rank takes its share of the shards.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from dalr_scale.data.prepare.token_ids import store_token_ids
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.distributed.world import refuse_single_process
from dalr_scale.models.tokenizer import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0. Under a launcher this rank processes its share of the shards."""
    args = _parser().parse_args(argv)
    refuse_single_process("dalr_scale tokens")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    shards = expand_shards(args.shards)[rank::world_size]
    # Off by default after a fork only; this process does nothing else meanwhile.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer(args.tokenizer)
    progress = rank == 0 and not args.quiet
    written = store_token_ids(shards, tokenizer, tokenizer_hash(tokenizer), progress=progress)
    print(f"{written} token shards written, {len(shards) - written} were there")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale tokens",
        description="Store the token ids of every caption and sentence next to the shards.",
    )
    parser.add_argument("shards", nargs="+", help="shard files, directories, globs or brace ranges")
    parser.add_argument(
        "--tokenizer", required=True, help="the student's tokenizer: a directory or a vocab.txt"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
