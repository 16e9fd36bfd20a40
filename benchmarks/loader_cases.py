"""The same batches twice: from this project's loader and from a stock WebDataset pipeline."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from dalr_scale.data.shards.features_store import write_features
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.token_id_store import Encoding, write_token_ids
from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards
from dalr_scale.data.stream.loader import LoaderOptions, make_loader
from dalr_scale.data.stream.order import StreamPlan
from dalr_scale.data.stream.source import Source, Sources

if TYPE_CHECKING:
    from dalr_scale.data.stream.batch import Batch

MAX_LENGTH = 32
WIDTH = 1024
SIDE = 224
BUFFER = 1000  # samples in WebDataset's shuffle buffer, the value of its documentation
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One kind of shard.

    Attributes:
        name: ``features``, ``text`` or ``images``.
        batch: rows of a batch.
        items: rows of a pass.
        ours, stock: workers -> an endless or finite stream of batches of equal content.
    """

    name: str
    batch: int
    items: int
    ours: Callable[[int], Iterator[Any]]
    stock: Callable[[int], Iterator[Tensors]]


def write_shards(
    directory: Path, samples: Sequence[tuple[bytes, list[str]]], features: Any
) -> None:
    """Write images with captions and their features the way ``prepare`` and ``features`` do."""
    with ShardSetWriter(directory, "pairs", samples_per_shard=1000) as writer:
        for number, (image, captions) in enumerate(samples):
            text = "".join(f"{line}\n" for line in captions)
            writer.write(f"{number:06d}", {"jpg": image, "txt": text.encode()})
    done = 0
    for shard in writer.shards:
        rows = ensure_index(shard).header.samples
        write_features(
            shard, "clip", features[done : done + rows], level="sample", manifest_extra={}
        )
        done += rows


def store_ids(shards: Sequence[Path], tokenizer: Any, sha256: str) -> None:
    """The token ids beside the shards, as ``dalr-scale tokens`` writes them."""
    for shard in shards:
        source = Source([shard])
        write_token_ids(
            shard, source.read(np.arange(source.num_items)).sentences, tokenizer, sha256
        )


def feature_case(directory: Path, tokenizer: Any, sha256: str, batch: int) -> Case:
    """Token ids and a float16 feature per caption."""
    shards = sorted(directory.glob("pairs-??????.tar"))
    source = Source(shards, features={"image": "clip"})
    source.use_token_ids(Encoding(sha256, MAX_LENGTH, tokenizer.pad_token_id))
    stock = _write_stock(directory / "stock-features", _items(source, with_features=True))

    def tensors(batch: Batch) -> Tensors:
        return batch.input_ids, batch.attention_mask, batch.features["image"]

    return Case(
        "features",
        batch,
        source.num_items,
        _ours(None, source, tokenizer, batch, tensors),
        _stock(stock, batch, ("ids.npy", "feat.npy"), tokenizer.pad_token_id),
    )


def text_case(directory: Path, tokenizer: Any, sha256: str, batch: int) -> Case:
    """Token ids of sentences."""
    source = Source(sorted(directory.glob("text-??????.tar")))
    source.use_token_ids(Encoding(sha256, MAX_LENGTH, tokenizer.pad_token_id))
    stock = _write_stock(directory / "stock-text", _items(source, with_features=False))

    def tensors(batch: Batch) -> Tensors:
        return batch.input_ids, batch.attention_mask

    return Case(
        "text",
        batch,
        source.num_items,
        _ours(source, None, tokenizer, batch, tensors),
        _stock(stock, batch, ("ids.npy",), tokenizer.pad_token_id),
    )


def image_case(directory: Path, tokenizer: Any, sha256: str, batch: int) -> Case:
    """Token ids and a decoded image per caption; one caption of each image."""
    images = directory / "single"
    every = Source(sorted(directory.glob("pairs-??????.tar")), with_images=True)
    first = np.flatnonzero(np.diff(every.read(np.arange(every.num_items)).image_ids, prepend=-1))
    records = every.read(first)
    assert records.images is not None
    with ShardSetWriter(images, "pairs", samples_per_shard=1000, overwrite=True) as writer:
        for number, (text, data) in enumerate(zip(records.sentences, records.images, strict=True)):
            writer.write(f"{number:06d}", {"jpg": data, "txt": text.encode()})
    store_ids(writer.shards, tokenizer, sha256)
    source = Source(writer.shards, with_images=True)
    source.use_token_ids(Encoding(sha256, MAX_LENGTH, tokenizer.pad_token_id))
    stock = _write_stock(directory / "stock-images", _items(source, with_features=False))

    def tensors(batch: Batch) -> Tensors:
        assert batch.images is not None
        return batch.input_ids, batch.attention_mask, batch.images

    return Case(
        "images",
        batch,
        source.num_items,
        _ours(None, source, tokenizer, batch, tensors, to_tensor),
        _stock(stock, batch, ("ids.npy", "jpg"), tokenizer.pad_token_id),
    )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The decoding that both sides share after the JPEG itself: 224 x 224, float32."""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def content_hash(case: Case, batches: Iterator[Any]) -> str:
    """A hash over all rows of one pass, whatever their order and padding."""
    rows: list[bytes] = []
    for ids, mask, *rest in batches:
        for number in range(len(ids)):
            parts = [ids[number][mask[number].bool()].numpy().tobytes()]
            parts += [value[number].contiguous().numpy().tobytes() for value in rest]
            rows.append(hashlib.sha256(b"".join(parts)).digest())
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()[:16] + f" ({len(rows)} rows)"


def _items(source: Source, *, with_features: bool) -> Iterator[dict[str, bytes]]:
    """The items of a source in random order, as the members that a stock pipeline reads."""
    order = np.random.default_rng(0).permutation(source.num_items)
    for start in range(0, len(order), 512):
        ids = order[start : start + 512]
        records = source.read(ids)
        assert records.token_ids is not None
        for row in range(len(ids)):
            length = int(records.token_ids[1][row].sum())
            members = {"ids.npy": _npy(records.token_ids[0][row, :length].astype(np.uint16))}
            if with_features:
                members["feat.npy"] = _npy(records.features["image"][row].astype(np.float16))
            if records.images is not None:
                members["jpg"] = records.images[row]
            yield members


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _write_stock(directory: Path, items: Iterator[dict[str, bytes]]) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    pattern = str(directory / "stock-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=5000, verbose=0) as writer:
        for number, members in enumerate(items):
            writer.write({"__key__": f"{number:08d}", **members})
    return sorted(map(str, directory.glob("stock-*.tar")))


def _ours(
    text: Source | None,
    pairs: Source | None,
    tokenizer: Any,
    batch: int,
    tensors: Callable[[Batch], Tensors],
    transform: Any = None,
) -> Callable[[int], Iterator[Tensors]]:
    plan = StreamPlan(
        seed=1,
        global_batch=batch,
        text_items=text.num_items if text else 0,
        pair_items=pairs.num_items if pairs else 0,
        tail="keep",
    )

    def stream(workers: int) -> Iterator[Tensors]:
        options = LoaderOptions(
            total_steps=plan.steps_per_epoch,
            max_length=MAX_LENGTH,
            num_workers=workers,
            image_transform=transform,
            with_text=False,
        )
        loader = make_loader(plan, Sources(text, pairs), tokenizer, options)
        return map(tensors, loader)

    return stream


def _stock(
    shards: list[str], batch: int, members: tuple[str, ...], pad_id: int
) -> Callable[[int], Iterator[Tensors]]:
    def collate(rows: list[tuple[Any, ...]]) -> Tensors:
        columns = list(zip(*rows, strict=True))
        longest = max(map(len, columns[0]))
        ids = np.full((len(rows), longest), pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for number, row in enumerate(columns[0]):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        rest = [
            torch.stack([to_tensor(image) for image in column])
            if name == "jpg"
            else torch.from_numpy(np.stack(column).astype(np.float32))
            for name, column in zip(members[1:], columns[1:], strict=True)
        ]
        return torch.from_numpy(ids), torch.from_numpy(mask), *rest

    def stream(workers: int) -> Iterator[Tensors]:
        dataset = (
            wds.WebDataset(shards, shardshuffle=len(shards), seed=1)
            .shuffle(BUFFER)
            .decode("pil")
            .to_tuple(*members)
            .batched(batch, collation_fn=collate)
        )
        return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))

    return stream


def draw_samples(count: int) -> tuple[list[tuple[bytes, list[str]]], np.ndarray]:
    """Images, five captions each and features, for a run without real data."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(500)])
    samples = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8))
        stream = io.BytesIO()
        small.resize((144, 144), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        captions = [" ".join(rng.choice(words, rng.integers(6, 20))) for _ in range(5)]
        samples.append((stream.getvalue(), captions))
    return samples, rng.normal(size=(count, WIDTH)).astype(np.float16)


def draw_text(directory: Path, count: int) -> None:
    """Sentences for a run without real data."""
    rng = np.random.default_rng(1)
    words = np.array([f"w{number}" for number in range(500)])
    write_text_shards(
        (" ".join(rng.choice(words, rng.integers(8, 30))) for _ in range(count)), directory, "text"
    )
