"""``dalr-scale index``: build, refresh or check the index of each shard."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tqdm import tqdm

from dalr_scale.data.shards.check import check_shard
from dalr_scale.data.shards.features_store import feature_names
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.index_file import IndexHeader, current_index, index_path
from dalr_scale.data.shards.indexing import ensure_index

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 when the check found faults."""
    args = _parser().parse_args(argv)
    shards = expand_shards(args.shards)
    return _check(shards) if args.check else _build(shards, args.deep)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale index",
        description="Build the index of each shard where it is missing or out of date.",
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
    return parser


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
    progress = tqdm(shards, desc="shards", unit="", disable=None)
    faults = [fault for shard in progress for fault in check_shard(shard)]
    for fault in faults:
        print(fault)
    print(f"{len(shards)} shards checked, {len(faults)} faults")
    return 1 if faults else 0
