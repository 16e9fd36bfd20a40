"""Builds the data of the quickstart: shards, graded pairs, tokenizer, teacher, features.

Nothing is downloaded. The stages run one after the other and are recorded in `quickstart.json` when
they are complete: a second call does nothing, and after an interruption the open stage is repeated.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalr_scale.data.shards.features_store import features_path
from dalr_scale.data.shards.images import decode_image
from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards
from dalr_scale.data.stream.source import Source
from dalr_scale.errors import UserError
from dalr_scale.quickstart.captions import FRAMES, choose_mentioned, vocabulary, write_caption
from dalr_scale.quickstart.graded import graded_pairs
from dalr_scale.quickstart.scenes import Scene, partition, render
from dalr_scale.quickstart.sheet import contact_sheet

_SCHEMA = 1
_RECORD = "quickstart.json"
_SAMPLES_PER_SHARD = 1024
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Each purpose draws from its own stream, so that more of one thing changes nothing else.
_STREAMS = {name: i for i, name in enumerate(("train", "heldout", "text", "dev", "test"), start=1)}


@dataclass(frozen=True)
class QuickstartSpec:
    """Size of the data and of the teacher's training; the defaults are those of the recipe.

    Attributes:
        seed: of every draw and of the teacher's weights.
        train_scenes: captioned images for training, at most 4147.
        heldout_scenes: captioned images for the recall, at most 1383; their combinations of
            facts occur in no other stream but the test pairs.
        captions_per_scene: captions of an image, told with words of their own each.
        text_only_captions: sentences without images, about training scenes.
        told_share: probability that a caption mentions a fact that it may leave out.
        image_size: pixels of the square images.
        graded_pairs: pairs in each of the dev and the test file.
        teacher_steps: optimizer steps of the teacher.
        teacher_batch: images in one of them.
        teacher_lr: its peak learning rate.
        teacher_width: width of its shared space and text tower, a multiple of 32.
    """

    seed: int = 1
    train_scenes: int = 3000
    heldout_scenes: int = 400
    captions_per_scene: int = 4
    text_only_captions: int = 2048
    told_share: float = 0.75
    image_size: int = 48
    graded_pairs: int = 1000
    teacher_steps: int = 200
    teacher_batch: int = 128
    teacher_lr: float = 1e-3
    teacher_width: int = 128

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: naming the field and its limits.
        """
        if self.seed < 0:
            raise UserError(f"quickstart: seed = {self.seed}; choose 0 or more")
        train, _, test = (len(part) for part in partition(self.seed))
        limits = {
            "train_scenes": (2, train),
            "heldout_scenes": (1, test),
            "captions_per_scene": (1, 1000),
            "text_only_captions": (1, 10**7),
            "told_share": (0.0, 1.0),
            "image_size": (33, 512),
            "graded_pairs": (2, 10**6),
            "teacher_steps": (1, 10**6),
            "teacher_batch": (2, self.train_scenes),
            "teacher_width": (32, 1024),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                value = getattr(self, name)
                raise UserError(f"quickstart: {name} = {value}; choose {low} to {high}")
        if self.teacher_width % 32:
            raise UserError(
                f"quickstart: teacher_width = {self.teacher_width}; choose a multiple of 32"
            )


@dataclass(frozen=True)
class QuickstartData:
    """Paths of the data, and the seconds of each stage (none for stages found complete)."""

    train: list[Path]
    text: list[Path]
    heldout: list[Path]
    graded_dev: Path
    graded_test: Path
    tokenizer: Path
    teacher: Path
    seconds: dict[str, float] = field(default_factory=dict)


def build_quickstart(
    output: Path, spec: QuickstartSpec, *, progress: bool = True
) -> QuickstartData:
    """Write the quickstart's data, train its teacher and store the teacher's features.

    Written into `output`: `train-*.tar`, `heldout-*.tar` (jpg, captions, json), `text-*.tar`,
    `scenes.png` to look at, `graded-dev.jsonl`, `graded-test.jsonl`, `tokenizer/`, `teacher/`
    (open_clip), and next to the paired shards the feature sets `clip` (images), `clip-text`
    (captions) and, for training, `clip-tokens`. Data depend on `spec` alone; the teacher also on
    the machine's rounding.

    Args:
        output: directory, created when missing.
        spec: what to build.
        progress: print a line a stage and a progress bar for the long one.

    Raises:
        UserError: the directory holds the quickstart of another specification, or foreign shards.
    """
    with _only_builder(output):
        return _build(output, spec, progress)


@contextlib.contextmanager
def _only_builder(output: Path) -> Iterator[None]:
    """Lock the directory: one process builds, other processes wait (tasks of a job array)."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _build(output: Path, spec: QuickstartSpec, progress: bool) -> QuickstartData:
    record = _open_record(output, spec)
    data = QuickstartData(
        train=_names(output, "train", spec.train_scenes),
        text=[output / "text-000000.tar"],
        heldout=_names(output, "heldout", spec.heldout_scenes),
        graded_dev=output / "graded-dev.jsonl",
        graded_test=output / "graded-test.jsonl",
        tokenizer=output / "tokenizer",
        teacher=output / "teacher",
    )
    stages: dict[str, Callable[[QuickstartData, QuickstartSpec, bool], None]] = {
        "data": _draw_data,
        "tokenizer": _write_tokenizer,
        "teacher": _teach,
        "features": _store_features,
    }
    for number, (name, run) in enumerate(stages.items()):
        if name in record["finished"]:
            if not _missing(data, name):
                continue
            record["finished"] = list(stages)[:number]  # later stages depend on it
            _write_record(output, record)
        start = time.perf_counter()
        run(data, spec, progress)
        record["finished"] = list(stages)[: number + 1]
        _write_record(output, record)
        data.seconds[name] = time.perf_counter() - start
        if progress:
            print(f"quickstart: {name} ready after {data.seconds[name]:.1f} s", flush=True)
    return data


def _names(output: Path, prefix: str, samples: int) -> list[Path]:
    shards = -(-samples // _SAMPLES_PER_SHARD)
    return [output / f"{prefix}-{number:06d}.tar" for number in range(shards)]


def _open_record(output: Path, spec: QuickstartSpec) -> dict[str, Any]:
    """Read the record of complete stages, or create one."""
    path, wanted = output / _RECORD, dataclasses.asdict(spec)
    if not path.exists():
        if foreign := sorted(output.glob("*.tar")):
            raise UserError(
                f"{foreign[0]} was not written by the quickstart; choose another directory for the "
                "quickstart's shards (data.shards)"
            )
        _write_record(output, {"schema": _SCHEMA, "spec": wanted, "finished": []})
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record["schema"] == _SCHEMA and record["spec"] == wanted
        record["finished"] = list(record["finished"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove the directory to build it again") from error
    if not same:
        raise UserError(
            f"{output} holds a quickstart with other settings (see {path.name}); choose another "
            "directory (data.shards), or remove this one"
        )
    return record


def _write_record(output: Path, record: dict[str, Any]) -> None:
    temporary = output / f".{_RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(output / _RECORD)


def _missing(data: QuickstartData, stage: str) -> bool:
    """Whether a file that the stage wrote has been removed since."""
    files = {
        "data": [*data.train, *data.text, *data.heldout, data.graded_dev, data.graded_test],
        "tokenizer": [data.tokenizer / "tokenizer.json"],
        "teacher": [data.teacher / "model.safetensors", data.teacher / "open_clip_config.json"],
        "features": [
            features_path(shard, name)
            for name, shards in _feature_sets(data).items()
            for shard in shards
        ],
    }
    return not all(path.is_file() for path in files[stage])


def _feature_sets(data: QuickstartData) -> dict[str, list[Path]]:
    both = [*data.train, *data.heldout]
    return {"clip": both, "clip-text": both, "clip-tokens": data.train}


def _draw_data(data: QuickstartData, spec: QuickstartSpec, progress: bool) -> None:
    train, dev, test = partition(spec.seed)
    _write_pairs(data.train, "train", train[: spec.train_scenes], spec)
    _write_pairs(data.heldout, "heldout", test[: spec.heldout_scenes], spec)
    contact_sheet(data.train[0].parent / "scenes.png")
    rng = _rng(spec, "text")
    mentioned = rng.choice(train, spec.text_only_captions)
    sentences = (_caption(Scene.from_number(int(number)), spec, rng) for number in mentioned)
    per_member = max(1024, -(-spec.text_only_captions // 64))  # one shard for any number
    write_text_shards(sentences, data.text[0].parent, "text", per_member=per_member, overwrite=True)
    for path, name, scenes in ((data.graded_dev, "dev", dev), (data.graded_test, "test", test)):
        pairs = graded_pairs(scenes, spec.graded_pairs, spec.told_share, _rng(spec, name))
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def _rng(spec: QuickstartSpec, stream: str) -> np.random.Generator:
    return np.random.default_rng([spec.seed, _STREAMS[stream]])


def _caption(scene: Scene, spec: QuickstartSpec, rng: np.random.Generator) -> str:
    frame = FRAMES[rng.integers(len(FRAMES))]
    return write_caption(scene, choose_mentioned(rng, spec.told_share), frame, rng).text


def _write_pairs(
    shards: list[Path], prefix: str, numbers: np.ndarray, spec: QuickstartSpec
) -> None:
    rng = _rng(spec, prefix)
    with ShardSetWriter(
        shards[0].parent, prefix, samples_per_shard=_SAMPLES_PER_SHARD, overwrite=True
    ) as writer:
        for sample, number in enumerate(numbers.tolist()):
            scene, stream = Scene.from_number(number), io.BytesIO()
            image = render(scene, spec.image_size, rng)
            image.save(stream, "JPEG", quality=92, subsampling=0)
            captions = [_caption(scene, spec, rng) for _ in range(spec.captions_per_scene)]
            members = {
                "jpg": stream.getvalue(),
                "txt": "\n".join(captions).encode() + b"\n",
                "json": json.dumps({"scene": number, **dataclasses.asdict(scene)}).encode(),
            }
            writer.write(f"{prefix}{sample:06d}", members)


def _write_tokenizer(data: QuickstartData, spec: QuickstartSpec, progress: bool) -> None:
    from transformers import BertTokenizer

    words = (*_SPECIAL, *vocabulary())
    # `vocab`, not `vocab_file`: in transformers 5 the latter is ignored, and every word unknown.
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(data.tokenizer)


def _teach(data: QuickstartData, spec: QuickstartSpec, progress: bool) -> None:
    from dalr_scale.models.tokenizer import load_tokenizer
    from dalr_scale.quickstart.teachers import TeacherTraining, save_teacher, train_teacher

    tokenizer = load_tokenizer(data.tokenizer)
    images, captions = _read_pairs(data.train)
    with (
        _all_cores(),
        tqdm(total=spec.teacher_steps, desc="teacher", unit="step", disable=not progress) as bar,
    ):

        def on_step(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        settings = TeacherTraining(
            steps=spec.teacher_steps,
            batch_size=spec.teacher_batch,
            lr=spec.teacher_lr,
            width=spec.teacher_width,
            seed=spec.seed,
        )
        model, config = train_teacher(images, captions, tokenizer, settings, on_step)
    save_teacher(model, config, tokenizer, data.teacher)


def _read_pairs(shards: list[Path]) -> tuple[np.ndarray, list[list[str]]]:
    """Return the images of shards, uint8 [n, S, S, 3], and the captions of each."""
    source = Source(shards, with_images=True)
    records = source.read(np.arange(source.num_items))
    captions: list[list[str]] = [[] for _ in range(source.num_samples)]
    for sentence, sample in zip(records.sentences, records.image_ids.tolist(), strict=True):
        captions[sample].append(sentence)
    images = source.read_images(np.arange(source.num_samples))
    return np.stack([np.asarray(decode_image(image)) for image in images]), captions


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Use all cores in this process: the other ranks of the host wait for it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _store_features(data: QuickstartData, spec: QuickstartSpec, progress: bool) -> None:
    from dalr_scale.teachers.extract import FeatureRequest, store_features

    teacher = str(data.teacher)
    requests = [
        FeatureRequest("clip", "image", teacher, device="cpu", overwrite=True),
        FeatureRequest("clip-text", "caption", teacher, device="cpu", overwrite=True),
        FeatureRequest(
            "clip-tokens", "caption", teacher, tokens=True, device="cpu", overwrite=True
        ),
    ]
    sets = _feature_sets(data)
    with _all_cores(), contextlib.redirect_stdout(io.StringIO()):
        for request in requests:
            if request.name in sets:
                # all shards here, although the trainer that builds may be rank 0 of several
                store_features(sets[request.name], request)
