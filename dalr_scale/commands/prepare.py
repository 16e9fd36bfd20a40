"""``dalr-scale prepare``: raw images, captions and text to WebDataset shards.

Images with captions:

    dalr-scale prepare images/ --captions captions.csv --output shards/

COCO (``captions_train2017.json``) and Karpathy's files (``dataset_flickr30k.json``, one set of
shards per split) are caption files too. Text, one sentence a line:

    dalr-scale prepare sentences.txt.xz --output shards/
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.data.prepare.pairs import PairOptions, prepare_pairs
from dalr_scale.data.prepare.text import TextOptions, prepare_text
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0."""
    args = _parser().parse_args(argv)
    for source in args.source:
        if not source.exists():
            raise UserError(f"{source}: no such file or directory; check the path")
    if args.captions is not None:
        report = prepare_pairs(args.source, args.captions, args.output, _pair_options(args))
    elif args.images or args.exclude or args.split:
        raise UserError("--images, --exclude and --split choose images; give --captions too")
    else:
        report = prepare_text(args.source, args.output, _text_options(args))
    print("\n".join(report.lines()))
    return 0


def _pair_options(args: argparse.Namespace) -> PairOptions:
    return PairOptions(
        images=args.images,
        exclude=args.exclude,
        limit=args.limit,
        max_chars=args.max_chars,
        prefix=args.prefix or PairOptions.prefix,
        samples_per_shard=args.samples_per_shard or PairOptions.samples_per_shard,
        overwrite=args.overwrite,
        splits=tuple(args.split),
    )


def _text_options(args: argparse.Namespace) -> TextOptions:
    return TextOptions(
        limit=args.limit,
        max_chars=args.max_chars,
        prefix=args.prefix or TextOptions.prefix,
        samples_per_shard=args.samples_per_shard or TextOptions.samples_per_shard,
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale prepare",
        description="Write images with captions, or text, to WebDataset shards and index them. "
        "img2dataset shards (jpg, txt, json) need no preparation.",
    )
    add = parser.add_argument
    add(
        "source", nargs="+", type=Path,
        help="with --captions: directories or tars of JPEG, PNG or WebP images; without: text "
        "files with one sentence a line (.txt, .jsonl, also .gz, .xz, .zst) or directories of them",
    )  # fmt: skip
    add("--output", required=True, type=Path, help="directory of the shards")
    add(
        "--captions", type=Path,
        help="CSV or TSV with the columns image and caption, Flickr token file, JSON lines, COCO's "
        "captions_*.json, or Karpathy's dataset_*.json",
    )  # fmt: skip
    add(
        "--split", nargs="+", default=[], metavar="NAME",
        help="take these splits of a Karpathy file as one set (default: a set for each split)",
    )  # fmt: skip
    add("--images", type=Path, help="file naming the only images to take")
    add("--exclude", type=Path, help="file naming images to leave out")
    add("--prefix", help="start of the shard names (default: pairs or text)")
    add(
        "--samples-per-shard", type=_positive,
        help=f"images in a shard (default {PairOptions.samples_per_shard}), or blocks of 1,024 "
        f"sentences (default {TextOptions.samples_per_shard})",
    )  # fmt: skip
    add("--limit", type=_positive, help="take at most so many")
    add(
        "--max-chars", type=_positive, default=PairOptions.max_chars,
        help="cut captions and sentences after so many characters (default %(default)s)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace shards of the same prefix in --output")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
