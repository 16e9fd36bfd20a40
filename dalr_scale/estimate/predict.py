"""What a step needs: memory of a rank and bytes that it sends, before anything is trained.

Model states and traffic follow from the settings by arithmetic. The memory of the loss follows
from the code that computes it, so it is measured: the loss of two small batches is taken with all
live tensors counted, and the difference is what a row costs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from dalr_kernels.eager import chunked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dalr_scale.data.stream.batch import Batch
from dalr_scale.distributed.collectives import single_rank
from dalr_scale.engines.precision import resolve_precision
from dalr_scale.teachers.online import STORED

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from dalr_scale.config import Config
    from dalr_scale.models.dalr import DalrModel

FLOAT = 4
TRIAL_ROWS = (96, 192)
TRIAL_WORKSPACE = 64 * 2**10


@dataclass(frozen=True)
class Transfer:
    """What a row of the global batch costs on its way to every other rank, and back, in bytes.

    `width` is the length of the vector that arrives and is compared, 0 if none is.
    """

    name: str
    out: int
    back: int = 0
    width: int = 0


def number_bytes(config: Config) -> int:
    """Bytes of a weight, of its gradient and of a number that the student returns.

    Two only where an engine keeps the module itself in bf16, as DeepSpeed's do. DDP computes bf16
    under autocast: weights, gradients and the heads' outputs stay float32.
    """
    precision = resolve_precision(config.engine)
    if precision == "fp64":
        return 8
    return 2 if precision == "bf16" and config.engine.kind != "ddp" else FLOAT


def compared_bytes(config: Config) -> int:
    """Bytes of a number in the losses, which widen 16 bits to float32."""
    return max(number_bytes(config), FLOAT)


def chunks_of(config: Config, ranks: int) -> int:
    """Chunks in which a rank encodes its rows."""
    rows = config.batch.global_size // ranks
    return -(-rows // (config.batch.micro_size or rows))


def column_transfers(config: Config, model: DalrModel, *, paired: bool = True) -> list[Transfer]:
    """Everything that crosses between ranks for a batch of one kind, by name.

    Student columns go out as the engine's heads return them (`number_bytes`) and their gradients
    come back in float32, in fp64 runs in float64; stored teacher features go out as the float16
    that they are stored in. Token features are never sent: sentence vectors are sent to them, and
    softmax-weighted means come back.
    """
    needs, widths = model.spec.needs, model.widths
    student, compared = number_bytes(config), compared_bytes(config)
    transfers = [_returning(config, "z2", model.encoder.width), Transfer("row numbers", 16)]
    if needs.text and (paired or config.objective.distil_text_batches):
        pairs = zip(widths.text, config.teachers.text, strict=True)
        size = sum(width * _feature_bytes(spec) for width, spec in pairs)
        transfers.append(Transfer("text teachers", size, width=sum(widths.text)))
    if not paired:
        return transfers
    transfers += _image_wires(config, model)
    for width in model.token_widths if needs.tokens else ():
        # the mean and its weight come back; the largest logit of every row is agreed on
        out, back = student * width + compared, compared * (width + 2)
        transfers.append(Transfer("z1 for token teachers", out, back, width))
    return transfers


def _image_wires(config: Config, model: DalrModel) -> list[Transfer]:
    """What the cross-modal terms compare rows with."""
    needs, widths, teachers = model.spec.needs, model.widths, config.teachers
    student, compared = number_bytes(config), compared_bytes(config)
    transfers: list[Transfer] = []
    if hasattr(model, "image_grounding"):
        transfers.append(_returning(config, "u", model.grounding_width))
    if hasattr(model, "caption_grounding"):
        transfers.append(_returning(config, "u of captions", model.grounding_width))
    if needs.image_columns:
        transfers.append(_stored("images", widths.image, teachers.image))
    if needs.caption_columns:
        transfers.append(_stored("captions", widths.caption, teachers.caption))
    if needs.consistency_labels:
        width = model.consistency_width
        transfers.append(Transfer("aligned images", student * width, width=width))
    if needs.image_rows:
        transfers.append(Transfer("column statistics of L_CMA", 5 * compared, 5 * compared))
    return transfers


def _returning(config: Config, name: str, width: int) -> Transfer:
    """A student column, whose gradient comes back."""
    return Transfer(name, number_bytes(config) * width, compared_bytes(config) * width, width)


def _stored(name: str, width: int, spec: str) -> Transfer:
    return Transfer(name, width * _feature_bytes(spec), width=width)


def _feature_bytes(spec: str) -> int:
    return 2 if spec.startswith(STORED) else FLOAT


def column_traffic(
    config: Config, model: DalrModel, ranks: int, *, paired: bool = True
) -> dict[str, float]:
    """Bytes that a rank sends per step for its columns, by name (ring volumes)."""
    share = (ranks - 1) / ranks
    size = config.batch.global_size
    sent = {w.name: share * size * (w.out + w.back) for w in column_transfers(config, model)}
    if not paired:
        return {w.name: sent[w.name] for w in column_transfers(config, model, paired=False)}
    if model.spec.needs.consistency:
        widths = model.encoder.width, model.widths.image, model.consistency_width
        floats = 4 * (widths[0] + widths[2]) + 4 * (widths[1] + widths[2])
        if config.objective.consistency_weight > 0:
            floats += 4 * (widths[1] + widths[2])
        sent["normalisation statistics"] = 2 * share * floats * compared_bytes(config)
    return sent


def parameter_traffic(config: Config, model: DalrModel, ranks: int) -> float:
    """Bytes that a rank sends per step for gradients and weights: one reduction, one gather.

    ZeRO-3 gathers its weights for every forward and backward pass of a chunk instead.
    """
    parameters = sum(p.numel() for p in model.parameters())
    share = (ranks - 1) / ranks
    passes = 2 if config.engine.kind != "zero3" else 1 + 3 * chunks_of(config, ranks)
    return passes * share * parameters * number_bytes(config)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by purpose; the activations of one chunk come on top.

    `batch` is what a step reads of this rank's rows but for its token features; `loaded_features`
    are the float32 originals of stored features, from which a step makes the 16-bit ones that
    travel. Images for an online teacher are not counted.
    """

    weights: int
    gradients: int
    optimizer: int
    batch: int
    loaded_features: int
    token_features: int
    cached_states: int
    loss_vectors: int
    columns: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def plan_memory(
    config: Config, model: DalrModel, ranks: int, device: torch.device | None = None
) -> MemoryPlan:
    """Memory of one rank of a paired step, at its peak.

    ZeRO-1 shards the optimizer, ZeRO-2 also gradients once reduced (a step holds them whole while
    its chunks add up), ZeRO-3 also weights.

    Args:
        device: that the run will use; None: this host's.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in model.parameters())
    rows, size = config.batch.global_size // ranks, config.batch.global_size
    number, paired = number_bytes(config), bool(config.data.pairs)
    tokens = sum(_held_tokens(model, paired=paired)) * _token_positions(config)
    states = 2 * 2 * model.encoder.width * number  # of two views, and their gradients
    return MemoryPlan(
        weights=parameters * number // (ranks if config.engine.kind == "zero3" else 1),
        gradients=parameters * _gradient_bytes(config, ranks),
        optimizer=_optimizer_bytes(config, parameters, ranks, device),
        batch=rows * batch_bytes_per_row(config, model, paired=paired),
        loaded_features=rows * FLOAT * _stored_widths(config, model, paired=paired),
        token_features=rows * tokens * FLOAT,
        cached_states=states * rows,
        loss_vectors=rows * _vector_bytes(config, model, paired=paired),
        columns=0 if ranks == 1 else (size - rows) * _column_bytes(config, model, paired),
        workspace=chunked.default_workspace(device),
    )


def _gradient_bytes(config: Config, ranks: int) -> int:
    """Bytes a parameter of gradients and of what sums and averages them."""
    number = number_bytes(config)
    if config.engine.kind == "ddp":
        return number if ranks == 1 else 2 * number  # averaged in one flat copy
    # chunks add up in float32, beside gradients in bf16
    return number + (FLOAT if number < FLOAT and chunks_of(config, ranks) > 1 else 0)


def _optimizer_bytes(config: Config, parameters: int, ranks: int, device: torch.device) -> int:
    """AdamW's two moments, and DeepSpeed's float32 masters (kept beside float32 weights too)."""
    sharded = config.engine.kind != "ddp"
    if sharded and config.engine.offload_optimizer and device.type == "cuda":
        return 0  # in the host's memory
    moments = 2 if config.optim.name == "adamw" else 0
    each = moments * compared_bytes(config) + (FLOAT if sharded else 0)
    return parameters * each // (ranks if sharded else 1)


def batch_bytes_per_row(config: Config, model: DalrModel, *, paired: bool = True) -> int:
    """What a `Batch` holds for a row of full length, its token features (`MemoryPlan`) excepted.

    int64 token ids, mask and image number, a byte for each token of a teacher, and the features.
    """
    integers = 8 * (2 * config.data.max_length + 1)
    masks = len(_held_tokens(model, paired=paired)) * _token_positions(config)
    features = _features(config, model, paired=paired)
    return integers + masks + sum(width * _feature_bytes(spec) for spec, width in features)


def _held_tokens(model: DalrModel, *, paired: bool) -> tuple[int, ...]:
    """Widths of the token features of a batch."""
    return model.widths.tokens if paired and model.spec.needs.tokens else ()


def _token_positions(config: Config) -> int:
    return config.data.max_length - 1  # CLS has no token feature


def _features(config: Config, model: DalrModel, *, paired: bool) -> list[tuple[str, int]]:
    """Teacher and width of every pooled feature of a row."""
    needs, widths, teachers = model.spec.needs, model.widths, config.teachers
    found: list[tuple[str, int]] = []
    if needs.text and (paired or config.objective.distil_text_batches):
        found += zip(teachers.text, widths.text, strict=True)
    if paired and needs.image:
        found.append((teachers.image, widths.image))
    if paired and needs.caption:
        found.append((teachers.caption, widths.caption))
    return found


def _stored_widths(config: Config, model: DalrModel, *, paired: bool) -> int:
    features = _features(config, model, paired=paired)
    return sum(width for spec, width in features if spec.startswith(STORED))


def _vector_bytes(config: Config, model: DalrModel, *, paired: bool) -> int:
    """Vectors that a loss pass holds for a row beside its states, as measured in float32.

    Losses compute in float32 even behind a module in bf16, and in float64 in fp64 runs.
    """
    measured = max(_dtype(model).itemsize, FLOAT)
    states = 2 * 2 * model.encoder.width * measured
    live = max(0, loss_bytes_per_row(model, paired=paired) - states)
    return live * compared_bytes(config) // measured


def _column_bytes(config: Config, model: DalrModel, paired: bool) -> int:
    """A column of another rank: as it arrived, of unit length as compared, and its gradient."""
    number, compared = number_bytes(config), compared_bytes(config)
    total = 0
    for transfer in column_transfers(config, model, paired=paired):
        total += transfer.out + compared * transfer.width + transfer.back
        total += (
            compared * transfer.width if transfer.back and number < compared else 0
        )  # widened first
    return total


def loss_bytes_per_row(model: DalrModel, *, paired: bool = True) -> int:
    """Live bytes per row at the peak of a loss pass on one rank, the batch itself not counted."""
    peaks = []
    with single_rank(), chunked.limited_workspace(TRIAL_WORKSPACE):
        for rows in TRIAL_ROWS:
            shape = rows, model.encoder.width
            states = [torch.randn(shape, dtype=_dtype(model)).requires_grad_() for _ in range(2)]
            batch = random_batch(model, rows, paired=paired)
            with LiveBytes() as live:
                total, _ = model.loss(states, batch, step=0, offset=0)
                total.backward()
            peaks.append(live.peak)
            model.zero_grad(set_to_none=True)
    size = 2 * model.encoder.width * _dtype(model).itemsize  # the states were there before
    return (peaks[1] - peaks[0]) // (TRIAL_ROWS[1] - TRIAL_ROWS[0]) + size


def _dtype(model: DalrModel) -> torch.dtype:
    return next(model.parameters()).dtype


def random_batch(model: DalrModel, rows: int, *, paired: bool) -> Batch:
    """A batch for trials of the loss: features of the kinds and widths that a model reads."""
    needs, widths = model.spec.needs, model.widths
    texts = enumerate(widths.text if needs.text or not paired else ())
    features = {f"text{k}": torch.randn(rows, width) for k, width in texts}
    if paired and needs.image:
        features["image"] = torch.randn(rows, widths.image)
    if paired and needs.caption:
        features["caption"] = torch.randn(rows, widths.caption)
    ids = torch.zeros(rows, 1, dtype=torch.long)
    numbers = torch.arange(rows)
    return Batch(
        step=0,
        kind="pair" if paired else "text",
        item_ids=numbers,
        sentences=[],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        image_ids=numbers if paired else torch.full((rows,), -1),
        features={role: values.half() for role, values in features.items()},
        token_features=[torch.randn(rows, 2, width) for width in widths.tokens if paired],
        token_masks=[torch.ones(rows, 2) for _ in widths.tokens if paired],
    )


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
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive and not _owns(key, args) and not _owns(key, kwargs):
                self._alive.add(key)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def _owns(key: int, values: object) -> bool:
    """Whether one of an operator's arguments lies in the storage of this key."""
    return any(tensor.untyped_storage()._cdata == key for tensor in _tensors(values))


def _tensors(values: object) -> Iterator[Tensor]:
    """Tensors among the arguments or results of an operator, which are lists or tables at most.

    ``tree_leaves`` finds them too, at half of the start-up time of a small run.
    """
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
