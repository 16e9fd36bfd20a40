"""From the configuration section ``data`` to sources, their order, and the count of bad rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.remote import RemoteShards
from dalr_scale.data.stream.bad_rows import BadRows
from dalr_scale.data.stream.order import Alternation, Part, StreamPlan, Tail, share_rows
from dalr_scale.data.stream.source import Source, Sources

if TYPE_CHECKING:
    from dalr_scale.config import DataConfig

PathOf = Callable[[str], Path]  # a configured path with its placeholders filled in


def find_shards(
    data: DataConfig, path_of: PathOf, patterns: Sequence[str], features: Sequence[str]
) -> list[Path]:
    """Return the shard files of some patterns; remote ones are copied to the cache first.

    Args:
        data: allowed URL schemes and the cache.
        path_of: fills in placeholders.
        patterns: paths, directories, globs, braces or URLs.
        features: feature sets to copy with remote shards.

    Raises:
        UserError: a pattern matches nothing, or a shard cannot be copied.
    """
    remote = RemoteShards(data.remote, data.cache, features)
    local = [str(path) for pattern in patterns for path in remote.localise(pattern, path_of)]
    return expand_shards(local)


def open_source(
    data: DataConfig,
    path_of: PathOf,
    patterns: Sequence[str],
    weights: Sequence[float],
    *,
    features: Mapping[str, str],
    with_images: bool = False,
) -> Source | None:
    """Open the shards of one stream; None without patterns.

    Args:
        data: allowed URL schemes and the cache.
        path_of: fills in placeholders.
        patterns: shards of the stream; each pattern is a part of its own with ``weights``.
        weights: weight of each pattern; empty: one part.
        features: feature set by role.
        with_images: read the images too.

    Raises:
        UserError: see ``find_shards`` and ``Source``.
    """
    if not patterns:
        return None
    groups = [(pattern,) for pattern in patterns] if weights else [tuple(patterns)]
    parts = [find_shards(data, path_of, group, tuple(features.values())) for group in groups]
    shards = [shard for part in parts for shard in part]
    return Source(
        shards,
        features=features,
        with_images=with_images,
        part_sizes=[len(part) for part in parts],
    )


def plan_stream(
    data: DataConfig,
    sources: Sources,
    *,
    seed: int,
    global_batch: int,
    alternation: Alternation,
    tail: Tail,
) -> StreamPlan:
    """Return the order of the batches of both streams.

    Args:
        data: weights and pair fraction; a fraction overrides ``alternation``.
        sources: the streams.
        seed: seed of the order.
        global_batch: items of one step over all ranks.
        alternation: how text-only and paired batches alternate.
        tail: use of the last, shorter batch of an epoch.

    Raises:
        UserError: streams, weights and batch do not fit each other.
    """
    text, pairs = sources
    fraction = data.pair_fraction
    return StreamPlan(
        seed=seed,
        global_batch=global_batch,
        text_items=text.num_items if text else 0,
        pair_items=pairs.num_items if pairs else 0,
        alternation="proportional" if fraction else alternation,
        pair_fraction=Fraction(str(fraction)) if fraction else None,
        tail=tail,
        text_parts=_parts(text, data.text_weights, global_batch),
        pair_parts=_parts(pairs, data.pair_weights, global_batch),
    )


def _parts(source: Source | None, weights: Sequence[float], size: int) -> tuple[Part, ...]:
    if source is None or not weights:
        return ()
    rows = share_rows(size, weights)
    return tuple(Part(n, r) for n, r in zip(source.part_items, rows, strict=True))


def count_bad_rows(data: DataConfig, sources: Sources) -> BadRows:
    """Return the count of bad items, starting with those that the indexes have quarantined.

    Raises:
        UserError: more than ``data.max_bad_fraction`` of a stream is quarantined.
    """
    given = {
        kind: source
        for kind, source in (("text", sources.text), ("pair", sources.pairs))
        if source is not None
    }
    return BadRows(
        {kind: source.num_items for kind, source in given.items()},
        {kind: source.quarantine() for kind, source in given.items()},
        data.max_bad_fraction,
    )
