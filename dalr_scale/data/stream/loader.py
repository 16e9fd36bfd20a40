"""Batches for one rank: a map-style dataset over steps, read by worker processes.

A step number is all that a worker needs, so the number of workers and what they have read ahead
never change what a step sees, and a resumed run simply starts at its step.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

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
from dalr_scale.data.stream.source import Records, Source
from dalr_scale.errors import UserError

ImageTransform = Callable[[Image.Image], Tensor]
T = TypeVar("T")
_log = logging.getLogger(__name__)
_RECEIVED = 2  # batches that wait in this process
_SLOW = 10.0  # seconds of waiting for a batch before a warning
_LEAVE = 5.0  # seconds for the thread to end; it may wait for a worker


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
class StepDataset(Dataset):
    """Maps a step number to this rank's ``Batch``, or to the ``UserError`` that reading it gave.

    The error is returned, not raised, because a worker process would wrap it in its traceback;
    ``StepLoader`` raises it in the main process.
    """

    plan: StreamPlan
    text: Source | None
    pairs: Source | None
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    rank: int
    world_size: int
    total_steps: int
    image_transform: ImageTransform | None = None
    with_text: bool = True
    augment: Augment | None = None

    def __len__(self) -> int:
        """Return the number of steps of the whole run."""
        return self.total_steps

    def __getitem__(self, step: int) -> Batch | UserError:
        """Read one step; the same step always gives the same batch."""
        try:
            return self._read(step)
        except UserError as error:
            return error

    def _read(self, step: int) -> Batch:
        kind = self.plan.kind(step)
        source = self.pairs if kind == "pair" else self.text
        assert source is not None
        whole = self.plan.batch_ids(step)
        rows = rank_rows(len(whole), self.rank, self.world_size)
        ids = whole[rows]
        bad: list[BadRow] = []
        stand_ins = self.plan.substitutes(kind)
        for attempt in itertools.count(1):
            records = source.read(ids, text=self._reads_text(source), strict=False)
            images, faults = self._decode(step, source, ids, records)
            if not faults:
                return self._batch(step, ids, records, images, tuple(bad))
            bad += [BadRow(kind, int(ids[row]), why) for row, why in sorted(faults.items())]
            if attempt > stand_ins:
                raise UserError(bad[-1].why)
            for row in faults:
                ids[row] = self.plan.substitute(step, int(rows[row]), attempt)
        raise AssertionError("unreachable")

    def _reads_text(self, source: Source) -> bool:
        return self.with_text or not source.has_ids

    def _batch(
        self,
        step: int,
        ids: np.ndarray,
        records: Records,
        images: Tensor | None,
        bad: tuple[BadRow, ...],
    ) -> Batch:
        if records.encoded is not None:
            input_ids, mask = map(torch.from_numpy, records.encoded)
        else:
            input_ids, mask = tokenize(self.tokenizer, records.sentences, self.max_length)
        tokens = () if records.tokens is None else tuple(map(torch.from_numpy, records.tokens))
        return Batch(
            step=step,
            kind=self.plan.kind(step),
            item_ids=torch.from_numpy(ids),
            sentences=records.sentences if self.with_text else [],
            input_ids=input_ids,
            attention_mask=mask,
            image_ids=torch.from_numpy(records.image_ids),
            features={role: torch.from_numpy(rows) for role, rows in records.features.items()},
            tokens=tokens[:1],
            token_masks=tokens[1:],
            images=images,
            bad=bad,
        )

    def _decode(
        self, step: int, source: Source, ids: np.ndarray, records: Records
    ) -> tuple[Tensor | None, dict[int, str]]:
        """Decode the pictures of the rows that are sound; return them and all faults."""
        faults = dict(records.faults)
        if records.images is None or self.image_transform is None:
            return None, faults
        decoded = []
        for row, (item, data) in enumerate(zip(ids.tolist(), records.images, strict=True)):
            if row in faults:
                continue
            try:
                decoded.append(self._picture(step, item, data))
            except ValueError as error:
                where = source.describe(item)
                faults[row] = f"{where}: the picture {error}; prepare the shard again"
        return None if faults else torch.stack(decoded), faults

    def _picture(self, step: int, item: int, data: bytes) -> Tensor:
        assert self.image_transform is not None
        picture = decode_image(data)
        if self.augment is not None:
            kind, epoch, _ = self.plan.position(step)
            picture = self.augment(picture, sample_rng(self.plan.seed, kind, epoch, item))
        return self.image_transform(picture)


class StepLoader(DataLoader):
    """A DataLoader over a StepDataset that raises the errors its workers met."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches in step order.

        Raises:
            UserError: a batch cannot be read.
            RuntimeError: a worker process has died.
        """
        batches: Iterator[Any] = super().__iter__()
        try:
            with closing(ahead(batches, _RECEIVED if self.num_workers else 0)) as received:
                for batch in received:
                    if isinstance(batch, UserError):
                        raise batch
                    yield batch.unpack() if isinstance(batch, PackedBatch) else batch
        except (ConnectionError, EOFError) as error:
            # The queue broke before the worker's death was reported. The report interrupts this
            # sleep with an error that names the process.
            time.sleep(2)
            raise RuntimeError("a loader worker died while it sent a batch") from error


def ahead(items: Iterator[T], count: int) -> Generator[T, None, None]:
    """Yield ``items``, which a thread takes up to ``count`` items before they are asked for.

    A batch that a worker has finished is not here yet: its memory is received from the worker,
    which answers when it is scheduled. On a busy host a step would wait for that. With a count of 0
    there is no thread.
    """
    if not count:
        yield from items
        return
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(count)
    stopped = threading.Event()

    def take() -> None:
        try:
            while room.acquire() and not stopped.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # StopIteration too: the user of the items raises it
            ready.put((None, error))

    thread = threading.Thread(target=take, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = _patiently(ready)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        room.release()
        thread.join(_LEAVE)


def _patiently(ready: queue.SimpleQueue[T]) -> T:
    """Wait for an item, and say when that takes long; ending the run is the watchdog's part."""
    started = time.monotonic()
    while True:
        try:
            return ready.get(timeout=_SLOW)
        except queue.Empty:
            waited = time.monotonic() - started
            _log.warning("no batch for %.0f s: slow storage, or too few data.workers", waited)


def make_loader(
    plan: StreamPlan,
    text: Source | None,
    pairs: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int,
    world_size: int,
    start_step: int,
    total_steps: int,
    max_length: int,
    num_workers: int,
    image_transform: ImageTransform | None = None,
    augment: Augment | None = None,
    with_text: bool = True,
    pin_memory: bool = False,
    prefetch: int = 4,
) -> StepLoader:
    """Return a loader of this rank's batches for the steps start_step ... total_steps - 1.

    Args:
        plan: which items each step takes.
        text: the text stream, or None.
        pairs: the pair stream, or None.
        tokenizer: the student's tokenizer; it needs a padding token.
        rank: this process, 0 ... world_size - 1.
        world_size: processes; it must divide the global batch.
        start_step: first step, e.g. after a resume.
        total_steps: end of the run.
        max_length: tokens kept of a sentence, special tokens included.
        num_workers: worker processes; 0 reads in this process.
        image_transform: picture to tensor, for sources that read images.
        augment: changes a picture before the transform, by random numbers of its own.
        with_text: give the sentences too; stored token ids make them superfluous otherwise.
        pin_memory: put batches into page-locked memory.
        prefetch: batches each worker reads ahead.

    Raises:
        UserError: world size, lengths, steps or streams do not fit the plan.
    """
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
    for source, items in ((text, plan.text_items), (pairs, plan.pair_items)):
        if (source.num_items if source else 0) != items:
            raise ValueError("the plan was made for other sources")
    if num_workers and start_step < total_steps:
        plan.prepare(start_step)  # once here; the workers inherit it
    dataset = StepDataset(
        plan,
        text,
        pairs,
        tokenizer,
        max_length,
        rank,
        world_size,
        total_steps,
        image_transform,
        with_text,
        augment,
    )
    return StepLoader(
        dataset,
        batch_size=None,
        sampler=range(start_step, total_steps),
        num_workers=num_workers,
        collate_fn=pack if num_workers else None,
        worker_init_fn=_start_worker,
        in_order=True,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
    )


def _start_worker(worker: int) -> None:
    """Set up a worker process: one tokenizer thread, and signals are the main process's business.

    A job manager signals the whole process group. Workers must not act on it (the ranks save and
    stop together, and still need their batches), but they must obey their own parent, which ends
    workers with SIGTERM when it exits with a loader open.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()
    threading.Thread(target=_obey_parent, args=(parent,), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """Wait for SIGTERM and leave when it came from the parent (a handler would not know)."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
