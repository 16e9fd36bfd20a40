"""Teacher features into feature shards beside the originals.

Stored once, they replace a forward pass of every teacher in every training step. A shard whose
features are there and were made by the same teacher is skipped, so an interrupted run is simply
started again. Several processes each take their share of the shards.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from dalr_scale.data.shards.features_store import features_path, open_features, write_features
from dalr_scale.data.shards.files import sample_key
from dalr_scale.data.shards.images import decode_image
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.stream.source import Source
from dalr_scale.errors import UserError

Step = Callable[[int], object]
TeacherSource = Literal["image", "caption", "text", "npz"]


@dataclass(frozen=True)
class Computed:
    """Values of one shard: float16 [rows, dim], or [tokens, dim] with offsets [rows + 1]."""

    values: np.ndarray
    offsets: np.ndarray | None = None


@dataclass(frozen=True)
class Maker:
    """How the features of one shard are made.

    Attributes:
        level: `sample`, `item` or `token`.
        facts: manifest entries that identify the features.
        make: shard and progress callback to values.
    """

    level: str
    facts: dict[str, Any]
    make: Callable[[Path, Step], Computed]


@dataclass(frozen=True)
class FeatureRequest:
    """Which features are to be stored.

    Attributes:
        name: of the feature set, as configurations refer to it.
        source: an open_clip image tower, its text tower on captions, a Hugging Face text encoder,
            or arrays ``feat`` [n, d] and ``names`` [n] in an ``.npz`` file.
        teacher: the model's directory or name, or the file.
        tokens: store token features instead of sentence features.
        pooler, max_length: of a Hugging Face text encoder; None: its own.
        batch_size: rows of a forward pass.
        device: None: a GPU where there is one.
        overwrite: replace existing features of this name.

    Raises:
        UserError: the settings contradict each other.
    """

    name: str
    source: TeacherSource
    teacher: str
    tokens: bool = False
    pooler: str | None = None
    max_length: int | None = None
    batch_size: int = 128
    device: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: use at least 1")
        if self.tokens and self.source not in ("text", "caption"):
            raise UserError("--tokens needs --text-teacher or --caption-teacher")
        if (self.pooler or self.max_length) and self.source != "text":
            raise UserError("--pooler and --max-length belong to --text-teacher")


def store_features(
    shards: Sequence[Path],
    request: FeatureRequest,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> int:
    """Writes the features of this rank's share of the shards; returns how many it wrote.

    Raises:
        UserError: other features of that name are there, or a teacher cannot read its input.
    """
    for shard in shards:
        features_path(shard, request.name)  # refuses an unusable name before a model is loaded
    mine = shards[rank::world_size]
    if not mine:
        print(f"rank {rank}: fewer shards than processes, nothing to do", file=sys.stderr)
        return 0
    maker = _maker(request, shards)
    todo = [s for s in mine if request.overwrite or not _finished(s, request.name, maker)]
    if skipped := len(mine) - len(todo):
        print(f"{skipped} of {len(mine)} shards have these features already", file=sys.stderr)
    total = sum(_rows(shard, maker.level) for shard in todo)
    with tqdm(total=total, unit="row", disable=not progress or not todo) as bar:
        for shard in todo:
            bar.set_description(shard.name)
            made = maker.make(shard, bar.update)
            write_features(
                shard,
                request.name,
                made.values,
                level=maker.level,
                manifest_extra=maker.facts,
                offsets=made.offsets,
                overwrite=request.overwrite,
            )
    print(f"{len(todo)} feature shards written, set {request.name!r}, level {maker.level}")
    return len(todo)


def _maker(request: FeatureRequest, shards: Sequence[Path]) -> Maker:
    if request.source == "npz":
        return _npz_maker(Path(request.teacher), shards)
    device = request.device or default_device()
    if request.source == "image":
        return _image_maker(request.teacher, request.batch_size, device)
    return _text_maker(request, device)


def default_device() -> str:
    """The GPU of this process where there is one, else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"


def _finished(shard: Path, name: str, maker: Maker) -> bool:
    """Whether these very features are there; other ones of that name are refused."""
    path = features_path(shard, name)
    if not path.exists():
        return False
    manifest = open_features(shard, name).manifest
    wanted = maker.facts | {"level": maker.level}
    differing = [key for key, value in wanted.items() if manifest.get(key) != value]
    if differing:
        key = differing[0]
        raise UserError(
            f"{path} holds other features ({key} {manifest.get(key)!r}, not {wanted[key]!r}); "
            "use another --name, or --overwrite"
        )
    return True


def _rows(shard: Path, level: str) -> int:
    header = ensure_index(shard).header
    return header.samples if level == "sample" else header.items


def _image_maker(spec: str, batch_size: int, device: str) -> Maker:
    from dalr_scale.teachers.models import load_image_teacher

    teacher = load_image_teacher(spec).to(device)

    def make(shard: Path, step: Step) -> Computed:
        source = Source([shard], with_images=True)
        # samples that are set aside keep zeros: no item refers to them
        values = np.zeros((source.num_samples, teacher.width), np.float16)
        used = np.flatnonzero(source.used_samples())
        for block in _blocks(len(used), batch_size):
            rows = used[block]
            pixels = [
                _pixels(teacher.transform, data, shard, int(row))
                for row, data in zip(rows, source.read_images(rows), strict=True)
            ]
            values[rows] = _half(teacher.encode(torch.stack(pixels)))
            step(len(rows))
        return Computed(values)

    return Maker("sample", teacher.facts, make)


def _pixels(
    transform: Callable[[Any], torch.Tensor], data: bytes, shard: Path, row: int
) -> torch.Tensor:
    try:
        return transform(decode_image(data))
    except ValueError as error:
        key = ensure_index(shard).load().key(row)
        raise UserError(
            f"{shard}: the image of sample {key!r} {error}; quarantine it with dalr-scale index "
            "--deep"
        ) from error


def _text_maker(request: FeatureRequest, device: str) -> Maker:
    from dalr_scale.teachers.models import load_text_teacher

    kind = "hf" if request.source == "text" else "open_clip"
    teacher = load_text_teacher(
        f"{kind}:{request.teacher}",
        request.pooler,
        tokens=request.tokens,
        max_length=request.max_length,
    ).to(device)

    def make(shard: Path, step: Step) -> Computed:
        source = Source([shard])
        sentences = source.read(np.arange(source.num_items)).sentences
        if request.tokens:
            return _token_values(teacher, sentences, request.batch_size, step)
        values = np.empty((len(sentences), teacher.width), np.float16)
        for rows, ids, mask in teacher.batches(sentences, request.batch_size):
            pooled, _, _ = teacher.encode_ids(ids.to(device), mask.to(device))
            values[rows] = _half(pooled)
            step(len(rows))
        return Computed(values)

    return Maker("token" if request.tokens else "item", teacher.facts, make)


def _token_values(teacher: Any, sentences: list[str], batch_size: int, step: Step) -> Computed:
    # The lengths are known once everything is tokenised; then each batch goes to its place.
    batches = list(teacher.batches(sentences, batch_size))
    counts = np.zeros(len(sentences), np.int64)
    for rows, _, mask in batches:
        counts[rows] = mask.sum(1).numpy() - 1  # the first token, CLS, is dropped
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    values = np.empty((int(offsets[-1]), teacher.token_width), np.float16)
    for rows, ids, mask in batches:
        _, tokens, _ = teacher.encode_ids(ids.to(teacher.device), mask.to(teacher.device))
        half = _half(tokens)
        for i, row in enumerate(rows):
            values[offsets[row] : offsets[row + 1]] = half[i, : counts[row]]
        step(len(rows))
    return Computed(values, offsets)


def _half(values: torch.Tensor) -> np.ndarray:
    """float16 on the CPU; what overflows becomes infinite and is refused when it is written."""
    return values.to("cpu", torch.float16).numpy()


def _blocks(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _npz_maker(path: Path, shards: Sequence[Path]) -> Maker:
    features, by_name, by_base = _read_npz(path)
    used = np.zeros(len(features), bool)
    rows_of: dict[Path, np.ndarray] = {}
    for shard in shards:  # all of them: every rank finds the same missing names before it writes
        keys = ensure_index(shard).load().keys()
        rows = [by_name.get(key, by_base.get(key.rpartition("/")[2], -1)) for key in keys]
        missing = [key for key, row in zip(keys, rows, strict=True) if row < 0]
        if missing:
            raise UserError(
                f"{path} has no features for {len(missing)} of the {len(keys)} samples of {shard}, "
                f"the first is {missing[0]!r}; leave them out of the shards or add their features"
            )
        rows_of[shard] = np.array(rows)
        used[rows_of[shard]] = True
    if surplus := int((~used).sum()):
        print(f"{path.name}: {surplus} of {len(used)} names are in no shard", file=sys.stderr)

    def make(shard: Path, step: Step) -> Computed:
        rows = rows_of[shard]
        step(len(rows))
        with np.errstate(over="ignore"):  # refused with its row when it is written
            return Computed(features[rows].astype(np.float16))

    with path.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return Maker("sample", {"model": path.name, "revision": revision}, make)


def _read_npz(path: Path) -> tuple[np.ndarray, dict[str, int], dict[str, int]]:
    """Features and two tables to their rows: by whole key, and by file name where it is unique."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, names = arrays["feat"], arrays["names"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not an npz file with the arrays feat [n, d] and names [n] (text): {error}"
        ) from error
    if features.ndim != 2 or names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{path}: feat must be [n, d] and names [n] text, not {names.dtype}")
    if len(features) != len(names):
        raise UserError(f"{path}: {len(features)} features, but {len(names)} names")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise UserError(f"{path}: the feature of {str(names[row])!r} is not finite")
    by_name: dict[str, int] = {}
    by_base: dict[str, int] = {}
    for row, name in enumerate(names.tolist()):
        key = sample_key(name)
        if key in by_name:
            raise UserError(f"{path}: two features for {name!r}; keep one")
        by_name[key] = row
        base = key.rpartition("/")[2]
        by_base[base] = -1 if base in by_base else row
    return features, by_name, by_base
