"""Text files to packed text shards."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, cast

from tqdm import tqdm

from dalr_scale.data.index import ensure_index
from dalr_scale.data.prepare_captions import CAPTION_COLUMNS, clean
from dalr_scale.data.prepare_report import Report
from dalr_scale.data.writer import write_text_shards
from dalr_scale.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl")
PACKED_SUFFIXES = (".gz", ".xz")
_LINE_LIMIT = 1 << 20  # bytes of one line that are kept in memory


def is_text_file(path: Path) -> bool:
    """Whether the name is one that ``prepare`` takes sentences from."""
    suffixes = path.suffixes[-2:]
    return path.suffix in TEXT_SUFFIXES + PACKED_SUFFIXES and ".tar" not in suffixes


def prepare_text(
    files: Sequence[Path],
    output: Path,
    *,
    prefix: str,
    samples_per_shard: int,
    limit: int | None = None,
    max_chars: int,
    overwrite: bool = False,
) -> Report:
    """Write the sentences of text files, one a line, to packed text shards and index them.

    The order of the files is kept: training orders single sentences, wherever they are stored.

    Args:
        files: ``.txt`` or ``.jsonl`` (field text, sentence or caption), plain, ``.gz`` or ``.xz``.
        output: folder of the shards.
        prefix: start of the shard names.
        samples_per_shard: ``.txt`` members in a shard, 1,024 sentences each.
        limit: sentences to take; None takes all.
        max_chars: longer sentences are cut.
        overwrite: replace an earlier set of the same prefix.

    Raises:
        UserError: a file is missing or damaged, or there is no sentence.
    """
    report = Report()
    sentences = islice((s for f in files for s in _sentences(f, report, max_chars)), limit)
    with tqdm(sentences, desc="sentences", unit="", unit_scale=True, disable=None) as counted:
        report.shards = write_text_shards(
            counted, output, prefix, members_per_shard=samples_per_shard, overwrite=overwrite
        )
    report.written["sentences"] = sum(ensure_index(s).header.items for s in report.shards)
    return report


def _sentences(path: Path, report: Report, max_chars: int) -> Iterator[str]:
    """Yield the usable sentences of one file, counting what is left out."""
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
    """Yield the lines of a file; of a line without end only a bounded part is ever in memory."""
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
    return path.open("rb")
