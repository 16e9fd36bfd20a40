"""Pictures and a caption file to shards of image-caption samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from dalr_scale.data.prepare.captions import Captions, read_captions, read_names
from dalr_scale.data.prepare.report import Report
from dalr_scale.data.shards.files import (
    IMAGE_EXTENSIONS,
    open_regular,
    read_exactly,
    sample_key,
    walk_tar,
)
from dalr_scale.data.shards.images import check_image
from dalr_scale.data.shards.index import ensure_index
from dalr_scale.data.shards.index_file import MEMBER_LIMIT
from dalr_scale.data.shards.writer import ShardSetWriter
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
        splits: the only splits to take, of a caption file that has some, all in one set.
    """

    images: Path | None = None
    exclude: Path | None = None
    limit: int | None = None
    max_chars: int = 4000
    prefix: str = "pairs"
    samples_per_shard: int = 1000
    overwrite: bool = False
    splits: tuple[str, ...] = ()


def prepare_pairs(
    sources: Sequence[Path], captions: Path, output: Path, options: PairOptions
) -> Report:
    """Write pictures with their captions to shards and index them.

    A sample is one picture, stored byte for byte as it is, and its captions, one a line. Pictures
    are decoded once to find damaged ones. Samples are written in an order drawn from a hash of
    their keys, so that every shard is a mixture and the bytes are the same each time. Where the
    caption file has splits and none is chosen, each becomes a set of its own, ``PREFIX-SPLIT``.
    An interrupted run is taken up at its last complete shard.

    Args:
        sources: folders (searched through) and uncompressed tars of pictures.
        captions: see ``read_captions``.
        output: folder of the shards.
        options: what to take and how to store it.

    Raises:
        UserError: no picture, no caption, lists that do not match, or nothing readable.
    """
    report = Report()
    writers = {"": _writer(output, options)}  # refuses an existing set before anything is read
    found = read_captions(captions, report, max_chars=options.max_chars)
    if found.splits and not options.splits:
        names = sorted(set(found.splits.values()))
        sets = {name: replace(options, prefix=f"{options.prefix}-{name}") for name in names}
        writers = {name: _writer(output, own) for name, own in sets.items()}
    pictures = list_pictures(sources)
    texts = _join(pictures, found.texts, captions, sources, report)
    lookup = _Lookup(pictures)
    chosen = _choose(texts, lookup, options, report)
    split_of = _splits(found, lookup, options, captions)
    chosen = [picture for picture in chosen if split_of is None or picture in split_of]
    for name, writer in writers.items():
        mine = [p for p in chosen if not name or (split_of and split_of[p] == name)]
        if mine or not name:
            _write_set(writer, mine, texts, options, report, sources)
    for shard in report.shards:
        ensure_index(shard)
    return report


def _writer(output: Path, options: PairOptions) -> ShardSetWriter:
    return ShardSetWriter(
        output,
        options.prefix,
        samples_per_shard=options.samples_per_shard,
        overwrite=options.overwrite,
    )


def _splits(
    found: Captions, lookup: _Lookup, options: PairOptions, captions: Path
) -> dict[Picture, str] | None:
    """The split of each picture that is wanted; None for files without splits."""
    known = set(found.splits.values())
    for name in options.splits:
        if name not in known:
            has = ", ".join(sorted(known)) or "no splits"
            raise UserError(f"{captions}: has no split {name!r}, but {has}")
    if not known:
        return None
    wanted = set(options.splits) or known
    pairs = ((lookup.find(name), split) for name, split in found.splits.items() if split in wanted)
    return {picture: split for picture, split in pairs if picture is not None}


def _write_set(
    writer: ShardSetWriter,
    chosen: list[Picture],
    texts: Mapping[Picture, list[str]],
    options: PairOptions,
    report: Report,
    sources: Sequence[Path],
) -> None:
    """Write one set of shards, going on where an interrupted run of the same set stopped."""
    keys = _unique_keys(chosen)
    order = sorted(chosen, key=lambda picture: _shuffle_key(keys[picture]))[: options.limit]
    own = Report()
    with writer.resuming(_job_hash(order, keys, texts)):
        done = int(writer.progress.get("pictures_seen", 0))
        own.restore(writer.progress.get("report", {}))
        for seen, (picture, data, extension) in _verified(order, done, own):
            lines = "".join(f"{text}\n" for text in texts[picture])
            members = {extension: data, "txt": lines.encode("utf-8", "replace")}
            writer.write(keys[picture], members)
            own.written["pictures"] += 1
            own.written["captions"] += len(texts[picture])
            if writer.is_full:
                writer.commit({"pictures_seen": seen, "report": own.counts()})
        if not own.written["pictures"]:
            raise UserError(
                f"{sources[0]}: none of the {len(order)} chosen pictures can be read; "
                "give JPEG, PNG or WebP pictures"
            )
    report.add(own)
    report.shards += writer.shards


def _job_hash(
    order: Sequence[Picture], keys: Mapping[Picture, str], texts: Mapping[Picture, list[str]]
) -> str:
    """Changes with everything that decides the bytes of a set, as far as it shows unopened."""
    times = {path: path.stat().st_mtime_ns for path in {picture.path for picture in order}}
    found = hashlib.sha256()
    for picture in order:
        row = keys[picture], picture.name, picture.size, times[picture.path], texts[picture]
        found.update(repr(row).encode("utf-8", "replace"))
    return found.hexdigest()


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
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if _is_picture(path.name) and path.is_file():
            # A link may lead anywhere; what it leads to outside was not given as a source.
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                continue
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


def _verified(
    pictures: Sequence[Picture], done: int, report: Report
) -> Iterator[tuple[int, tuple[Picture, bytes, str]]]:
    """Yield (pictures seen, (picture, bytes, extension)) of the readable ones, in order.

    Decoding runs in threads, since Pillow releases the interpreter lock meanwhile.
    """
    threads = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(pictures), initial=done, desc="pictures", unit="", disable=None) as progress,
    ):
        for start in range(done, len(pictures), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            for number, (picture, (data, extension, fault)) in enumerate(
                zip(chunk, pool.map(_read, chunk), strict=True), start + 1
            ):
                progress.update()
                if fault:
                    report.skip("unreadable pictures", f"{picture.name} {fault}")
                else:
                    yield number, (picture, data, extension)


def _read(picture: Picture) -> tuple[bytes, str, str]:
    """Return (bytes, extension, "") of a picture, or the reason why it cannot be used."""
    if not 0 < picture.size <= MEMBER_LIMIT:
        return b"", "", f"has {picture.size} bytes"
    data = picture.read()
    try:
        return data, check_image(data), ""
    except ValueError as error:
        return b"", "", str(error)
