"""What a step needs: memory of a rank and bytes that it sends, before anything is trained.

Model states and traffic follow from the settings by arithmetic. The memory of the loss follows
from the code that computes it, so it is measured: the loss of two small batches is taken with all
live tensors counted, and the difference is what a row costs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from dalr_kernels import chunked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalr_scale.config import Config
from dalr_scale.dist.engine import resolve_precision
from dalr_scale.dist.gather import one_rank_alone
from dalr_scale.models.dalr import DalrModel, TeacherBatch
from dalr_scale.online_teachers import STORED

FLOAT = 4
TRIAL_ROWS = (96, 192)
TRIAL_WORKSPACE = 64 * 2**10


@dataclass(frozen=True)
class Wire:
    """What a row of the global batch costs on its way to every other rank, and back, in bytes."""

    name: str
    out: int
    back: int = 0


def column_wires(config: Config, model: DalrModel, *, paired: bool = True) -> list[Wire]:
    """Everything that crosses between ranks for a batch of one kind, by name.

    Student columns go out in the precision of the run and their gradients come back in float32;
    stored teacher features go out as the float16 that they are stored in. Token features never
    travel: sentence vectors visit them, and softmax-weighted means come back.
    """
    needs, widths, objective = model.spec.needs, model.widths, config.objective
    student = {"bf16": 2, "fp64": 8}.get(resolve_precision(config), FLOAT)
    wide = max(student, FLOAT)

    def returning(name: str, width: int) -> Wire:
        return Wire(name, student * width, wide * width)

    wires = [returning("z2", model.encoder.width), Wire("row numbers", 16)]
    if needs.text and (paired or objective.distil_text_batches):
        specs = config.teachers.text
        pairs = zip(widths.text, specs, strict=True)
        size = sum(width * _feature_bytes(spec) for width, spec in pairs)
        wires.append(Wire("text teachers", size))
    if not paired:
        return wires
    if hasattr(model, "image_grounding"):
        wires.append(returning("u", model.grounding_width))
    if hasattr(model, "caption_grounding"):
        wires.append(returning("u of captions", model.grounding_width))
    if needs.image_columns:
        wires.append(Wire("pictures", widths.image * _feature_bytes(config.teachers.image)))
    if needs.caption_columns:
        wires.append(Wire("captions", widths.caption * _feature_bytes(config.teachers.caption)))
    if needs.consistency_labels:
        wires.append(Wire("aligned pictures", student * model.consistency_width))
    if needs.image_rows:
        wires.append(Wire("column statistics of L_CMA", 5 * wide, 5 * wide))
    for width in _token_widths(config, model) if needs.tokens else ():
        # the mean and its weight come back; the largest logit of every row is agreed on
        wires.append(Wire("z1 for token teachers", student * width + wide, wide * (width + 2)))
    return wires


def _token_widths(config: Config, model: DalrModel) -> tuple[int, ...]:
    widths = model.widths.tokens
    return widths[:1] if config.objective.g2l_mix == "features" else widths


def _feature_bytes(spec: str) -> int:
    return 2 if spec.startswith(STORED) else FLOAT


def column_traffic(
    config: Config, model: DalrModel, ranks: int, *, paired: bool = True
) -> dict[str, float]:
    """Bytes that a rank sends per step for its columns, by name (ring volumes)."""
    share = (ranks - 1) / ranks
    size = config.batch.global_size
    sent = {w.name: share * size * (w.out + w.back) for w in column_wires(config, model)}
    if not paired:
        return {w.name: sent[w.name] for w in column_wires(config, model, paired=False)}
    if model.spec.needs.consistency:
        widths = model.encoder.width, model.widths.image, model.consistency_width
        floats = 4 * (widths[0] + widths[2]) + 4 * (widths[1] + widths[2])
        if config.objective.consistency_weight > 0:
            floats += 4 * (widths[1] + widths[2])
        sent["normalisation statistics"] = 2 * share * floats * FLOAT
    return sent


def parameter_traffic(config: Config, model: DalrModel, ranks: int) -> float:
    """Bytes that a rank sends per step for gradients and weights: one reduction, one gather.

    ZeRO-3 gathers its weights for every forward and backward pass of a chunk instead.
    """
    parameters = sum(p.numel() for p in model.parameters())
    share = (ranks - 1) / ranks
    size = 2 if resolve_precision(config) == "bf16" and config.engine.kind != "ddp" else FLOAT
    rows = config.batch.global_size // ranks
    chunks = -(-rows // (config.batch.micro_size or rows))
    passes = 2 if config.engine.kind != "zero3" else 1 + 3 * chunks
    return passes * share * parameters * size


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by purpose; the activations of one chunk come on top."""

    weights: int
    gradients: int
    optimizer: int
    cached_states: int
    loss_vectors: int
    columns: int
    token_features: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def linear(self) -> int:
        """The part that grows with the batch."""
        return self.cached_states + self.loss_vectors + self.columns + self.token_features


def plan_memory(config: Config, model: DalrModel, ranks: int) -> MemoryPlan:
    """Memory of one rank of a paired step.

    ZeRO-1 shards the optimizer, ZeRO-2 also gradients once reduced (a step holds them whole while
    its chunks add up), ZeRO-3 also weights.
    """
    parameters = sum(p.numel() for p in model.parameters())
    bf16 = resolve_precision(config) == "bf16"
    width = 2 if bf16 else FLOAT
    kind = config.engine.kind
    shards = 1 if kind == "ddp" else ranks
    masters = 0 if kind == "ddp" else FLOAT  # DeepSpeed keeps fp32 masters beside fp32 weights too
    rows, size = config.batch.global_size // ranks, config.batch.global_size
    paired = bool(config.data.pairs)
    states = 2 * 2 * model.encoder.width * FLOAT
    tokens = sum(model.widths.tokens) * (config.data.max_length - 1) if paired else 0  # CLS: none
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return MemoryPlan(
        weights=parameters * width // (ranks if kind == "zero3" else 1),
        gradients=parameters * width,
        optimizer=parameters * (8 + masters) // shards,
        cached_states=states * rows,
        loss_vectors=max(0, loss_bytes_per_row(model, paired=paired) - states) * rows,
        columns=0 if ranks == 1 else (size - rows) * _column_bytes(config, model, paired),
        token_features=rows * tokens * FLOAT,
        workspace=chunked.default_workspace(device),
    )


def _column_bytes(config: Config, model: DalrModel, paired: bool) -> int:
    """A column of another rank: as it arrived, of unit length in float32, and its gradient."""
    student = {"bf16": 2}.get(resolve_precision(config), FLOAT)
    total = 0
    for wire in column_wires(config, model, paired=paired):
        width = wire.back // FLOAT if wire.back else wire.out // 2
        total += wire.out + FLOAT * width + wire.back
        total += FLOAT * width if wire.back and student == 2 else 0
    return total


def loss_bytes_per_row(model: DalrModel, *, paired: bool = True) -> int:
    """Live bytes per row at the peak of a loss pass on one rank, the batch itself not counted."""
    peaks = []
    with one_rank_alone(), chunked.limited_workspace(TRIAL_WORKSPACE):
        for rows in TRIAL_ROWS:
            states = torch.randn(2, rows, model.encoder.width, dtype=_dtype(model))
            teachers = random_teachers(model, rows, paired=paired)
            with LiveBytes() as live:
                total, _ = model.loss(states.requires_grad_(), teachers, step=0, offset=0)
                total.backward()
            peaks.append(live.peak)
            model.zero_grad(set_to_none=True)
    size = 2 * model.encoder.width * FLOAT  # the states were there before
    return (peaks[1] - peaks[0]) // (TRIAL_ROWS[1] - TRIAL_ROWS[0]) + size


def _dtype(model: DalrModel) -> torch.dtype:
    return next(model.parameters()).dtype


def random_teachers(model: DalrModel, rows: int, *, paired: bool) -> TeacherBatch:
    """Features of the kinds and widths that a model reads, for trials."""
    needs, widths = model.spec.needs, model.widths
    if not paired:
        return TeacherBatch(torch.full((rows,), -1), text=_halves(rows, widths.text))
    return TeacherBatch(
        torch.arange(rows),
        True,
        torch.randn(rows, widths.image).half() if needs.image else None,
        torch.randn(rows, widths.caption).half() if needs.caption else None,
        _halves(rows, widths.text),
        [torch.randn(rows, 2, width) for width in widths.tokens],
        [torch.ones(rows, 2) for _ in widths.tokens],
    )


def _halves(rows: int, widths: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(rows, width).half() for width in widths]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make and that are still alive.

    Attributes:
        peak: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {s.untyped_storage()._cdata for s in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self._alive:
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
