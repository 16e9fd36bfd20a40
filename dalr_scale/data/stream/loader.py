"""Batches for one rank: a map-style dataset over steps, read by worker processes.

A worker needs only the step number. Neither the number of workers nor their prefetched batches
change the batch of a step, and a resumed run starts at its step.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dalr_scale.data.shards.images import decode_image
from dalr_scale.data.stream.augment import Augment, sample_rng
from dalr_scale.data.stream.batch import BadRow, Batch, PackedBatch, pack
from dalr_scale.data.stream.order import StreamPlan, rank_rows
from dalr_scale.data.stream.prefetch import prefetch
from dalr_scale.data.stream.source import Source, Sources
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from dalr_scale.data.stream.records import Records

ImageTransform = Callable[[Image.Image], Tensor]
_PREFETCHED = 2  # batches that wait in this process


def tokenize(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, int64 [n, L], padded on the right.

    Sentences are cut to ``max_length`` tokens, special tokens included; L is the longest one's.
    """
    encoded = tokenizer(
        list(sentences),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    rows: list[list[int]] = encoded  # type: ignore[assignment]
    length = max(1, *map(len, rows))
    input_ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask)


@dataclass(frozen=True)
class LoaderOptions:
    """Which steps a loader yields, for which rank, and how rows become tensors.

    Attributes:
        total_steps: end of the run.
        max_length: tokens kept of a sentence, special tokens included.
        num_workers: worker processes; 0 reads in this process.
        start_step: first step, e.g. after a resume.
        rank: this process, 0 ... world_size - 1.
        world_size: number of processes; it must divide the global batch.
        image_transform: image to tensor, for sources that read images.
        augment: changes an image before the transform, with random numbers of the item.
        with_text: return the sentences too; otherwise stored token ids make reading them
            unnecessary.
        pin_memory: put batches into page-locked memory.
        prefetch: batches that each worker reads in advance.
    """

    total_steps: int
    max_length: int
    num_workers: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1
    image_transform: ImageTransform | None = None
    augment: Augment | None = None
    with_text: bool = True
    pin_memory: bool = False
    prefetch: int = 4


@dataclass(frozen=True)
class StepDataset(Dataset[Batch | UserError]):
    """Maps a step number to this rank's ``Batch``, or to the ``UserError`` that reading it raised.

    The error is returned, not raised, because a worker process would wrap it in its traceback;
    ``StepLoader`` raises it in the main process.
    """

    plan: StreamPlan
    sources: Sources
    tokenizer: PreTrainedTokenizerBase
    options: LoaderOptions

    def __len__(self) -> int:
        """Return the number of steps of the whole run."""
        return self.options.total_steps

    def __getitem__(self, step: int) -> Batch | UserError:
        """Read one step; the same step always gives the same batch."""
        try:
            return self._read(step)
        except UserError as error:
            return error

    def _read(self, step: int) -> Batch:
        kind = self.plan.kind(step)
        source = self.sources.of(kind)
        assert source is not None
        whole = self.plan.batch_ids(step)
        rows = rank_rows(len(whole), self.options.rank, self.options.world_size)
        ids = whole[rows]
        bad: list[BadRow] = []
        replacements = self.plan.num_replacements(kind)
        text = self.options.with_text or not source.has_token_ids
        for attempt in itertools.count(1):
            records = source.read(ids, text=text, strict=False)
            images = self._decode(step, source, ids, records)
            if not records.faults:
                return self._batch(step, ids, records, images, tuple(bad))
            bad += [BadRow(kind, int(ids[row]), why) for row, why in sorted(records.faults.items())]
            if attempt > replacements:
                raise UserError(bad[-1].why)
            for row in records.faults:
                ids[row] = self.plan.replacement(step, int(rows[row]), attempt)
        raise AssertionError("unreachable")

    def _batch(
        self,
        step: int,
        ids: np.ndarray,
        records: Records,
        images: Tensor | None,
        bad: tuple[BadRow, ...],
    ) -> Batch:
        if records.token_ids is not None:
            input_ids, mask = map(torch.from_numpy, records.token_ids)
        else:
            input_ids, mask = tokenize(self.tokenizer, records.sentences, self.options.max_length)
        found = () if records.token_features is None else records.token_features
        tokens = tuple(map(torch.from_numpy, found))
        return Batch(
            step=step,
            kind=self.plan.kind(step),
            item_ids=torch.from_numpy(ids),
            sentences=records.sentences if self.options.with_text else [],
            input_ids=input_ids,
            attention_mask=mask,
            image_ids=torch.from_numpy(records.image_ids),
            features={role: torch.from_numpy(rows) for role, rows in records.features.items()},
            token_features=tokens[:1],
            token_masks=tokens[1:],
            images=images,
            bad=bad,
        )

    def _decode(
        self, step: int, source: Source, ids: np.ndarray, records: Records
    ) -> Tensor | None:
        """Decode the images of the intact rows; an image that cannot be decoded is a fault."""
        if records.images is None or self.options.image_transform is None:
            return None
        decoded = []
        for row, (item, data) in enumerate(zip(ids.tolist(), records.images, strict=True)):
            if row in records.faults:
                continue
            try:
                decoded.append(self._image(step, item, data, self.options.image_transform))
            except ValueError as error:
                where = source.describe(item)
                records.faults[row] = f"{where}: the image {error}; prepare the shard again"
        return None if records.faults else torch.stack(decoded)

    def _image(self, step: int, item: int, data: bytes, transform: ImageTransform) -> Tensor:
        image = decode_image(data)
        if self.options.augment is not None:
            kind, epoch, _ = self.plan.position(step)
            rng = sample_rng(self.plan.seed, kind, epoch, item)
            image = self.options.augment(image, rng)
        return transform(image)


class StepLoader(DataLoader[Batch | PackedBatch | UserError]):
    """A DataLoader over a StepDataset that raises the errors that its workers returned."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches in step order.

        Raises:
            UserError: a batch cannot be read.
            RuntimeError: a worker process has died.
        """
        batches = cast("Iterator[Batch | PackedBatch | UserError]", super().__iter__())
        try:
            with closing(prefetch(batches, _PREFETCHED if self.num_workers else 0)) as received:
                for batch in received:
                    if isinstance(batch, UserError):
                        raise batch
                    yield batch.unpack() if isinstance(batch, PackedBatch) else batch
        except (ConnectionError, EOFError) as error:
            # The queue broke before the worker's exit was reported. The report interrupts this
            # sleep with an error that names the process.
            time.sleep(2)
            raise RuntimeError("a loader worker died while it sent a batch") from error


def make_loader(
    plan: StreamPlan, sources: Sources, tokenizer: PreTrainedTokenizerBase, options: LoaderOptions
) -> StepLoader:
    """Return a loader of one rank's batches for the steps start_step ... total_steps - 1.

    Args:
        plan: which items each step takes.
        sources: the streams that the plan was made for.
        tokenizer: the student's tokenizer; it needs a padding token.
        options: steps, rank, workers and what a batch holds.

    Raises:
        UserError: world size, lengths, steps or streams do not fit the plan.
    """
    _check(plan, sources, tokenizer, options)
    workers = options.num_workers
    if workers and options.start_step < options.total_steps:
        plan.prepare(options.start_step)  # once here; the workers inherit it
    return StepLoader(
        StepDataset(plan, sources, tokenizer, options),
        batch_size=None,
        sampler=range(options.start_step, options.total_steps),
        num_workers=workers,
        # without a batch size it gets one sample, not a list
        collate_fn=pack if workers else None,  # pyright: ignore[reportArgumentType]
        worker_init_fn=_start_worker,
        in_order=True,
        persistent_workers=workers > 0,
        prefetch_factor=options.prefetch if workers else None,
        pin_memory=options.pin_memory,
    )


def _check(
    plan: StreamPlan, sources: Sources, tokenizer: PreTrainedTokenizerBase, options: LoaderOptions
) -> None:
    rank, world_size = options.rank, options.world_size
    start_step, total_steps = options.start_step, options.total_steps
    if plan.global_batch % world_size:
        raise UserError(
            f"the global batch of {plan.global_batch} cannot be cut into {world_size} equal parts; "
            f"use a multiple of {world_size}, or another number of processes"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0 ... {world_size - 1}")
    if not 0 <= start_step <= total_steps:
        raise UserError(f"the run ends at step {total_steps}; it cannot start at step {start_step}")
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token; set one")
    for source, items in zip(sources, (plan.text_items, plan.pair_items), strict=True):
        if (source.num_items if source else 0) != items:
            raise ValueError("the plan was made for other sources")


def _start_worker(worker: int) -> None:  # noqa: ARG001 - called by torch with it
    """Set up a worker process: one tokenizer thread, and no reaction to foreign signals.

    A job manager signals the whole process group. Workers must ignore that, because the ranks save
    and stop together and still need their batches. They must exit on a SIGTERM from their parent,
    which sends it when it exits with a loader open.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()
    threading.Thread(target=_obey_parent, args=(parent,), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """Wait for SIGTERM and exit if the parent sent it; a signal handler cannot see the sender."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
