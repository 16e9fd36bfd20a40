"""Caption files as users have them: CSV, TSV, Flickr token files, JSON lines, COCO, Karpathy."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dalr_scale.data.shards.files import IMAGE_EXTENSIONS
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from dalr_scale.data.prepare.report import Report

IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename", "file", "filepath")
CAPTION_COLUMNS = ("caption", "captions", "comment", "text", "sentence")


@dataclass
class Captions:
    """The content of a caption file.

    Attributes:
        texts: image name -> captions, both in the order of the file.
        splits: image name -> split, for files that have splits (Karpathy's); else empty.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)


def read_captions(path: Path, report: Report, *, max_chars: int) -> Captions:
    """Read a caption file.

    Understood are: a CSV or TSV with a header (``image,caption``) or with the image name in its
    first column; a Flickr token file (``name.jpg#0<TAB>caption``); JSON lines with ``image`` and
    ``caption`` or ``captions``; COCO's ``captions_*.json``; Karpathy's ``dataset_*.json``. The
    format is recognized by the content, not by the file's suffix.

    Args:
        path: the file, UTF-8.
        report: blank captions are counted there.
        max_chars: longer captions are cut.

    Raises:
        UserError: the file is missing, empty, not UTF-8, of no known layout, or without a caption.
    """
    text = read_text(path)
    first = text.lstrip().split("\n", 1)[0]
    if not first:
        raise UserError(f"{path}: is empty; give a file with a caption in each line")
    captions = Captions()
    if not first.startswith("{"):
        pairs = _from_table(path, text, "\t" if "\t" in first else ",")
    elif (document := _json_document(text)) is not None:
        pairs = _from_document(path, document, captions.splits)
    else:
        pairs = _from_json_lines(path, text)
    for image, caption in pairs:
        line = clean(caption, max_chars)
        if line:
            captions.texts.setdefault(image, []).append(line)
        else:
            report.skip("blank captions", image)
    if not captions.texts:
        raise UserError(f"{path}: has no caption; give a file with a caption in each line")
    return captions


def read_text(path: Path) -> str:
    """Return a UTF-8 text file, without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); convert it first") from error


def read_names(path: Path) -> list[str]:
    """Return the non-blank lines of a list of image names.

    Raises:
        UserError: the file is missing or has none.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: is empty; give one image name in each line")
    return names


def clean(text: str, max_chars: int) -> str:
    """Reduce white space, line breaks included, to single spaces, and cut to ``max_chars``."""
    return " ".join(text[: 4 * max_chars].split())[:max_chars].rstrip()


def _json_document(text: str) -> dict[str, Any] | None:
    """Return the file as a JSON object with a list of images; None for any other content."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    listed = isinstance(document, dict) and isinstance(document.get("images"), list)
    return document if listed else None


def _from_document(
    path: Path, document: dict[str, Any], splits: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield (image, caption) of COCO's layout or of Karpathy's; record the latter's splits."""
    try:
        if "annotations" in document:
            names = {image["id"]: image["file_name"] for image in document["images"]}
            pairs = [(names[a["image_id"]], a["caption"]) for a in document["annotations"]]
        else:
            pairs = []
            for image in document["images"]:
                directory = image.get("filepath", "")
                name = f"{directory}/{image['filename']}" if directory else image["filename"]
                splits[name] = image["split"]
                pairs += [(name, sentence["raw"]) for sentence in image["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is JSON, but neither like COCO's captions_*.json (images, annotations) nor "
            f"like Karpathy's dataset_*.json (images with filename, split, sentences): {error!r}"
        ) from error
    for image, caption in pairs:
        if not isinstance(image, str) or not isinstance(caption, str):
            raise UserError(f"{path}: has a name or caption that is not text, {image!r}")
        yield image, caption


def _from_json_lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image = next(record[name] for name in IMAGE_COLUMNS if name in record)
            value = next(record[name] for name in CAPTION_COLUMNS if name in record)
        except (ValueError, TypeError, StopIteration, RecursionError):
            raise UserError(
                f'{path}: line {number} is not like {{"image": "a.jpg", "caption": "..."}}; fix it'
            ) from None
        for caption in value if isinstance(value, list) else [value]:
            if not isinstance(caption, str) or not isinstance(image, str):
                raise UserError(f"{path}: line {number} has a name or caption that is not text")
            yield image, caption


def _from_table(path: Path, text: str, separator: str) -> Iterator[tuple[str, str]]:
    rows = _rows(path, text, separator)
    first = next(rows)
    columns = [name.strip().lower() for name in first]
    image = _column(columns, IMAGE_COLUMNS)
    caption = _column(columns, CAPTION_COLUMNS)
    last = len(columns) - 1
    if image is None or caption is None:
        if len(first) < 2 or not _is_image_name(_without_number(first[0])):
            raise UserError(
                f"{path}: the first line is neither a header like image{separator}caption nor "
                f"an image name and a caption, but {first[0][:80]!r}; add the header"
            )
        image, caption, last = 0, 1, 1
        rows = _chain(first, rows)
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) <= max(image, caption):
            raise UserError(f"{path}: row {number} has {len(row)} columns; fix it")
        # An unquoted separator in the last column belongs to the caption.
        rest = row[caption:] if caption >= last else row[caption : caption + 1]
        yield _without_number(row[image].strip()), separator.join(rest)


def _rows(path: Path, text: str, separator: str) -> Iterator[list[str]]:
    if separator == "\t":  # quotes in token files and TSVs are ordinary characters
        yield from (line.rstrip("\r").split("\t") if line.strip() else [] for line in _lines(text))
        return
    try:
        yield from csv.reader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise UserError(f"{path}: is not a readable CSV ({error}); fix its quotes") from error


def _lines(text: str) -> Iterable[str]:
    return text.split("\n")


def _chain(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def _column(columns: list[str], names: tuple[str, ...]) -> int | None:
    return next((columns.index(name) for name in names if name in columns), None)


def _without_number(name: str) -> str:
    """Drop the caption number of a token file: ``name.jpg#3`` -> ``name.jpg``."""
    head, mark, number = name.rpartition("#")
    return head if mark and number.isdigit() else name


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))
