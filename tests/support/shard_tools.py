"""Shards for the data tests: sound ones through the writer, hostile ones byte by byte."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from dalr_scale.data.shards.writer import ShardSetWriter

END = bytes(1024)


def jpeg(number: int = 0, side: int = 16) -> bytes:
    """Return a small JPEG with a content of its own."""
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    return image_bytes(Image.fromarray(pixels), "JPEG")


def image_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image encoded in some format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def captions_of(number: int, count: int = 5) -> list[str]:
    """Return the captions of image ``number``."""
    return [f"caption {line} of image {number}" for line in range(count)]


def write_pairs(
    directory: Path, samples: int, *, per_shard: int, prefix: str = "pairs"
) -> list[Path]:
    """Write samples of one JPEG and five captions; captions differ between prefixes."""
    with ShardSetWriter(directory, prefix, samples_per_shard=per_shard) as writer:
        for number in range(samples):
            text = "\n".join(f"{prefix} {line}" for line in captions_of(number))
            writer.write(f"{prefix}{number:04d}", {"jpg": jpeg(number), "txt": text.encode()})
    return writer.shards


def oracle_samples(shard: Path) -> list[dict[str, bytes]]:
    """Return the samples as the webdataset package's own reader groups them."""
    with shard.open("rb") as stream:
        files = tar_file_expander([{"url": str(shard), "stream": stream}])
        return [
            {name: value for name, value in sample.items() if name != "__url__"}
            for sample in group_by_keys(files)
        ]


def tar_header(
    name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    """Return a 512-byte header with a right checksum, whatever its fields say."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(field)] = field
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar_member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    """Return header and padded content of one member."""
    return tar_header(name, len(data), kind) + data + bytes(-len(data) % 512)
