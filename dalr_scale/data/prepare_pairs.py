"""Pictures and a caption file to shards of image-caption samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from dalr_scale.data.images import check_image
from dalr_scale.data.index import MEMBER_LIMIT, ensure_index
from dalr_scale.data.prepare_captions import read_captions, read_names
from dalr_scale.data.prepare_report import Report
from dalr_scale.data.shards import (
    IMAGE_EXTENSIONS,
    open_regular,
    read_exactly,
    sample_key,
    walk_tar,
)
from dalr_scale.data.writer import ShardSetWriter
from dalr_scale.errors import UserError

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_CHUNK = 256  # pictures in memory at a time


class Picture(NamedTuple):
    """A picture in a folder or a tar: its name there, and where its bytes are."""

    name: str
    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the encoded bytes."""
        descriptor = open_regular(self.path)
        try:
            return read_exactly(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class PairOptions:
    """What to take and how to store it.

    Attributes:
        images: list of the only pictures to take.
        exclude: list of pictures to leave out.
        limit: pictures to take at most.
        max_chars: longer captions are cut.
        prefix: start of the shard names.
        samples_per_shard: pictures in a shard.
        overwrite: replace an earlier set of the same prefix.
    """

    images: Path | None = None
    exclude: Path | None = None
    limit: int | None = None
    max_chars: int = 4000
    prefix: str = "pairs"
    samples_per_shard: int = 1000
    overwrite: bool = False


def prepare_pairs(
    sources: Sequence[Path], captions: Path, output: Path, options: PairOptions
) -> Report:
    """Write pictures with their captions to shards and index them.

    A sample is one picture, stored byte for byte as it is, and its captions, one a line. Pictures
    are decoded once to find damaged ones. Samples are written in an order drawn from a hash of
    their keys, so that every shard is a mixture and the bytes are the same each time.

    Args:
        sources: folders (searched through) and uncompressed tars of pictures.
        captions: see ``read_captions``.
        output: folder of the shards.
        options: what to take and how to store it.

    Raises:
        UserError: no picture, no caption, lists that do not match, or nothing readable.
    """
    report = Report()
    writer = ShardSetWriter(
        output,
        options.prefix,
        samples_per_shard=options.samples_per_shard,
        overwrite=options.overwrite,
    )
    found = read_captions(captions, report, max_chars=options.max_chars)
    pictures = list_pictures(sources)
    texts = _join(pictures, found, captions, sources, report)
    chosen = _choose(texts, _Lookup(pictures), options, report)
    keys = _unique_keys(chosen)
    order = sorted(chosen, key=lambda picture: _shuffle_key(keys[picture]))[: options.limit]
    with writer:
        for picture, data, extension in _verified(order, report):
            lines = "".join(f"{text}\n" for text in texts[picture])
            members = {extension: data, "txt": lines.encode("utf-8", "replace")}
            writer.write(keys[picture], members)
            report.written["pictures"] += 1
            report.written["captions"] += len(texts[picture])
        if not report.written["pictures"]:
            raise UserError(
                f"{sources[0]}: none of the {len(order)} chosen pictures can be read; "
                "give JPEG, PNG or WebP pictures"
            )
    report.shards = writer.shards
    for shard in report.shards:
        ensure_index(shard)
    return report


def list_pictures(sources: Sequence[Path]) -> list[Picture]:
    """List the pictures of folders and tars, sorted by name.

    Raises:
        UserError: a source is missing or damaged, has no picture, or a name occurs twice.
    """
    found: dict[str, Picture] = {}
    for source in sources:
        listed = list(_in_folder(source) if source.is_dir() else _in_tar(source))
        if not listed:
            raise UserError(f"{source}: has no picture (.jpg, .jpeg, .png, .webp)")
        for picture in listed:
            if found.setdefault(picture.name, picture) is not picture:
                raise UserError(f"{source}: {picture.name!r} is in another source too; keep one")
    return [found[name] for name in sorted(found)]


def _is_picture(name: str) -> bool:
    # Files that begin with a dot are what some systems leave beside the real ones.
    base = name.rpartition("/")[2]
    return base.lower().endswith(_SUFFIXES) and not base.startswith(".")


def _in_folder(folder: Path) -> Iterator[Picture]:
    for path in folder.rglob("*"):
        if _is_picture(path.name) and path.is_file():
            name = path.relative_to(folder).as_posix()
            yield Picture(name, path, 0, path.stat().st_size)


def _in_tar(path: Path) -> Iterator[Picture]:
    for member in walk_tar(path, extensions=None):
        if _is_picture(member.name):
            yield Picture(member.name, path, member.offset, member.size)


class _Lookup:
    """Finds a picture by its name in the source, else by base name, else without the suffix."""

    def __init__(self, pictures: Iterable[Picture]) -> None:
        self._exact: dict[str, Picture] = {}
        self._loose: dict[str, Picture | None] = {}
        for picture in pictures:
            base = PurePosixPath(picture.name)
            self._exact[picture.name] = picture
            for name in (base.name, base.stem):
                # None marks a name that fits several pictures and so decides nothing.
                other = self._loose.setdefault(name, picture)
                self._loose[name] = picture if other == picture else None

    def find(self, name: str) -> Picture | None:
        found = self._exact.get(name.removeprefix("./"))
        return found or self._loose.get(PurePosixPath(name).name)


def _join(
    pictures: list[Picture],
    captions: Mapping[str, list[str]],
    captions_file: Path,
    sources: Sequence[Path],
    report: Report,
) -> dict[Picture, list[str]]:
    """Give every picture its captions; refuse lists that have nothing in common."""
    lookup = _Lookup(pictures)
    texts: dict[Picture, list[str]] = {}
    for name, lines in captions.items():
        picture = lookup.find(name)
        if picture is None:
            report.skip("captions without a picture", name, len(lines))
        else:
            texts.setdefault(picture, []).extend(lines)
    if not texts:
        raise UserError(
            f"{captions_file}: none of its images (e.g. {next(iter(captions))!r}) is among the "
            f"{len(pictures)} pictures of {sources[0]} (e.g. {pictures[0].name!r}); "
            "give the captions of these pictures"
        )
    for picture in pictures:
        if picture not in texts:
            report.skip("pictures without captions", picture.name)
    return texts


def _choose(
    texts: Mapping[Picture, list[str]], lookup: _Lookup, options: PairOptions, report: Report
) -> list[Picture]:
    """Apply the lists of what to keep and what to leave out."""
    keep = _listed(options.images, lookup, report)
    drop = _listed(options.exclude, lookup, report) or set()
    chosen = []
    for picture in texts:
        if picture in drop:
            report.skip("pictures named in the exclude list", picture.name)
        elif keep is not None and picture not in keep:
            report.skip("pictures not named in the image list", picture.name)
        else:
            chosen.append(picture)
    if not chosen:
        raise UserError(f"{options.images or options.exclude}: leaves no picture with a caption")
    return chosen


def _listed(path: Path | None, lookup: _Lookup, report: Report) -> set[Picture] | None:
    """Return the pictures a list names; refuse a list that fits none (the wrong file, surely)."""
    if path is None:
        return None
    names = read_names(path)
    found = set()
    for name in names:
        picture = lookup.find(name)
        if picture is None:
            report.skip(f"names in {path.name} without a picture", name)
        else:
            found.add(picture)
    if not found:
        raise UserError(f"{path}: names no picture of the source (e.g. {names[0]!r}); check it")
    return found


def _unique_keys(pictures: Iterable[Picture]) -> dict[Picture, str]:
    """Name the samples after their pictures; names that become equal get a number."""
    keys: dict[Picture, str] = {}
    used: set[str] = set()
    for picture in sorted(pictures):
        plain = sample_key(picture.name)
        key, number = plain, 1
        while key in used:
            number += 1
            key = f"{plain}-{number}"
        used.add(key)
        keys[picture] = key
    return keys


def _shuffle_key(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _verified(pictures: Sequence[Picture], report: Report) -> Iterator[tuple[Picture, bytes, str]]:
    """Yield (picture, bytes, extension) of the readable pictures, in order.

    Decoding runs in threads, since Pillow releases the interpreter lock meanwhile.
    """
    threads = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(pictures), desc="pictures", unit="", disable=None) as progress,
    ):
        for start in range(0, len(pictures), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            for picture, (data, extension, fault) in zip(
                chunk, pool.map(_read, chunk), strict=True
            ):
                progress.update()
                if fault:
                    report.skip("unreadable pictures", f"{picture.name} {fault}")
                else:
                    yield picture, data, extension


def _read(picture: Picture) -> tuple[bytes, str, str]:
    """Return (bytes, extension, "") of a picture, or the reason why it cannot be used."""
    if not 0 < picture.size <= MEMBER_LIMIT:
        return b"", "", f"has {picture.size} bytes"
    data = picture.read()
    try:
        return data, check_image(data), ""
    except ValueError as error:
        return b"", "", str(error)
