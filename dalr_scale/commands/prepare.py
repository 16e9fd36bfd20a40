"""``dalr-scale prepare``: raw images, captions and text to WebDataset shards.

Images with captions:

    dalr-scale prepare images/ --captions captions.csv --output shards/

COCO (``captions_train2017.json``) and Karpathy's files (``dataset_flickr30k.json``, one set of
shards per split) are caption files too. Text, one sentence a line:

    dalr-scale prepare sentences.txt.xz --output shards/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dalr_scale.data.prepare.pairs import PairOptions, list_images, prepare_pairs
from dalr_scale.data.prepare.report import Report
from dalr_scale.data.prepare.text import is_text_file, prepare_text
from dalr_scale.errors import UserError

_TEXT_MEMBERS_PER_SHARD = 64
_PAIRS_PER_SHARD = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0."""
    report = _prepare(_parser().parse_args(argv))
    print("\n".join(report.lines()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale prepare",
        description="Write images with captions, or text, to WebDataset shards and index them. "
        "img2dataset shards (jpg, txt, json) need no preparation.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        type=Path,
        help="with --captions: directories or tars of JPEG, PNG or WebP images; without: text "
        "files with one sentence a line (.txt, .jsonl, also .gz, .xz, .zst) or directories of them",
    )
    parser.add_argument("--output", required=True, type=Path, help="directory for the shards")
    parser.add_argument(
        "--captions",
        type=Path,
        help="CSV or TSV with the columns image and caption, Flickr token file, JSON lines, COCO's "
        "captions_*.json, or Karpathy's dataset_*.json",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        default=[],
        metavar="NAME",
        help="take these splits of a Karpathy file as one set (default: a set for each split)",
    )
    parser.add_argument("--images", type=Path, help="file naming the only images to take")
    parser.add_argument("--exclude", type=Path, help="file naming images to leave out")
    parser.add_argument("--prefix", help="start of the shard names (default: pairs or text)")
    parser.add_argument(
        "--samples-per-shard",
        type=_positive,
        help=f"images in a shard (default {_PAIRS_PER_SHARD}), or blocks of 1,024 sentences "
        f"(default {_TEXT_MEMBERS_PER_SHARD})",
    )
    parser.add_argument("--limit", type=_positive, help="take at most so many")
    parser.add_argument(
        "--max-chars",
        type=_positive,
        default=4000,
        help="cut captions and sentences after so many characters (default %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace shards of the same prefix in --output"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _prepare(args: argparse.Namespace) -> Report:
    for source in args.source:
        if not source.exists():
            raise UserError(f"{source}: no such file or directory; check the path")
    if args.captions is None:
        if args.images or args.exclude or args.split:
            raise UserError("--images, --exclude and --split choose images; give --captions too")
        return prepare_text(
            _text_files(args.source),
            args.output,
            prefix=args.prefix or "text",
            samples_per_shard=args.samples_per_shard or _TEXT_MEMBERS_PER_SHARD,
            limit=args.limit,
            max_chars=args.max_chars,
            overwrite=args.overwrite,
        )
    options = PairOptions(
        images=args.images,
        exclude=args.exclude,
        limit=args.limit,
        max_chars=args.max_chars,
        prefix=args.prefix or "pairs",
        samples_per_shard=args.samples_per_shard or _PAIRS_PER_SHARD,
        overwrite=args.overwrite,
        splits=tuple(args.split),
    )
    return prepare_pairs(args.source, args.captions, args.output, options)


def _text_files(sources: Sequence[Path]) -> list[Path]:
    """Return the text files among the sources; images without captions are refused."""
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.iterdir() if is_text_file(path))
            if not inside or _has_images(source):
                raise UserError(
                    f"{source}: has images or no text file (.txt, .jsonl, .gz, .xz, .zst); "
                    "for images give their captions with --captions FILE"
                )
            files += inside
        elif is_text_file(source):
            files.append(source)
        else:
            raise UserError(
                f"{source}: is no text file (.txt, .jsonl, .gz, .xz, .zst); for images give "
                "their captions with --captions FILE; finished shards only need dalr-scale index"
            )
    return files


def _has_images(directory: Path) -> bool:
    try:
        return bool(list_images([directory]))
    except UserError:
        return False
