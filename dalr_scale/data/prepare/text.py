"""Text files to packed text shards."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from dataclasses import dataclass
from itertools import islice
from typing import IO, TYPE_CHECKING, cast

import zstandard
from tqdm import tqdm

from dalr_scale.data.prepare.captions import CAPTION_COLUMNS, clean
from dalr_scale.data.prepare.pairs import has_images
from dalr_scale.data.prepare.report import Report
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

TEXT_SUFFIXES = (".txt", ".jsonl")
PACKED_SUFFIXES = (".gz", ".xz", ".zst")
_LINE_LIMIT = 1 << 20  # bytes of one line that are kept in memory
_ZSTD_INPUT = 2048  # bytes fed at a time: the worst of them expand to 64 MB
_ZSTD_WINDOW = 128 * 1024 * 1024


def is_text_file(path: Path) -> bool:
    """Whether the name is that of a text file."""
    suffixes = path.suffixes[-2:]
    return path.suffix in TEXT_SUFFIXES + PACKED_SUFFIXES and ".tar" not in suffixes


@dataclass(frozen=True)
class TextOptions:
    """How many sentences to take and how to store them.

    Attributes:
        limit: sentences to take; None takes all.
        max_chars: longer sentences are cut.
        prefix: start of the shard names.
        samples_per_shard: ``.txt`` members in a shard, 1,024 sentences each.
        overwrite: replace an earlier set of the same prefix.
    """

    limit: int | None = None
    max_chars: int = 4000
    prefix: str = "text"
    samples_per_shard: int = 64
    overwrite: bool = False


def find_text_files(sources: Sequence[Path]) -> list[Path]:
    """Return the text files among some files and directories.

    Raises:
        UserError: a file is not a text file, or a directory has images or no text file.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.iterdir() if is_text_file(path))
            if not inside or has_images(source):
                raise UserError(
                    f"{source}: has images or no text file (.txt, .jsonl, .gz, .xz, .zst); "
                    "for images give their captions with --captions FILE"
                )
            files += inside
        elif is_text_file(source):
            files.append(source)
        else:
            raise UserError(
                f"{source}: is not a text file (.txt, .jsonl, .gz, .xz, .zst); for images give "
                "their captions with --captions FILE; finished shards only need dalr-scale index"
            )
    return files


def prepare_text(sources: Sequence[Path], output: Path, options: TextOptions) -> Report:
    """Write the sentences of text files, one a line, to packed text shards and index them.

    The order of the files is kept: training orders single sentences, wherever they are stored.

    Args:
        sources: ``.txt`` or ``.jsonl`` files (field text, sentence or caption), plain, ``.gz``,
            ``.xz`` or ``.zst``, and directories of them.
        output: directory of the shards.
        options: how many sentences to take and how to store them.

    Raises:
        UserError: a file is missing, damaged or not a text file, or there is no sentence.
    """
    report = Report()
    files = find_text_files(sources)
    found = (s for file in files for s in _sentences(file, report, options.max_chars))
    sentences = islice(found, options.limit)
    with tqdm(sentences, desc="sentences", unit="", unit_scale=True, disable=None) as counted:
        report.shards = write_text_shards(
            counted,
            output,
            options.prefix,
            members_per_shard=options.samples_per_shard,
            overwrite=options.overwrite,
        )
    report.written["sentences"] = sum(ensure_index(s).header.items for s in report.shards)
    return report


def _sentences(path: Path, report: Report, max_chars: int) -> Iterator[str]:
    """Yield the usable sentences of one file, and count the unusable ones."""
    is_json = ".jsonl" in path.suffixes
    for number, raw in enumerate(_raw_lines(path, report), 1):
        where = f"{path.name}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            report.skip("lines that are not UTF-8", where)
            continue
        if is_json and text.strip():
            found = _json_field(text)
            if found is None:
                report.skip("lines without a JSON text field", where)
                continue
            text = found
        sentence = clean(text, max_chars)
        if sentence:
            yield sentence
        else:
            report.skip("blank lines")


def _json_field(line: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict):
        record = next((record[name] for name in CAPTION_COLUMNS if name in record), None)
    return record if isinstance(record, str) else None


def _raw_lines(path: Path, report: Report) -> Iterator[bytes]:
    """Yield the lines of a file; only a bounded part of an overlong line is in memory."""
    try:
        with _open(path) as file:
            while line := file.readline(_LINE_LIMIT):
                yield line
                if len(line) == _LINE_LIMIT and not line.endswith(b"\n"):
                    report.skip("ends of lines longer than a megabyte", path.name)
                    while (line := file.readline(_LINE_LIMIT)) and not line.endswith(b"\n"):
                        pass
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read to its end ({reason}); copy it again") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast("IO[bytes]", lzma.open(path, "rb"))
    if path.suffix == ".zst":
        return cast("IO[bytes]", io.BufferedReader(_ZstdFile(path.open("rb"))))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of any number of frames.

    The package's own reader ends silently where a file has been truncated.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = self._new_frame()
        self._inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._ready:
            data = self._file.read(_ZSTD_INPUT)
            if not data:
                if self._inside:
                    raise EOFError("the last Zstandard frame is cut off")
                return 0
            self._ready = self._decompress(data)
        view = memoryview(buffer)
        size = min(len(view), len(self._ready))
        view[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        while data:
            try:
                parts.append(self._frame.decompress(data))
            except zstandard.ZstdError as error:
                raise EOFError(f"not a valid Zstandard file: {error}") from error
            self._inside, data = not self._frame.eof, b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, self._new_frame()
        return b"".join(parts)

    def _new_frame(self) -> zstandard.ZstdDecompressionObj:
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()

    def close(self) -> None:
        self._file.close()
        super().close()
