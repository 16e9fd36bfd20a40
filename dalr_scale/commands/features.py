"""``dalr-scale features``: teacher features into feature shards next to the shards."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dalr_scale.data.shards.files import expand_shards
from dalr_scale.distributed.world import refuse_single_process
from dalr_scale.teachers.extract import FeatureRequest, TeacherSource, store_features

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0. Under a launcher this rank does its share of the shards."""
    refuse_single_process("dalr_scale features")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    args = _parser().parse_args(argv)
    store_features(
        expand_shards(args.shards),
        _request(args),
        rank=rank,
        world_size=world,
        progress=rank == 0 and not args.quiet,
    )
    return 0


def _request(args: argparse.Namespace) -> FeatureRequest:
    sources: dict[TeacherSource, object] = {
        "image": args.image_teacher,
        "caption": args.caption_teacher,
        "text": args.text_teacher,
        "npz": args.from_npz,
    }
    source: TeacherSource = next(kind for kind, place in sources.items() if place)
    return FeatureRequest(
        name=args.name,
        source=source,
        teacher=str(sources[source]),
        tokens=args.tokens,
        pooler=args.pooler,
        max_length=args.max_length,
        batch_size=args.batch_size,
        device=args.device,
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dalr-scale features",
        description="Compute teacher features and store them next to the shards.",
        epilog="Several processes: accelerate launch --use_deepspeed --num_processes N -m "
        "dalr_scale features ...",
    )
    add = parser.add_argument
    add("shards", nargs="+", help="shard files, directories, globs or brace ranges")
    add("--name", required=True, help="name of the feature set, as configurations refer to it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--image-teacher",
        metavar="PATH",
        help="open_clip directory, ARCH@FILE.safetensors or ARCH@TAG",
    )
    what.add_argument(
        "--caption-teacher", metavar="PATH", help="open_clip model whose text tower reads captions"
    )
    what.add_argument(
        "--text-teacher", metavar="PATH", help="Hugging Face directory or package:NAME/SUB"
    )
    what.add_argument("--from-npz", metavar="FILE", type=Path, help="arrays feat [n, d], names [n]")
    add("--pooler", choices=("cls_before_pooler", "cls", "mean"), help="pooler of --text-teacher")
    add("--tokens", action="store_true", help="store token features instead of sentence features")
    add("--max-length", type=int, help="tokens kept of a sentence (--text-teacher)")
    add("--batch-size", type=int, default=128, help="rows per forward pass (default 128)")
    add("--device", default=None, help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--overwrite", action="store_true", help="replace existing features of this name")
    add("--quiet", action="store_true", help="no progress bar")
    return parser
