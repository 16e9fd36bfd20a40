"""``dalr-scale index``: build, refresh or check the indexes beside shards."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dalr_scale.data.shards.features_store import feature_names, open_features
from dalr_scale.data.shards.files import TOKENS_SUFFIX, expand_shards
from dalr_scale.data.shards.index_file import IndexHeader, current_index, index_path, read_header
from dalr_scale.data.shards.indexing import check_shard, ensure_index
from dalr_scale.data.shards.packed import PackedTar
from dalr_scale.data.shards.token_id_store import TOKEN_ID_ARRAYS, open_token_ids, verify_token_ids
from dalr_scale.errors import UserError

_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 when the check found faults."""
    parser = argparse.ArgumentParser(
        prog="dalr-scale index",
        description="Build the index beside each shard where it is missing or out of date.",
    )
    parser.add_argument("shards", nargs="+", help="shard files, directories, globs or brace ranges")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; read every byte and compare it with the index and the feature sums",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="decode every image; quarantine those that cannot be decoded",
    )
    args = parser.parse_args(argv)
    shards = expand_shards(args.shards)
    return _check(shards) if args.check else _build(shards, args.deep)


def _build(shards: list[Path], deep: bool) -> int:
    rows: list[tuple[Path, str, IndexHeader]] = []
    for shard in tqdm(shards, desc="shards", unit="", disable=None):
        state = "rebuilt" if index_path(shard).exists() else "built"
        current = current_index(shard)
        if current is not None and current.header.deep >= deep:
            state = "up to date"
        rows.append((shard, state, ensure_index(shard, deep=deep).header))
    _print_table(rows)
    _print_quarantine([row[0] for row in rows if row[2].quarantined])
    return 0


def _print_quarantine(shards: list[Path]) -> None:
    found = [line for shard in shards for line in ensure_index(shard).load().quarantine()]
    for line in found[:_SHOWN]:
        print(f"quarantined: {line}")
    if len(found) > _SHOWN:
        print(f"quarantined: ... and {len(found) - _SHOWN} more")


def _print_table(rows: list[tuple[Path, str, IndexHeader]]) -> None:
    width = max(len(row[0].name) for row in rows)
    print(f"{'shard':<{width}}  {'samples':>9}  {'images':>9}  {'items':>11}  {'MB':>9}  index")
    for shard, state, header in rows:
        features = ", ".join(feature_names(shard))
        print(
            f"{shard.name:<{width}}  {header.samples:>9,}  {header.images:>9,}  "
            f"{header.items:>11,}  {header.shard_size / 1e6:>9.1f}  {state}"
            + (f"  (features: {features})" if features else "")
        )
    headers = [row[2] for row in rows]
    print(
        f"{'total':<{width}}  {sum(h.samples for h in headers):>9,}  "
        f"{sum(h.images for h in headers):>9,}  {sum(h.items for h in headers):>11,}  "
        f"{sum(h.shard_size for h in headers) / 1e6:>9.1f}  {len(rows)} shards"
    )


def _check(shards: list[Path]) -> int:
    faults: list[str] = []
    for shard in tqdm(shards, desc="shards", unit="", disable=None):
        found = check_shard(shard)
        faults += found
        # Features are compared with the indexed shard; without a sound index there is no telling.
        for name in [] if found else feature_names(shard):
            try:
                open_features(shard, name, read_header(index_path(shard))).verify()
            except UserError as error:
                faults.append(str(error))
        faults += [] if found else _token_faults(shard)
    for fault in faults:
        print(fault)
    print(f"{len(shards)} shards checked, {len(faults)} faults")
    return 1 if faults else 0


def _token_faults(shard: Path) -> list[str]:
    """Compare every set of stored token ids with its checksums."""
    faults = []
    for path in sorted(shard.parent.glob(f"{glob.escape(shard.stem)}.ids-*{TOKENS_SUFFIX}")):
        try:
            sha256 = PackedTar(path, TOKEN_ID_ARRAYS, "remove it").manifest.get("tokenizer_sha256")
            table = open_token_ids(shard, str(sha256), read_header(index_path(shard)))
            if table is not None:
                verify_token_ids(table)
        except UserError as error:
            faults.append(str(error))
    return faults
