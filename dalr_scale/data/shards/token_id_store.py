"""Stored token ids: packed records next to each shard, so that training need not tokenize.

``X.ids-HASH.tokens.tar`` belongs to ``X.tar`` and to one tokenizer, whose hash it carries:

    00000000.manifest.json  tokenizer, special tokens, and which state of the shard
    00000000.values.npy     uint16 (uint32 for vocabularies beyond 65,536), the ids of all items
    00000000.offsets.npy    int64 [items + 1]
    00000000.sums.npy       uint32 [items], the checksum of each row

Ids are stored without special tokens and before any truncation, so that one set serves every
``max_length``: a row is PREFIX + its first ids + SUFFIX, as the tokenizer returns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

import numpy as np

from dalr_scale.data.shards.arrays import FileArray, RaggedRows, gather_rows, places, row_sums
from dalr_scale.data.shards.files import TOKENS_SUFFIX, companion
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.packed import (
    CRC,
    OFFSET,
    PackedTar,
    digest,
    write_packed,
)
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from dalr_scale.data.shards.index_file import IndexHeader

SCHEMA = 1
STORED_TOKENS = 512  # ids kept of one item; longer ones are cut by every loader anyway

TOKEN_ID_ARRAYS = frozenset(("values", "offsets", "sums"))
_REMEDY = "remove it and run dalr-scale tokens again"
_PROBES = 256
_BLOCK = 4096
_SHORT, _LONG = np.dtype("<u2"), np.dtype("<u4")


def token_ids_path(shard: Path, tokenizer_sha256: str) -> Path:
    """Return the path of a shard's token ids for a tokenizer."""
    return Path(companion(shard, token_ids_ending(tokenizer_sha256)))


def token_ids_ending(tokenizer_sha256: str) -> str:
    """Return what replaces ``.tar`` in the name of a shard's stored ids."""
    return f".ids-{tokenizer_sha256[:12]}{TOKENS_SUFFIX}"


@dataclass(frozen=True)
class Encoding:
    """The token ids that a loader requests.

    Attributes:
        tokenizer_sha256: the tokenizer (``models.tokenizer.tokenizer_hash``).
        max_length: tokens kept of a sentence, special tokens included.
        pad_id: padding id.
    """

    tokenizer_sha256: str
    max_length: int
    pad_id: int


class SpecialTokens(NamedTuple):
    """Ids of the special tokens before and after every sentence."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


NO_SPECIAL_TOKENS = SpecialTokens((), ())


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
class TokenIdTable:
    """The stored ids of one shard, read from their file row by row.

    Attributes:
        path: the tar.
        special: special tokens around every sentence.
        values: uint16 or uint32 [ids].
        offsets: int64 [items + 1].
        sums: CRC-32 of each row, uint32 [items].
    """

    path: Path
    special: SpecialTokens
    values: FileArray
    offsets: FileArray
    sums: FileArray

    def read(self, rows: np.ndarray, max_length: int) -> FoundIds:
        """Return the ids of some items, cut so that they fit with their special tokens.

        Raises:
            TruncatedFile: the file has become shorter.
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
        free = max_length - sum(map(len, self.special))
        kept = np.minimum(lengths, free)
        if len(kept) and int(lengths.max()) > free:
            values = gather_rows(values, np.cumsum(lengths) - lengths, kept)
        return FoundIds(values, kept, faults)


def pad_ids(
    parts: Sequence[RaggedRows], count: int, special: SpecialTokens, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay rows of ids out as a matrix, padded on the right to the longest row.

    Args:
        parts: ids of the rows of the batch, without special tokens.
        count: rows of the batch, n.
        special: special tokens around every row.
        pad_id: padding id.

    Returns:
        Ids and mask, int64 [n, L].
    """
    prefix, suffix = special
    extra = len(prefix) + len(suffix)
    longest = max((int(part.lengths.max()) for part in parts if len(part.lengths)), default=0)
    ids = np.full((count, max(1, longest + extra)), pad_id, np.int64)
    lengths_of_rows = np.zeros(count, np.int64)
    for rows, values, lengths in parts:
        ids[np.repeat(rows, lengths), places(lengths) + len(prefix)] = values
        lengths_of_rows[rows] = lengths
    ids[:, : len(prefix)] = prefix
    for number, token in enumerate(suffix):
        ids[np.arange(count), lengths_of_rows + len(prefix) + number] = token
    mask = (np.arange(ids.shape[1]) < (lengths_of_rows + extra)[:, None]).astype(np.int64)
    return ids, mask


def write_token_ids(
    shard: Path,
    sentences: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_sha256: str,
) -> Path:
    """Tokenize the items of a shard and write their ids next to it.

    Args:
        shard: the shard; its index is built when missing.
        sentences: its items in order.
        tokenizer: a fast tokenizer that truncates on the right.
        tokenizer_sha256: its hash.

    Raises:
        UserError: the tokenizer's rows are not prefix + ids + suffix.
    """
    header = ensure_index(shard).header
    special = _special_tokens(tokenizer, sentences)
    values, offsets = _all_ids(tokenizer, sentences)
    if not len(values):
        raise UserError(f"{shard}: no sentence has a token; is this the right tokenizer?")
    manifest = {
        "schema": SCHEMA,
        "tokenizer_sha256": tokenizer_sha256,
        "prefix": special.prefix,
        "suffix": special.suffix,
        "rows": len(sentences),
        "stored_tokens": STORED_TOKENS,
        "shard_sha256": header.sha256,
        "values_sha256": digest([values, offsets]),
    }
    path = token_ids_path(shard, tokenizer_sha256)
    arrays = {"values": values, "offsets": offsets, "sums": row_sums(values, np.diff(offsets))}
    write_packed(path, manifest, arrays)
    return path


def _all_ids(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all sentences, one after the other, and offsets int64 [sentences + 1]."""
    dtype: np.dtype = _SHORT if len(tokenizer) <= 1 << 16 else _LONG
    blocks: list[np.ndarray] = [np.empty(0, dtype)]
    lengths: list[int] = []
    for start in range(0, len(sentences), _BLOCK):
        part = list(sentences[start : start + _BLOCK])
        rows = [row[:STORED_TOKENS] for row in _encode(tokenizer, part, add_special_tokens=False)]
        lengths += map(len, rows)
        blocks.append(np.array([token for row in rows for token in row], dtype))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(OFFSET)
    return np.concatenate(blocks), offsets


def open_token_ids(
    shard: Path, tokenizer_sha256: str, header: IndexHeader | None = None
) -> TokenIdTable | None:
    """Open the ids of a shard for a tokenizer; None when there are none.

    Raises:
        UserError: they are malformed, or belong to another state of the shard.
    """
    path = token_ids_path(shard, tokenizer_sha256)
    if not path.exists():
        return None
    packed = PackedTar(path, TOKEN_ID_ARRAYS, _REMEDY)
    header = header or ensure_index(shard).header
    special = _checked_manifest(packed, tokenizer_sha256, shard, header)
    dtype = _LONG if packed.itemsize("values") == _LONG.itemsize else _SHORT
    values = packed.array("values", dtype, 1)
    offsets, sums = packed.array("offsets", OFFSET, 1), packed.array("sums", CRC, 1)
    starts = offsets.whole()
    rising = bool(np.all(np.diff(starts) >= 0)) and starts[0] == 0
    if not rising or starts[-1] != len(values):
        raise packed.malformed("has offsets that do not rise from 0 to the number of ids")
    if len(offsets) != header.items + 1 or len(sums) != header.items:
        raise packed.malformed(f"has {len(offsets) - 1} rows for {header.items} items")
    return TokenIdTable(path, special, values, offsets, sums)


def _checked_manifest(
    packed: PackedTar, tokenizer_sha256: str, shard: Path, header: IndexHeader
) -> SpecialTokens:
    manifest = packed.manifest
    if manifest.get("schema") != SCHEMA or manifest.get("tokenizer_sha256") != tokenizer_sha256:
        raise packed.malformed("is of another version or tokenizer")
    if manifest.get("shard_sha256") != header.sha256:
        raise packed.malformed(f"belongs to another state of {shard.name}")
    prefix, suffix = manifest.get("prefix"), manifest.get("suffix")
    if not (_is_ids(prefix) and _is_ids(suffix)):
        raise packed.malformed("has a manifest without special tokens")
    return SpecialTokens(tuple(prefix), tuple(suffix))


def verify_token_ids(table: TokenIdTable) -> None:
    """Compare every row with its checksum.

    Raises:
        UserError: a row has changed.
    """
    for start in range(0, len(table.sums), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(table.sums)))
        faults = table.read(rows, STORED_TOKENS).faults
        if faults:
            raise UserError(next(iter(faults.values())))


def _special_tokens(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> SpecialTokens:
    """Find the special tokens around a sentence, and check that they are always the same.

    Raises:
        UserError: they differ between sentences or with the length.
    """
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
        if all(
            row == prefix + ids[: limit - extra] + suffix
            for limit in (8, STORED_TOKENS)
            for row, ids in zip(
                _encode(tokenizer, probes, truncation=True, max_length=limit), bare, strict=True
            )
        ):
            return SpecialTokens(tuple(prefix), tuple(suffix))
    raise UserError(
        "this tokenizer does not put the same special tokens around every sentence; leave its "
        "ids to training, which tokenizes while it reads"
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    add_special_tokens: bool = True,
    truncation: bool = False,
    max_length: int | None = None,
) -> list[list[int]]:
    encoded = tokenizer(
        list(sentences),
        add_special_tokens=add_special_tokens,
        truncation=truncation,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return cast("list[list[int]]", encoded["input_ids"])


def _is_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and v >= 0 for v in value)
