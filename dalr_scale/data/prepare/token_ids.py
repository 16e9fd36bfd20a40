"""Token ids of prepared shards, stored next to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from dalr_scale.data.shards.token_id_store import open_token_ids, write_token_ids
from dalr_scale.data.stream.source import Source
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def store_token_ids(
    shards: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_sha256: str,
    *,
    progress: bool = True,
) -> int:
    """Write the token ids of every shard that lacks valid ones; return how many were written.

    Args:
        shards: the shards.
        tokenizer: a fast tokenizer.
        tokenizer_sha256: its hash (``models.tokenizer.tokenizer_hash``).
        progress: show a progress bar on a terminal.

    Raises:
        UserError: a shard is damaged, or the tokenizer's rows are not prefix + ids + suffix.
    """
    written = 0
    for shard in tqdm(shards, desc="shards", unit="", disable=None if progress else True):
        if not _has_valid_ids(shard, tokenizer_sha256):
            source = Source([shard])
            sentences = source.read(np.arange(source.num_items)).sentences
            write_token_ids(shard, sentences, tokenizer, tokenizer_sha256)
            written += 1
    return written


def _has_valid_ids(shard: Path, tokenizer_sha256: str) -> bool:
    """Whether intact ids of this state of the shard exist; others are written again."""
    try:
        return open_token_ids(shard, tokenizer_sha256) is not None
    except UserError:
        return False
