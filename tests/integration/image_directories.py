"""A directory of twelve images with five captions each, and ``dalr-scale prepare`` on it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dalr_scale.commands import prepare
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.stream.source import Source
from dalr_scale.process import run_command

NAMES = [f"{number}_ab.jpg" for number in range(12)]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def texts(name: str) -> list[str]:
    return [f'{name[:-4]} "on" a rope, {line}' for line in range(5)]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def captions_csv(directory: Path, names: list[str] = NAMES) -> Path:
    lines = [f"{name},{quoted(text)}" for name in names for text in texts(name)]
    path = directory / "captions.csv"
    path.write_text("\n".join(["image,caption", *lines]) + "\n")
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run_command(prepare.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def contents(output: Path) -> dict[str, tuple[bytes, list[str]]]:
    """Return key -> (image, captions) of all shards of a directory."""
    source = Source(expand_shards([str(output)]), with_images=True)
    records = source.read(np.arange(source.num_items))
    assert records.images is not None
    found: dict[str, tuple[bytes, list[str]]] = {}
    for item, (text, image) in enumerate(zip(records.sentences, records.images, strict=True)):
        key = source.describe(item).split("'")[1]
        found.setdefault(key, (image, []))[1].append(text)
    return found


def everything() -> dict[str, tuple[bytes, list[str]]]:
    return {name[:-4]: (jpeg(number), texts(name)) for number, name in enumerate(NAMES)}
