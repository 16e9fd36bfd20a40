"""Checks of shards, their indexes, feature sets and token ids, byte by byte."""

from __future__ import annotations

import glob
import os
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

from dalr_scale.data.shards.features_store import feature_names, open_features
from dalr_scale.data.shards.files import TOKENS_SUFFIX, open_regular, read_exactly
from dalr_scale.data.shards.index_file import (
    IndexFile,
    IndexHeader,
    ShardIndex,
    index_path,
    read_header,
)
from dalr_scale.data.shards.indexing import build_index
from dalr_scale.data.shards.packed import PackedTar
from dalr_scale.data.shards.token_id_store import (
    TOKEN_ID_ARRAYS,
    open_token_ids,
    verify_token_ids,
)
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_shard(shard: Path) -> list[str]:
    """Return a sentence for each fault of a shard, its index, feature sets and token ids.

    Nothing is written. Feature sets and token ids are compared with the indexed shard, so they are
    skipped where shard and index disagree.
    """
    if faults := check_index(shard):
        return faults
    header = read_header(index_path(shard))
    return [*_feature_faults(shard, header), *_token_id_faults(shard, header)]


def check_index(shard: Path) -> list[str]:
    """Compare a shard with its index, byte by byte, and return a sentence for each difference.

    A changed modification time alone is not a fault.
    """
    path = index_path(shard)
    if not path.is_file():
        return [f"{path}: missing; run dalr-scale index {shard}"]
    old = read_header(path)
    if old is None:
        return [f"{path}: damaged or of another version; run dalr-scale index {shard}"]
    try:
        arrays = IndexFile(shard, old).load()
        faults = [f"{shard}: {text}" for text in _crc_faults(arrays)]
        new, _ = build_index(shard, deep=old.deep)
    except UserError as error:
        return [str(error)]
    if replace(new, mtime_ns=0) != replace(old, mtime_ns=0) and not faults:
        faults.append(f"{shard}: differs from what was indexed; copy or index it again")
    return faults


def _crc_faults(index: ShardIndex) -> Iterator[str]:
    """Name every caption and image whose bytes have another checksum than in the index."""
    descriptor = open_regular(index.shard)
    try:
        for offset, size, crc, sample, line in index.items.tolist():
            if zlib.crc32(read_exactly(descriptor, size, offset)) != crc:
                yield f"line {line + 1} of sample {index.key(sample)!r} has changed"
        for number, row in enumerate(index.samples):
            data = read_exactly(descriptor, int(row["image_size"]), int(row["image"]))
            if zlib.crc32(data) != int(row["image_crc32"]):
                yield f"the image of sample {index.key(number)!r} has changed"
    finally:
        os.close(descriptor)


def _feature_faults(shard: Path, header: IndexHeader | None) -> Iterator[str]:
    """Compare every feature set with its SHA-256."""
    for name in feature_names(shard):
        try:
            open_features(shard, name, header).verify()
        except UserError as error:
            yield str(error)


def _token_id_faults(shard: Path, header: IndexHeader | None) -> Iterator[str]:
    """Compare every set of stored token ids with its checksums."""
    for path in sorted(shard.parent.glob(f"{glob.escape(shard.stem)}.ids-*{TOKENS_SUFFIX}")):
        try:
            sha256 = PackedTar(path, TOKEN_ID_ARRAYS, "remove it").manifest.get("tokenizer_sha256")
            table = open_token_ids(shard, str(sha256), header)
            if table is not None:
                verify_token_ids(table)
        except UserError as error:
            yield str(error)
