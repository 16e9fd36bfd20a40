"""Images and a caption file to shards of image-caption samples."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

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
from dalr_scale.data.shards.index_file import MEMBER_LIMIT
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.writer import ShardSetWriter
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_CHUNK = 256  # images in memory at a time


class ImageEntry(NamedTuple):
    """An image in a directory or a tar: its name there, and where its bytes are."""

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
    """Which images to take and how to store them.

    Attributes:
        images: list of the only images to take.
        exclude: list of images to leave out.
        limit: images to take at most.
        max_chars: longer captions are cut.
        prefix: start of the shard names.
        samples_per_shard: images in a shard.
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
    """Write images with their captions to shards and index them.

    A sample is one image, stored byte for byte as it is, and its captions, one a line. Images
    are decoded once to find damaged ones. Samples are written in an order drawn from a hash of
    their keys, so that every shard is a mixture and the bytes are the same each time. Where the
    caption file has splits and none is chosen, each becomes a separate set, ``PREFIX-SPLIT``.
    An interrupted run continues after its last complete shard.

    Args:
        sources: directories (searched through) and uncompressed tars of images.
        captions: see ``read_captions``.
        output: directory of the shards.
        options: which images to take and how to store them.

    Raises:
        UserError: no image, no caption, lists that do not match, or nothing readable.
    """
    report = Report()
    writers = {"": _writer(output, options)}  # refuses an existing set before anything is read
    found = read_captions(captions, report, max_chars=options.max_chars)
    if found.splits and not options.splits:
        names = sorted(set(found.splits.values()))
        sets = {name: replace(options, prefix=f"{options.prefix}-{name}") for name in names}
        writers = {name: _writer(output, own) for name, own in sets.items()}
    images = list_images(sources)
    texts = _join(images, found.texts, captions, sources, report)
    lookup = _Lookup(images)
    chosen = _choose(texts, lookup, options, report)
    split_of = _splits(found, lookup, options, captions)
    chosen = [image for image in chosen if split_of is None or image in split_of]
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
) -> dict[ImageEntry, str] | None:
    """Return the split of each chosen image; None for files without splits."""
    known = set(found.splits.values())
    for name in options.splits:
        if name not in known:
            has = ", ".join(sorted(known)) or "no splits"
            raise UserError(f"{captions}: has no split {name!r}, but {has}")
    if not known:
        return None
    wanted = set(options.splits) or known
    pairs = ((lookup.find(name), split) for name, split in found.splits.items() if split in wanted)
    return {image: split for image, split in pairs if image is not None}


def _write_set(
    writer: ShardSetWriter,
    chosen: list[ImageEntry],
    texts: Mapping[ImageEntry, list[str]],
    options: PairOptions,
    report: Report,
    sources: Sequence[Path],
) -> None:
    """Write one set of shards, continuing an interrupted run of the same set."""
    keys = _unique_keys(chosen)
    order = sorted(chosen, key=lambda image: _shuffle_key(keys[image]))[: options.limit]
    own = Report()
    with writer.resuming(_job_hash(order, keys, texts)):
        done = int(writer.progress.get("images_seen", 0))
        own.restore(writer.progress.get("report", {}))
        for seen, (image, data, extension) in _verified(order, done, own):
            lines = "".join(f"{text}\n" for text in texts[image])
            members = {extension: data, "txt": lines.encode("utf-8", "replace")}
            writer.write(keys[image], members)
            own.written["images"] += 1
            own.written["captions"] += len(texts[image])
            if writer.is_full:
                writer.commit({"images_seen": seen, "report": own.counts()})
        if not own.written["images"]:
            raise UserError(
                f"{sources[0]}: none of the {len(order)} chosen images can be read; "
                "give JPEG, PNG or WebP images"
            )
    report.add(own)
    report.shards += writer.shards


def _job_hash(
    order: Sequence[ImageEntry],
    keys: Mapping[ImageEntry, str],
    texts: Mapping[ImageEntry, list[str]],
) -> str:
    """Return a hash of everything that determines the bytes of a set, without opening images."""
    times = {path: path.stat().st_mtime_ns for path in {image.path for image in order}}
    found = hashlib.sha256()
    for image in order:
        row = keys[image], image.name, image.size, times[image.path], texts[image]
        found.update(repr(row).encode("utf-8", "replace"))
    return found.hexdigest()


def list_images(sources: Sequence[Path]) -> list[ImageEntry]:
    """List the images of directories and tars, sorted by name.

    Raises:
        UserError: a source is missing or damaged, has no image, or a name occurs twice.
    """
    found: dict[str, ImageEntry] = {}
    for source in sources:
        listed = list(_in_directory(source) if source.is_dir() else _in_tar(source))
        if not listed:
            raise UserError(f"{source}: has no image (.jpg, .jpeg, .png, .webp)")
        for image in listed:
            if found.setdefault(image.name, image) is not image:
                raise UserError(f"{source}: {image.name!r} is in another source too; keep one")
    return [found[name] for name in sorted(found)]


def has_images(directory: Path) -> bool:
    """Whether a directory holds images that ``list_images`` accepts."""
    try:
        return bool(list_images([directory]))
    except UserError:
        return False


def _is_image(name: str) -> bool:
    # Some systems write files that begin with a dot next to the real ones.
    base = name.rpartition("/")[2]
    return base.lower().endswith(_SUFFIXES) and not base.startswith(".")


def _in_directory(directory: Path) -> Iterator[ImageEntry]:
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if _is_image(path.name) and path.is_file():
            # A link may lead anywhere; what it leads to outside was not given as a source.
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                continue
            name = path.relative_to(directory).as_posix()
            yield ImageEntry(name, path, 0, path.stat().st_size)


def _in_tar(path: Path) -> Iterator[ImageEntry]:
    for member in walk_tar(path, extensions=None):
        if _is_image(member.name):
            yield ImageEntry(member.name, path, member.offset, member.size)


class _Lookup:
    """Finds an image by its name in the source, else by base name, else without the suffix."""

    def __init__(self, images: Iterable[ImageEntry]) -> None:
        self._exact: dict[str, ImageEntry] = {}
        self._loose: dict[str, ImageEntry | None] = {}
        for image in images:
            base = PurePosixPath(image.name)
            self._exact[image.name] = image
            for name in (base.name, base.stem):
                # None marks a name that fits several images.
                other = self._loose.setdefault(name, image)
                self._loose[name] = image if other == image else None

    def find(self, name: str) -> ImageEntry | None:
        found = self._exact.get(name.removeprefix("./"))
        return found or self._loose.get(PurePosixPath(name).name)


def _join(
    images: list[ImageEntry],
    captions: Mapping[str, list[str]],
    captions_file: Path,
    sources: Sequence[Path],
    report: Report,
) -> dict[ImageEntry, list[str]]:
    """Return the captions of each image; refuse lists that have no image in common."""
    lookup = _Lookup(images)
    texts: dict[ImageEntry, list[str]] = {}
    for name, lines in captions.items():
        image = lookup.find(name)
        if image is None:
            report.skip("captions without an image", name, len(lines))
        else:
            texts.setdefault(image, []).extend(lines)
    if not texts:
        raise UserError(
            f"{captions_file}: none of its images (e.g. {next(iter(captions))!r}) is among the "
            f"{len(images)} images of {sources[0]} (e.g. {images[0].name!r}); "
            "give the captions of these images"
        )
    for image in images:
        if image not in texts:
            report.skip("images without captions", image.name)
    return texts


def _choose(
    texts: Mapping[ImageEntry, list[str]], lookup: _Lookup, options: PairOptions, report: Report
) -> list[ImageEntry]:
    """Apply the lists of images to take and images to leave out."""
    keep = _listed(options.images, lookup, report)
    drop = _listed(options.exclude, lookup, report) or set()
    chosen = []
    for image in texts:
        if image in drop:
            report.skip("images named in the exclude list", image.name)
        elif keep is not None and image not in keep:
            report.skip("images not named in the image list", image.name)
        else:
            chosen.append(image)
    if not chosen:
        raise UserError(f"{options.images or options.exclude}: leaves no image with a caption")
    return chosen


def _listed(path: Path | None, lookup: _Lookup, report: Report) -> set[ImageEntry] | None:
    """Return the images that a list names; refuse a list without a match (a wrong file)."""
    if path is None:
        return None
    names = read_names(path)
    found = set()
    for name in names:
        image = lookup.find(name)
        if image is None:
            report.skip(f"names in {path.name} without an image", name)
        else:
            found.add(image)
    if not found:
        raise UserError(f"{path}: names no image of the source (e.g. {names[0]!r}); check it")
    return found


def _unique_keys(images: Iterable[ImageEntry]) -> dict[ImageEntry, str]:
    """Return a sample key for each image, from its name; equal keys get a number."""
    keys: dict[ImageEntry, str] = {}
    used: set[str] = set()
    for image in sorted(images):
        plain = sample_key(image.name)
        key, number = plain, 1
        while key in used:
            number += 1
            key = f"{plain}-{number}"
        used.add(key)
        keys[image] = key
    return keys


def _shuffle_key(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _verified(
    images: Sequence[ImageEntry], done: int, report: Report
) -> Iterator[tuple[int, tuple[ImageEntry, bytes, str]]]:
    """Yield (images seen, (image, bytes, extension)) of the readable ones, in order.

    Decoding runs in threads, since Pillow releases the interpreter lock meanwhile.
    """
    threads = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(images), initial=done, desc="images", unit="", disable=None) as progress,
    ):
        for start in range(done, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            for number, (image, (data, extension, fault)) in enumerate(
                zip(chunk, pool.map(_read, chunk), strict=True), start + 1
            ):
                progress.update()
                if fault:
                    report.skip("unreadable images", f"{image.name} {fault}")
                else:
                    yield number, (image, data, extension)


def _read(image: ImageEntry) -> tuple[bytes, str, str]:
    """Return (bytes, extension, "") of an image, or the reason why it cannot be used."""
    if not 0 < image.size <= MEMBER_LIMIT:
        return b"", "", f"has {image.size} bytes"
    data = image.read()
    try:
        return data, check_image(data), ""
    except ValueError as error:
        return b"", "", str(error)
