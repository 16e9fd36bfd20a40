"""The evaluations of a run: tasks, and their computation by all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dalr_scale.distributed.world import World
from dalr_scale.engines.deepspeed import unsharded_loading
from dalr_scale.errors import UserError
from dalr_scale.eval.graded import load_graded, score_lexical
from dalr_scale.eval.retrieval import recall_at_k
from dalr_scale.eval.sts import STSTask, load_sts, score_sts
from dalr_scale.models.dalr import DalrModel
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.models.tokenizer import length_sorted_batches

if TYPE_CHECKING:
    from dalr_scale.config import EvalConfig
    from dalr_scale.data.stream.source import Source
    from dalr_scale.engines.protocol import AnyModule, P, T

DEV_GRADED, TEST_GRADED = "graded-dev", "graded-test"
RECALLS = (1, 5, 10)


class Forward(Protocol):
    """The part of an engine that evaluation uses."""

    @property
    def module(self) -> nn.Module: ...

    def encode(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    def apply(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...


@dataclass(frozen=True)
class HeldOut:
    """Held-out captions with the features of their images.

    sentences: n; image [m, d_v]; caption_to_image: n row numbers into `image`.
    """

    sentences: list[str]
    image: Tensor
    caption_to_image: Tensor


@dataclass(frozen=True)
class EvaluationSuite:
    """Tasks loaded before training, so that a missing file is reported early.

    Attributes:
        tasks: scored during training; `select` names the one that chooses the best encoder.
        final_tasks: scored before and after training.
        held_out: pairs for caption-image recall, before and after.
    """

    tasks: tuple[STSTask, ...]
    final_tasks: tuple[STSTask, ...]
    held_out: HeldOut | None
    select: str
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int
    world: World

    def score_dev(self, engine: Forward) -> dict[str, float]:
        """Spearman of every development task, in [-1, 1]; collective."""
        encode = partial(self.encode, engine)
        return {task.name: score_sts(encode, task) for task in self.tasks}

    def score_final(self, engine: Forward) -> dict[str, float]:
        """Development and final tasks, and recall; collective."""
        encode = partial(self.encode, engine)
        tasks = {task.name: task for task in (*self.tasks, *self.final_tasks)}
        scores = {name: score_sts(encode, task) for name, task in tasks.items()}
        return scores | self._recall(engine)

    def lexical_baselines(self) -> dict[str, float]:
        """Return the score of word overlap alone on each task."""
        tasks = {task.name: task for task in (*self.tasks, *self.final_tasks)}
        return {name: score_lexical(task) for name, task in tasks.items()}

    def encode(self, engine: Forward, sentences: Sequence[str]) -> Tensor:
        """Sentence states h of all sentences, float32 [n, H] on the CPU, on every rank.

        Every rank runs the same number of forward passes, as sharded parameters require.
        """
        batches = list(
            length_sorted_batches(
                self.tokenizer, sentences, max_length=self.max_length, batch_size=self.batch_size
            )
        )
        parts: list[tuple[list[int], Tensor]] = []
        with _evaluating(engine):
            for first in range(0, len(batches), self.world.size):
                number = first + self.world.rank
                chosen, ids, mask = batches[min(number, len(batches) - 1)]
                device = self.world.device
                states = engine.encode(encode_sentences, ids.to(device), mask.to(device))
                parts.append((chosen if number < len(batches) else [], states.float()))
        out = parts[0][1].new_zeros(len(sentences), parts[0][1].shape[1])
        for chosen, states in parts:
            if chosen:
                out[chosen] = states
        return self.world.sum_rows(out).cpu()

    def _recall(self, engine: Forward) -> dict[str, float]:
        if self.held_out is None or not hasattr(engine.module, "image_grounding"):
            return {}
        states = self.encode(engine, self.held_out.sentences).to(self.world.device)
        with _evaluating(engine):
            image = self.held_out.image.to(self.world.device)
            texts, images = engine.apply(DalrModel.ground, states, image)
        owner = self.held_out.caption_to_image
        return recall_at_k(texts.float().cpu(), images.float().cpu(), owner, RECALLS)


class DirectoryEngine:
    """An exported encoder with the interface of an engine, to score it with the same suite."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        with unsharded_loading():
            self.module = SentenceEncoder.from_directory(directory).to(device)

    def apply(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return function(self.module, *args, **kwargs)

    def encode(
        self, function: Callable[Concatenate[AnyModule, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return self.apply(function, *args, **kwargs)


def encode_sentences(module: DalrModel | SentenceEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Sentence states h [B, H] of a model, or of its encoder alone."""
    return module.encode(ids, mask) if isinstance(module, DalrModel) else module(ids, mask)


@contextlib.contextmanager
def _evaluating(engine: Forward) -> Iterator[None]:
    """Disable dropout and gradients inside; restore the module's mode afterwards."""
    before = engine.module.training
    engine.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.module.train(before)


@dataclass(frozen=True)
class EvaluationPaths:
    """Places of evaluation data.

    Attributes:
        data_root: directory with senteval/STS and senteval/SICK, where one is configured.
        path_of: fills in the placeholders of a configured path.
    """

    data_root: Path | None
    path_of: Callable[[str], Path]


def build_suite(
    options: EvalConfig,
    paths: EvaluationPaths,
    encoder: SentenceEncoder,
    held_out: Source | None,
    world: World,
) -> EvaluationSuite:
    """Load every task that the configuration names; sentences are cut at the encoder's limit.

    Args:
        options: the section of the configuration.
        paths: where the data is.
        encoder: its tokenizer and its longest input are used.
        held_out: pairs for caption-image recall.
        world: the ranks that share the work.

    Raises:
        UserError: a file is missing or malformed.
    """
    tasks = [_sts_task(paths.data_root, name) for name in options.tasks]
    if options.graded_dev:
        tasks.append(_graded(paths.path_of(options.graded_dev), DEV_GRADED))
    final = [_sts_task(paths.data_root, name) for name in options.final_tasks]
    if options.graded_test:
        final.append(_graded(paths.path_of(options.graded_test), TEST_GRADED))
    names = [task.name for task in tasks]
    select = options.select or (names[0] if names else "")
    return EvaluationSuite(
        tasks=tuple(tasks),
        final_tasks=tuple(final),
        held_out=read_held_out(held_out) if held_out is not None else None,
        select=select,
        tokenizer=encoder.tokenizer,
        batch_size=options.batch_size,
        max_length=encoder.max_length,
        world=world,
    )


def read_held_out(source: Source) -> HeldOut:
    """All captions of a pair source and one feature row for each of its images."""
    records = source.read(np.arange(source.num_items))
    _, first, owner = np.unique(records.image_ids, return_index=True, return_inverse=True)
    return HeldOut(
        records.sentences,
        torch.from_numpy(records.features["image"][first]),
        torch.from_numpy(owner.reshape(-1)),
    )


def _sts_task(root: Path | None, name: str) -> STSTask:
    if root is None:
        raise UserError(
            f"task {name} needs the data directory: set --data.root or the environment variable "
            "DALR_DATA (it holds senteval/STS and senteval/SICK)"
        )
    return load_sts(root, name)


def _graded(path: Path, name: str) -> STSTask:
    task = load_graded(path)
    return STSTask(name, task.pairs, task.scores)
