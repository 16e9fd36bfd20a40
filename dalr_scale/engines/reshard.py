"""Continues a ZeRO run on another number of ranks, or with parameters in other groups.

ZeRO cuts the flattened fp32 weights and their optimizer states by rank, and DeepSpeed loads such a
checkpoint at its own number of ranks only. Its way out, the universal checkpoint, rewrites the
whole checkpoint on disk first, and was reported wrong for stage 3 on several nodes
(https://github.com/deepspeedai/DeepSpeed/pull/7601). Here every rank reads the saved shards one
after the other, keeps the elements that are its own now, and passes DeepSpeed the shard that it
would have saved itself. Elements are copied, never computed: weights and states continue
bit-identically, and later steps differ only by the order in which fewer or more ranks add up.

Both sides are lists of `Span`, a range of elements of one flattened parameter. Stages 1 and 2 cut
each parameter group as one flat row; stage 3 cuts every parameter separately and pads the last
rank's part.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from dalr_scale.engines.restore import require_same_parameters
from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
MASTER = "fp32"  # the fp32 weights, beside the optimizer's own names (exp_avg, ...)
# Where a shard keeps them, by "is it stage 3".
_BASE = {False: "base_optimizer_state", True: "optimizer_state_dict"}
_MASTERS = {False: "single_partition_of_fp32_groups", True: "fp32_flat_groups"}

Cut = tuple[str, int, int, int]  # parameter, start in it, start in the flat row, elements


class Address(Protocol):
    """DeepSpeed's `fragment_address`: a range of a flat row."""

    @property
    def numel(self) -> int: ...
    @property
    def start(self) -> int: ...


class ZeroOptimizer(Protocol):
    """The part of DeepSpeed's ZeRO optimizers that is used here."""

    # stage 3 has the one list of flat fp32 weights, stages 1 and 2 the other
    fp32_partitioned_groups_flat: list[Tensor]
    single_partition_of_fp32_groups: list[Tensor]

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(
        self, shards: list[dict[str, Any]], *, load_from_fp32_weights: bool
    ) -> None: ...


class ZeroEngine(Protocol):
    """The part of DeepSpeed's engine that is used here."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def optimizer(self) -> ZeroOptimizer: ...
    def zero_optimization_stage(self) -> int: ...
    def _get_zero_param_shapes(self) -> list[dict[str, torch.Size]]: ...


@dataclass(frozen=True)
class SavedShard:
    """One rank's optimizer states in a checkpoint.

    Attributes:
        masters: flat fp32 weights, one row for each parameter group.
        states: group number -> the optimizer's states, by its own names: tensors as long as the
            group's row, and the step count.
        slices: parameter -> its part of the row, one table for each group (stages 1 and 2).
    """

    masters: list[Tensor]
    states: dict[int, dict[str, Any]]
    slices: list[dict[str, Address]]


@dataclass
class Span:
    """Elements from `start` on of a flattened parameter: a view [n] into a flat row per state."""

    name: str
    start: int
    states: dict[str, Tensor]
    filled: int = 0

    @property
    def length(self) -> int:
        return self.states[MASTER].numel()

    def take(self, saved: Span) -> None:
        """Copies the elements that both spans have."""
        first = max(self.start, saved.start)
        count = min(self.start + self.length, saved.start + saved.length) - first
        if count <= 0:
            return
        for key, own in self.states.items():
            piece = saved.states[key].narrow(0, first - saved.start, count)
            own.narrow(0, first - self.start, count).copy_(piece)
        self.filled += count


def load_resharded(
    engine: ZeroEngine, directory: Path, saved_ranks: int, rank: int, ranks: int
) -> None:
    """Fills a fresh engine from a checkpoint, parameter by parameter; all ranks call it.

    The saved run may have had another number of ranks and other parameter groups.

    Args:
        engine: DeepSpeed engine of ZeRO 1, 2 or 3 that has not made a step.
        directory: what DeepSpeed's `save_checkpoint` wrote, the files ``*_states.pt``.
        saved_ranks: number of ranks that wrote it.
        rank, ranks: this rank and the number of ranks now.

    Raises:
        UserError: if an element of this rank is not in the checkpoint.
    """
    whole = engine.zero_optimization_stage() == 3
    model = _model_states(directory, whole)
    keys, others = _state_names(_shard(directory, 0, whole))
    shard, own = _empty_shard(engine, whole, keys, others, rank, ranks)
    seen: dict[str, int] = {}
    for saved_rank in range(saved_ranks):
        saved = _shard(directory, saved_rank, whole)
        if whole:
            cuts = (_cuts_by_parameter(s, saved_rank, saved_ranks) for s in model["param_shapes"])
        else:
            cuts = (_cuts_by_group(m, seen) for m in saved.slices)
        for span in _spans(cuts, _rows(saved, keys)):
            if span.name in own:
                own[span.name].take(span)
    _require_complete(own, directory)
    engine.optimizer.load_state_dict([shard] * ranks, load_from_fp32_weights=True)
    _load_module(engine.module, model["module"], buffers_only=whole)
    for counter in COUNTERS:
        setattr(engine, counter, model[counter])


def has_own_groups(engine: ZeroEngine, directory: Path) -> bool:
    """Whether a checkpoint has the engine's parameters in the engine's groups.

    Raises:
        UserError: it has other parameters.
    """
    saved = _model_states(directory, engine.zero_optimization_stage() == 3)["param_shapes"]
    own = _own_shapes(engine)
    require_same_parameters(_joined(saved), _joined(own), directory)
    return [list(group) for group in saved] == [list(group) for group in own]


def _own_shapes(engine: ZeroEngine) -> list[dict[str, torch.Size]]:
    return engine._get_zero_param_shapes()  # pyright: ignore[reportPrivateUsage] - no public name


def _joined(groups: Iterable[Mapping[str, torch.Size]]) -> dict[str, torch.Size]:
    return {name: shape for group in groups for name, shape in group.items()}


class _ModelStates(TypedDict):
    """What this module reads of DeepSpeed's ``*_model_states.pt``."""

    module: dict[str, Tensor]
    param_shapes: list[dict[str, torch.Size]]
    global_steps: int
    global_samples: int
    skipped_steps: int


def _model_states(directory: Path, whole: bool) -> _ModelStates:
    name = "zero_pp_rank_0_mp_rank_00" if whole else "mp_rank_00"
    path = directory / f"{name}_model_states.pt"
    if not path.exists():
        raise UserError(f"{path} is missing; choose another checkpoint")
    states: _ModelStates = _read(path)
    return states


def _shard(directory: Path, rank: int, whole: bool) -> SavedShard:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    path = next(
        (p for p in (directory / name, directory / f"bf16_{name}") if p.exists()), directory / name
    )
    plain = _read(path)["optimizer_state_dict"]
    return SavedShard(
        masters=plain[_MASTERS[whole]],
        states=plain[_BASE[whole]]["state"],
        slices=plain.get("param_slice_mappings", []),
    )


def _read(path: Path) -> Any:  # noqa: ANN401 - a file of DeepSpeed; callers name its type
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _state_names(shard: SavedShard) -> tuple[list[str], dict[str, Any]]:
    """Names of the states with an element per weight; the others (the step count) with values."""
    state, length = shard.states.get(0, {}), shard.masters[0].numel()
    keys = [k for k, v in state.items() if isinstance(v, Tensor) and v.numel() >= length]
    return keys, {k: v for k, v in state.items() if k not in keys}


def _rows(shard: SavedShard, keys: list[str]) -> list[dict[str, Tensor]]:
    """The flat rows of a shard, one set of states for each parameter group."""
    return [
        {MASTER: master.view(-1)} | {key: shard.states[group][key].view(-1) for key in keys}
        for group, master in enumerate(shard.masters)
    ]


def _empty_shard(
    engine: ZeroEngine, whole: bool, keys: list[str], others: dict[str, Any], rank: int, ranks: int
) -> tuple[dict[str, Any], dict[str, Span]]:
    """This rank's shard with zeros, and its spans as views into it."""
    shard = engine.optimizer.state_dict()
    flat = (
        engine.optimizer.fp32_partitioned_groups_flat
        if whole
        else engine.optimizer.single_partition_of_fp32_groups
    )
    rows = [{key: torch.zeros(f.numel()) for key in (MASTER, *keys)} for f in flat]
    shard[_MASTERS[whole]] = [row[MASTER] for row in rows]
    # each group counts its steps in a tensor of its own: one for all would count once per group
    state = {
        g: {key: row[key] for key in keys} | copy.deepcopy(others) for g, row in enumerate(rows)
    }
    shard[_BASE[whole]] |= {"state": state if keys or others else {}}
    if whole:
        cuts = (_cuts_by_parameter(s, rank, ranks) for s in _own_shapes(engine))
    else:
        starts = dict(_own_starts(engine.module))
        cuts = (_cuts_by_group(m, starts) for m in shard["param_slice_mappings"])
    return shard, {span.name: span for span in _spans(cuts, rows)}


def _own_starts(module: nn.Module) -> Iterator[tuple[str, int]]:
    """First element of each parameter in this rank's part, by DeepSpeed's note on the parameter."""
    for name, parameter in module.named_parameters():
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            yield name, mapping.lp_fragment_address.start


def _spans(cuts: Iterable[Iterable[Cut]], rows: list[dict[str, Tensor]]) -> Iterator[Span]:
    for group_cuts, row in zip(cuts, rows, strict=True):
        for name, start, offset, count in group_cuts:
            yield Span(name, start, {k: t.narrow(0, offset, count) for k, t in row.items()})


def _cuts_by_group(mapping: Mapping[str, Address], starts: dict[str, int]) -> Iterator[Cut]:
    """Stages 1 and 2. Advances `starts`: the next rank's part of a parameter follows this one's."""
    for name, address in mapping.items():
        start = starts.get(name, 0)
        starts[name] = start + address.numel
        yield name, start, address.start, address.numel


def _cuts_by_parameter(shapes: Mapping[str, torch.Size], rank: int, ranks: int) -> Iterator[Cut]:
    """Stage 3."""
    offset = 0
    for name, shape in shapes.items():
        part = -(-math.prod(shape) // ranks)
        count = min(part, math.prod(shape) - rank * part)
        if count > 0:
            yield name, rank * part, offset, count
        offset += part


def _require_complete(own: Mapping[str, Span], directory: Path) -> None:
    gaps = [name for name, span in own.items() if span.filled != span.length]
    if gaps:
        raise UserError(
            f"{directory} lacks elements of {', '.join(gaps[:3])}: it is of another model, or of "
            "another number of ranks than its manifest says; choose another checkpoint"
        )


def _load_module(module: nn.Module, state: dict[str, Tensor], *, buffers_only: bool) -> None:
    """Loads unsharded tensors: buffers, and below stage 3 the weights of the forward pass."""
    if buffers_only:
        state = {name: state[name] for name, _ in module.named_buffers() if name in state}
    module.load_state_dict(state, strict=not buffers_only)
