"""Token ids made once: packed records beside each shard, so that training need not tokenise.

``X.ids-HASH.tokens.tar`` belongs to ``X.tar`` and to one tokenizer, whose hash it carries:

    00000000.manifest.json  tokenizer, special tokens, and which state of the shard
    00000000.values.npy     uint16 (uint32 for vocabularies beyond 65,536), the ids of all items
    00000000.offsets.npy    int64 [items + 1]
    00000000.sums.npy       uint32 [items], the checksum of each row

Ids are stored without special tokens and before any truncation, so that one set serves every
``max_length``: a row is PREFIX + its first ids + SUFFIX, which is what the tokenizer gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalr_scale.data.shards.arrays import FileArray, gather_rows, places, row_sums
from dalr_scale.data.shards.index import ensure_index
from dalr_scale.data.shards.index_file import IndexHeader
from dalr_scale.data.shards.packed import (
    CRC,
    OFFSET,
    PackedTar,
    digest,
    write_packed,
)
from dalr_scale.data.shards.files import TOKENS_SUFFIX, companions
from dalr_scale.errors import UserError

SCHEMA = 1
STORED_TOKENS = 512  # ids kept of one item; longer ones are cut by every loader anyway

TOKEN_ARRAYS = frozenset(("values", "offsets", "sums"))
_REMEDY = "remove it and run dalr-scale tokens again"
_PROBES = 256
_BLOCK = 4096
_SHORT, _LONG = np.dtype("<u2"), np.dtype("<u4")


def tokens_path(shard: Path, tokenizer_sha256: str) -> Path:
    """Return where the ids of a shard lie for a tokenizer."""
    return Path(companions(shard, tokens_ending(tokenizer_sha256)))


def tokens_ending(tokenizer_sha256: str) -> str:
    """Return what replaces ``.tar`` in the name of a shard's stored ids."""
    return f".ids-{tokenizer_sha256[:12]}{TOKENS_SUFFIX}"


@dataclass(frozen=True)
class Encoding:
    """How a loader wants its ids.

    Attributes:
        tokenizer_sha256: the tokenizer (``models.teachers.tokenizer_hash``).
        max_length: tokens kept of a sentence, special tokens included.
        pad_id: what fills shorter rows.
    """

    tokenizer_sha256: str
    max_length: int
    pad_id: int


class FoundIds(NamedTuple):
    """Token ids of some items.

    Attributes:
        values: uint16 or uint32, the ids of one item after the other.
        lengths: int64 [items], the ids of each item.
        faults: position -> what is wrong with that item; its ids must not be used.
    """

    values: np.ndarray
    lengths: np.ndarray
    faults: dict[int, str]


@dataclass(frozen=True)
class TokenTable:
    """The stored ids of one shard, read from their file row by row.

    Attributes:
        path: the tar.
        prefix, suffix: ids of the special tokens before and after a sentence.
        values: uint16 or uint32 [ids].
        offsets: int64 [items + 1].
        sums: CRC-32 of each row, uint32 [items].
    """

    path: Path
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    values: FileArray
    offsets: FileArray
    sums: FileArray

    def read(self, rows: np.ndarray, max_length: int) -> FoundIds:
        """Return the ids of some items, cut so that they fit with their special tokens.

        Raises:
            CutOff: the file has become shorter.
            OSError: the storage fails.
        """
        starts, ends = np.split(self.offsets.rows(np.concatenate([rows, rows + 1])), 2)
        lengths = ends - starts
        values = self.values.spans(starts, lengths)
        changed = np.flatnonzero(row_sums(values, lengths) != self.sums.rows(rows))
        faults = {
            n: f"{self.path}: the ids of item {rows[n]} have changed; {_REMEDY}"
            for n in changed.tolist()
        }
        free = max_length - len(self.prefix) - len(self.suffix)
        kept = np.minimum(lengths, free)
        if len(kept) and int(lengths.max()) > free:
            values = gather_rows(values, np.cumsum(lengths) - lengths, kept)
        return FoundIds(values, kept, faults)


def pad_rows(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    count: int,
    special: tuple[tuple[int, ...], tuple[int, ...]],
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Lay rows of ids out as a matrix, padded on the right to the longest.

    Args:
        parts: (positions of the rows in the batch, ids one row after the other, ids of each row).
        count: rows of the batch, n.
        special: prefix and suffix of every row.
        pad_id: what fills shorter rows.

    Returns:
        Ids and mask, int64 [n, L].
    """
    prefix, suffix = special
    extra = len(prefix) + len(suffix)
    longest = max((int(lengths.max()) for _, _, lengths in parts if len(lengths)), default=0)
    ids = np.full((count, max(1, longest + extra)), pad_id, np.int64)
    kept = np.zeros(count, np.int64)
    for where, values, lengths in parts:
        ids[np.repeat(where, lengths), places(lengths) + len(prefix)] = values
        kept[where] = lengths
    ids[:, : len(prefix)] = prefix
    for number, token in enumerate(suffix):
        ids[np.arange(count), kept + len(prefix) + number] = token
    mask = (np.arange(ids.shape[1]) < (kept + extra)[:, None]).astype(np.int64)
    return ids, mask


def write_tokens(
    shard: Path, sentences: Sequence[str], tokenizer: Any, tokenizer_sha256: str
) -> Path:
    """Tokenise the items of a shard and write their ids beside it.

    Args:
        shard: the shard; its index is built when missing.
        sentences: its items in order.
        tokenizer: a fast tokenizer that truncates on the right.
        tokenizer_sha256: its hash.

    Raises:
        UserError: the tokenizer's rows are not prefix + ids + suffix.
    """
    header = ensure_index(shard).header
    prefix, suffix = _special_tokens(tokenizer, sentences)
    dtype: np.dtype = _SHORT if len(tokenizer) <= 1 << 16 else _LONG
    blocks: list[np.ndarray] = [np.empty(0, dtype)]
    lengths: list[int] = []
    for start in range(0, len(sentences), _BLOCK):
        part = list(sentences[start : start + _BLOCK])
        rows = [row[:STORED_TOKENS] for row in _encode(tokenizer, part, add_special_tokens=False)]
        lengths += map(len, rows)
        blocks.append(np.array([token for row in rows for token in row], dtype))
    values = np.concatenate(blocks)
    if not len(values):
        raise UserError(f"{shard}: no sentence has a token; is this the right tokenizer?")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(OFFSET)
    manifest = {
        "schema": SCHEMA,
        "tokenizer_sha256": tokenizer_sha256,
        "prefix": prefix,
        "suffix": suffix,
        "rows": len(lengths),
        "stored_tokens": STORED_TOKENS,
        "shard_sha256": header.sha256,
        "values_sha256": digest([values, offsets]),
    }
    path = tokens_path(shard, tokenizer_sha256)
    arrays = {"values": values, "offsets": offsets, "sums": row_sums(values, np.diff(offsets))}
    write_packed(path, manifest, arrays)
    return path


def open_tokens(
    shard: Path, tokenizer_sha256: str, header: IndexHeader | None = None
) -> TokenTable | None:
    """Open the ids of a shard for a tokenizer; None when there are none.

    Raises:
        UserError: they are malformed, or made from another state of the shard.
    """
    path = tokens_path(shard, tokenizer_sha256)
    if not path.exists():
        return None
    packed = PackedTar(path, TOKEN_ARRAYS, _REMEDY)
    manifest = packed.manifest
    header = header or ensure_index(shard).header
    if manifest.get("schema") != SCHEMA or manifest.get("tokenizer_sha256") != tokenizer_sha256:
        raise packed.malformed("is of another version or tokenizer")
    if manifest.get("shard_sha256") != header.sha256:
        raise packed.malformed(f"was made from another state of {shard.name}")
    special = manifest.get("prefix"), manifest.get("suffix")
    if not all(map(_is_ids, special)):
        raise packed.malformed("has a manifest without special tokens")
    prefix, suffix = (tuple(part or ()) for part in special)
    dtype = _LONG if packed.itemsize("values") == _LONG.itemsize else _SHORT
    values = packed.array("values", dtype, 1)
    offsets, sums = packed.array("offsets", OFFSET, 1), packed.array("sums", CRC, 1)
    starts = offsets.whole()
    rising = bool(np.all(np.diff(starts) >= 0)) and starts[0] == 0
    if not rising or starts[-1] != len(values):
        raise packed.malformed("has offsets that do not rise from 0 to the number of ids")
    if len(offsets) != header.items + 1 or len(sums) != header.items:
        raise packed.malformed(f"has {len(offsets) - 1} rows for {header.items} items")
    return TokenTable(path, prefix, suffix, values, offsets, sums)


def verify_tokens(table: TokenTable) -> None:
    """Compare every row with its checksum.

    Raises:
        UserError: a row has changed.
    """
    for start in range(0, len(table.sums), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(table.sums)))
        faults = table.read(rows, STORED_TOKENS).faults
        if faults:
            raise UserError(next(iter(faults.values())))


def _special_tokens(tokenizer: Any, sentences: Sequence[str]) -> tuple[list[int], list[int]]:
    """Find what the tokenizer puts around a sentence, and check that it always does."""
    probes = ["a", *sentences[:_PROBES]]
    bare = _encode(tokenizer, probes, add_special_tokens=False)
    whole = _encode(tokenizer, probes)
    first = next((n for n, row in enumerate(bare) if row), None)
    if first is None:
        raise UserError("the tokenizer finds no token in any sentence; it did not load")
    extra = len(whole[first]) - len(bare[first])
    splits = (n for n in range(extra + 1) if whole[first][n : n + len(bare[first])] == bare[first])
    start = next(splits, None)
    if start is not None:
        prefix, suffix = whole[first][:start], whole[first][start + len(bare[first]) :]
        for limit in (8, STORED_TOKENS):
            cut = _encode(tokenizer, probes, truncation=True, max_length=limit)
            free = limit - extra
            if all(w == prefix + b[:free] + suffix for w, b in zip(cut, bare, strict=True)):
                continue
            break
        else:
            return prefix, suffix
    raise UserError(
        "this tokenizer does not put the same special tokens around every sentence; leave its "
        "ids to training, which tokenises as it reads"
    )


def _encode(tokenizer: Any, sentences: Sequence[str], **options: Any) -> list[list[int]]:
    options = {"truncation": False} | options
    encoded = tokenizer(
        list(sentences), return_attention_mask=False, return_token_type_ids=False, **options
    )
    return encoded["input_ids"]


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and v >= 0 for v in value)
