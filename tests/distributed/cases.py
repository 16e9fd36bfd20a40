"""Step cases that worker processes and the one-process reference both run.

A case is one point of ranks x engine x chunks x batch kind x preset x dropout. Without dropout the
second view is a fixed perturbation of the first, so that results depend on the mathematics only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from dalr_scale.config import BatchConfig, Config, EngineConfig, OptimConfig, build_config
from dalr_scale.data.stream.batch import Batch
from dalr_scale.data.stream.order import rank_rows
from dalr_scale.distributed import collectives as gather
from dalr_scale.distributed import merging
from dalr_scale.engines.build import build_engine
from dalr_scale.engines.deepspeed import DeepSpeedEngine
from dalr_scale.global_batch import GlobalBatchStep, Place
from dalr_scale.models import consistency, dalr
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.encoder import pool
from dalr_scale.models.row_dropout import install_row_dropout
from dalr_scale.training.optim import build_optimizer
from dalr_scale.training.task import VIEWS, DalrTask

if TYPE_CHECKING:
    from dalr_scale.distributed.world import World
    from dalr_scale.engines.protocol import Engine

ROWS, LENGTH, WIDTH, STEPS = 32, 7, 16, 5
WORLDS = (1, 2, 4)
KINDS = ("ddp", "zero1", "zero2", "zero3")
CHUNKS = ("one", "four", "ragged")
BATCHES = ("pair", "text")
PRESETS = ("simcse", "mcse", "kdmcse", "dalr-reference", "dalr")
DROPOUT = ("off", "row")


@dataclass(frozen=True)
class Case:
    """`option` is one of offload, checkpoint, bf16, adamw; `fault` switches a guarantee off.

    With `rows` the batch is the last one of a pass, of that many rows.
    """

    world: int
    preset: str
    kind: str = "ddp"
    batch: str = "pair"
    chunks: str = "one"
    dropout: str = "off"
    option: str = ""
    fault: str = ""
    rows: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self) if v not in ("", 0))

    @property
    def reference(self) -> Case:
        """One process with the whole batch in one chunk: float64 without an engine.

        Rounding to bf16 moves the gradient far more than ranks and chunks do, so bf16 is compared
        with bf16.
        """
        plain = dataclasses.replace(self, world=1, chunks="one", fault="")
        if self.option == "bf16":
            return plain
        option = self.option if self.option == "adamw" else ""
        return dataclasses.replace(plain, kind="ddp", option=option)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.kind == "ddp" else torch.float32

    @property
    def micro_rows(self) -> int:
        """Ragged: 5 rows, which leaves a chunk of one row where a rank has 16."""
        rows = ROWS // self.world
        return {"one": 0, "four": rows // 4, "ragged": 5}[self.chunks]

    def config(self) -> Config:
        config = build_config([{"objective": {"preset": self.preset, "tail": "drop"}}])
        exact = "bf16" if self.option == "bf16" else "fp32"
        name = "adamw" if self.option == "adamw" else "sgd"
        return dataclasses.replace(
            config,
            batch=BatchConfig(ROWS, self.micro_rows),
            engine=EngineConfig(
                kind=self.kind,  # type: ignore[arg-type]
                precision="fp64" if self.kind == "ddp" else exact,  # type: ignore[arg-type]
                offload_optimizer=self.option == "offload",
            ),
            optim=OptimConfig(lr=learning_rate(name), name=name, clip=1.0, steps=STEPS),  # type: ignore[arg-type]
        )


def learning_rate(optimizer: str) -> float:
    return 0.05 if optimizer == "sgd" else 1e-3


class TwoViewEncoder(nn.Module):
    """A small BERT; without dropout the second view is perturbed as if by it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        probability = 0.1 if case.dropout != "off" else 0.0
        config = BertConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=probability,
            attention_probs_dropout_prob=probability,
        )
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.row_keys = install_row_dropout(self.backbone) if case.dropout == "row" else None
        if case.option == "checkpoint":
            renamed = hasattr(self.backbone, "activation_checkpointing_enable")
            name = "activation_checkpointing" if renamed else "gradient_checkpointing"
            reentrant = {f"{name}_kwargs": {"use_reentrant": case.kind == "zero3"}}
            getattr(self.backbone, f"{name}_enable")(**reentrant)
        self.perturbed = case.dropout == "off"
        self.width = WIDTH

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        states = pool(hidden.last_hidden_state, attention_mask, "mean")
        if not self.perturbed or not self.training:
            return states
        first, second = states.chunk(2)
        wave = torch.sin(torch.arange(WIDTH, dtype=first.dtype, device=first.device))
        return torch.cat([first, second * (1 + 0.3 * wave) + 0.1 * wave.flip(0)])


def build(case: Case, world: World) -> tuple[Engine, Config]:
    config = case.config()
    torch.manual_seed(3)
    spec = LossSpec(config.objective, text_weights=(0.33, 0.67), seed=config.run.seed)
    widths = FeatureWidths(WIDTH, WIDTH, (WIDTH, WIDTH), (WIDTH,))
    model = DalrModel(TwoViewEncoder(case), config.model, spec, widths)  # type: ignore[arg-type]
    for parameter in model.parameters():  # away from zero biases and unit norms
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    optimizer = build_optimizer(model, config.optim)
    rows = ROWS // world.size
    engine, _ = build_engine(
        model, optimizer, config.engine, rows=rows, clip=config.optim.clip, world=world
    )
    return engine, config


def global_batch(case: Case, step: int) -> dict[str, Tensor]:
    """The same global batch on every rank, drawn from (case, step)."""
    rng = np.random.default_rng([step, 5])

    def floats(*shape: int) -> Tensor:
        return torch.tensor(rng.normal(size=shape)).to(case.dtype)

    lengths = torch.tensor(rng.integers(3, LENGTH + 1, ROWS))
    positions = torch.arange(LENGTH)
    batch = {
        "input_ids": torch.tensor(rng.integers(0, 40, (ROWS, LENGTH))),
        "attention_mask": (positions < lengths[:, None]).long(),
        "image": floats(ROWS, WIDTH),
        "caption": floats(ROWS, WIDTH),
        "text0": floats(ROWS, WIDTH),
        "text1": floats(ROWS, WIDTH),
        "tokens": floats(ROWS, LENGTH - 1, WIDTH),
        "token_mask": (positions[1:] < lengths[:, None]).to(case.dtype),
        "ids": torch.tensor(rng.integers(0, 16, ROWS)),
    }
    if case.batch == "text":
        batch["ids"] = torch.full((ROWS,), -1)
    return {name: value[: case.rows or ROWS] for name, value in batch.items()}


@dataclass(frozen=True)
class Inputs:
    """What a step is called with: this rank's rows, and how they are encoded."""

    batch: Batch
    micro_rows: int
    global_rows: int
    sort: bool = True

    @property
    def lengths(self) -> Tensor:
        return self.batch.attention_mask.sum(1)

    def on(self, engine: Engine) -> GlobalBatchStep[Batch]:
        model: Any = engine.module
        task = DalrTask(model.spec.needs, model.encoder.row_keys)
        return GlobalBatchStep(engine, task, chunk_rows=self.micro_rows, sort=self.sort)

    def backward(self, engine: Engine) -> tuple[Tensor, dict[str, Tensor]]:
        own = self.batch
        return self.on(engine).backward(
            own, step=own.step, global_rows=self.global_rows, lengths=self.lengths
        )


def step_inputs(case: Case, world: World, step: int) -> Inputs:
    total = case.rows or ROWS
    own = torch.from_numpy(rank_rows(total, world.rank, world.size))
    rows = {name: value[own] for name, value in global_batch(case, step).items()}
    paired = case.batch == "pair"
    roles = ("image", "caption", "text0", "text1") if paired else ()
    batch = Batch(
        step=step,
        kind="pair" if paired else "text",
        item_ids=own,
        sentences=[],
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        image_ids=rows["ids"],
        features={role: rows[role] for role in roles},
        token_features=[rows["tokens"]] if paired else [],
        token_masks=[rows["token_mask"]] if paired else [],
    )
    return Inputs(batch, case.micro_rows, total)


def run(case: Case, world: World) -> dict[str, np.ndarray]:
    """Trains a few steps; losses, embedding and parameter gradients of each, weights (rank 0)."""
    with sabotage(case.fault):
        AcceleratorState._reset_state(reset_partial_state=True)  # many engines in one process
        engine, config = build(case, world)
        results: dict[str, np.ndarray] = {}
        losses = []
        for step in range(STEPS):
            inputs = step_inputs(case, world, step)
            loss, states_grad = watched_backward(engine, inputs)
            losses.append(world.all_mean([float(loss)])[0])
            whole = whole_gradient(states_grad, world)
            results[f"embedding.{step}"] = whole[: case.rows or ROWS]
            assert case.fault or not whole[case.rows or ROWS :].any()
            results |= {f"gradient.{step}.{n}": g for n, g in parameter_gradients(engine).items()}
            engine.step(learning_rate(config.optim.name))
        results |= {f"weight.{n}": w for n, w in weights(engine).items()}
    return results | {"loss": np.array(losses)}


def weights(engine: Engine) -> dict[str, np.ndarray]:
    """Whole weights in the precision in which they are kept."""
    if isinstance(engine, DeepSpeedEngine):
        return {n: w.double().numpy() for n, w in engine.full_state("").items()}
    return {n: p.detach().double().numpy().copy() for n, p in engine.module.named_parameters()}


def watched_backward(engine: Engine, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The step's loss on this rank and the gradient in the cached states [2, b, H]."""
    seen: list[dict[str, Tensor]] = []
    plain = type(engine).apply

    def apply(self: Any, function: Any, *values: Any) -> Any:
        if function.__name__ == "loss":
            seen.append(values[0])
        return plain(self, function, *values)

    with mock.patch.object(type(engine), "apply", apply):
        loss, _ = inputs.backward(engine)
    gradients = [seen[0][view].grad for view in VIEWS]
    return loss, torch.stack([grad for grad in gradients if grad is not None])


def whole_gradient(states_grad: Tensor, world: World) -> np.ndarray:
    """d(mean over all rows) / d states of the global batch; ranks hold W times their share."""
    rows = gather.gather_rows(states_grad.transpose(0, 1).contiguous(), grad=False)
    return rows.double().numpy() / world.size


def parameter_gradients(engine: Engine) -> dict[str, np.ndarray]:
    """Reduced gradients, whole, whatever the engine keeps of them."""
    from deepspeed.utils import safe_get_full_grad

    gradients = {}
    for name, parameter in engine.module.named_parameters():
        sharded = isinstance(engine, DeepSpeedEngine)
        grad = safe_get_full_grad(parameter) if sharded else parameter.grad
        assert grad is not None, name
        gradients[name] = grad.detach().double().cpu().numpy().copy()
    return gradients


@contextlib.contextmanager
def sabotage(fault: str) -> Iterator[None]:
    """Switches one guarantee off, for the negative controls."""
    patches = {
        "": lambda: contextlib.nullcontext(),
        "columns without gradient": lambda: mock.patch.object(
            dalr, "with_gradient", lambda gathered, local: gathered
        ),
        "column gradients averaged": lambda: mock.patch.object(
            gather._WithGradient, "backward", staticmethod(mean_over_ranks)
        ),
        "statistics per rank": lambda: mock.patch.object(
            consistency, "all_reduce_sum", lambda x: x * dist.get_world_size()
        ),
        "one reduction per chunk": lambda: mock.patch.object(
            DeepSpeedEngine, "gradients", return_value=contextlib.nullcontext()
        ),
        "tokens of this rank only": lambda: mock.patch.object(
            merging, "merge_log_sum_exp", own_part
        ),
        "padding is real": lambda: mock.patch.object(
            dalr.Share, "of", lambda rows, first, _: gather.Share(rows, first, 2 * rows, 2)
        ),
        "ranks count alike": lambda: mock.patch.object(gather.Share, "weight", 1.0),
        "padding in the statistics": lambda: mock.patch.object(
            gather.Share, "real", lambda self, local: local
        ),
        "copies in column sums": lambda: mock.patch.multiple(
            merging.ShareMerges,
            maximum=lambda self, values: gather.merge_max(values),
            sum=lambda self, values: gather.merge_sum(values),
        ),
        "copies among tokens": lambda: mock.patch.object(
            merging.ShareMerges, "log_sum_exp", merge_with_copies
        ),
        "keys by place in the rank": lambda: mock.patch.object(
            Place, "first", property(lambda self: 0)
        ),
    }
    with patches[fault]():
        yield


def mean_over_ranks(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Gradient contributions of all ranks to this rank's columns, divided by W."""
    total = gather._reduce_scatter_sum(grad)
    return (total / dist.get_world_size()).to(ctx.dtype), None


def own_part(partial: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's rows of partial results that nobody merges."""
    rows = len(partial) // dist.get_world_size()
    own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    return partial[own], mean[own]


def merge_with_copies(merges: merging.ShareMerges, partial: Tensor, mean: Tensor) -> Any:
    """Negatives to which a rank without rows of its own adds its copy."""
    share = merges.share
    places = torch.as_tensor(share.places(0, share.ranks * share.rows))
    partial, mean = gather.merge_log_sum_exp(partial[places], mean[places])
    return partial[: share.kept], mean[: share.kept]


def tails() -> list[Case]:
    """Last batches of a pass: rows that ranks cannot cut equally, and fewer than there are ranks.

    Of 5 rows on 4 ranks the ranks have 2, 2, 1 and 0; of 10 rows 3, 3, 3 and 1.
    """
    return [
        Case(2, "dalr", rows=9),
        Case(4, "dalr", rows=5),
        Case(4, "dalr", rows=3),
        Case(4, "dalr-reference", rows=10),
        Case(2, "kdmcse", rows=9),
        Case(2, "dalr", "ddp", "pair", "ragged", "row", rows=11),
        Case(4, "simcse", "ddp", "text", "four", "row", rows=5),
        Case(2, "dalr", "zero2", "pair", "four", "row", rows=9),
        Case(2, "dalr", "zero3", "pair", "four", "row", rows=9),
    ]


def all_tails() -> list[Case]:
    """The same for every size, preset and engine: `make soak`."""
    plain = [(2, 9), (4, 10), (4, 5), (4, 3), (4, 2)]
    sizes = [Case(w, p, rows=n) for p in ("dalr", "dalr-reference") for w, n in plain]
    sizes += [Case(w, "kdmcse", rows=n) for w, n in ((2, 9), (4, 5))]
    chunks = [Case(2, "dalr", "ddp", "pair", c, "row", rows=11) for c in ("four", "ragged")]
    texts = [Case(4, p, "ddp", "text", "four", "row", rows=5) for p in ("simcse", "dalr")]
    parts = itertools.product(("zero2", "zero3"), ((2, 9), (4, 5)))
    zero = [Case(w, "dalr", k, "pair", "four", "row", rows=n) for k, (w, n) in parts]
    zero += [Case(2, "dalr", "zero1", rows=9), Case(4, "dalr-reference", "zero3", rows=3)]
    return sizes + chunks + texts + zero


def cover() -> list[Case]:
    """The part of ``make test``.

    Cases in which every two values of any two axes meet, at one and two ranks, and one of each
    engine at four.
    """
    axes = ((1, 2), PRESETS, KINDS, BATCHES, CHUNKS, DROPOUT)
    picked = pairwise(axes)
    picked += [(4, "dalr", kind, "pair", "four", "row") for kind in KINDS]
    picked += [(4, "dalr-reference", "ddp", "pair", "ragged", "off")]
    extra = [Case(2, "dalr", kind, "pair", "four", "row", "offload") for kind in ZERO]
    extra += [Case(2, "dalr", kind, "pair", "four", "row", "checkpoint") for kind in KINDS]
    extra += [Case(2, "dalr", kind, "pair", "four", "off", "adamw") for kind in KINDS]
    extra += [Case(w, "dalr", kind, "pair", "four", "row", "bf16") for w in (1, 2) for kind in ZERO]
    return [Case(*values) for values in picked] + extra


def product() -> list[Case]:
    """Every combination: ``make soak``."""
    axes = (WORLDS, PRESETS, KINDS, BATCHES, CHUNKS, DROPOUT)
    plain = [Case(*values) for values in itertools.product(*axes)]
    options = [
        Case(world, preset, kind, "pair", "ragged", "row", option)
        for world in WORLDS
        for preset in PRESETS
        for kind in KINDS
        for option in ("offload", "checkpoint", "bf16", "adamw")
        if kind != "ddp" or option in ("checkpoint", "adamw")
    ]
    return plain + options + all_tails()


GROUPS = ("loss", "embedding", "gradient", "weight")


def agreement(
    results: dict[str, np.ndarray], truth: dict[str, np.ndarray], *, norms: bool = False
) -> dict[str, float]:
    """How far results are from the truth, by group.

    Groups are losses, gradients in the embeddings, gradients and weights of parameters.

    The largest max|difference| / max|value| of any tensor, a gradient being one tensor over all
    its steps (late ones are small, and carry the rounding of the steps before). A tensor whose
    values are below a thousandth counts absolutely, times a thousand: attention key biases have
    no gradient but rounding. With `norms`, the norm of a group's differences over the norm of its
    values: bf16 leaves little of small tensors.
    """
    assert results.keys() >= truth.keys()
    differences: dict[str, float] = {}
    sizes: dict[str, float] = {}
    squares = {group: [0.0, 0.0] for group in GROUPS}
    for name, value in truth.items():
        tensor = ".".join(part for part in name.split(".", 2) if not part.isdecimal())
        difference = np.abs(results[name] - value)
        differences[tensor] = max(differences.get(tensor, 0.0), float(difference.max()))
        sizes[tensor] = max(sizes.get(tensor, 1e-3), float(np.abs(value).max()))
        group = name.split(".")[0]
        squares[group][0] += float((difference**2).sum())
        squares[group][1] += float((value**2).sum())
    if norms:
        return {g: (a / b) ** 0.5 for g, (a, b) in squares.items()}
    worst = dict.fromkeys(GROUPS, 0.0)
    for tensor, difference in differences.items():
        group = tensor.split(".")[0]
        worst[group] = max(worst[group], difference / sizes[tensor])
    return worst


def pairwise(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """A greedy pairwise cover of the product of `axes`, the same every time."""
    rows = list(itertools.product(*axes))
    pairs_of = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs_of.values())
    picked = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of[row] & missing))
        picked.append(best)
        missing -= pairs_of[best]
    return picked


ZERO = ("zero1", "zero2", "zero3")
FAULTS = [
    Case(2, "dalr", fault="columns without gradient"),
    Case(2, "dalr", fault="column gradients averaged"),
    Case(2, "dalr", fault="statistics per rank"),
    Case(2, "dalr", fault="tokens of this rank only"),
    Case(2, "dalr", "zero1", chunks="four", fault="one reduction per chunk"),
    Case(2, "dalr", "zero2", chunks="four", fault="one reduction per chunk"),
    Case(2, "dalr", dropout="row", fault="keys by place in the rank"),
    Case(2, "dalr", "zero2", "pair", "four", "row", "bf16", "columns without gradient"),
    Case(2, "dalr", "zero2", "pair", "four", "row", "bf16", "one reduction per chunk"),
    Case(2, "dalr", fault="padding is real", rows=9),
    Case(2, "dalr", fault="ranks count alike", rows=9),
    Case(2, "dalr", fault="padding in the statistics", rows=9),
    Case(4, "dalr", fault="copies in column sums", rows=5),
    Case(4, "dalr", fault="copies among tokens", rows=5),
]


def references() -> list[Case]:
    """References that need an engine: made by a worker, since ZeRO-3 changes process-wide state."""
    return sorted({c.reference for c in cover() if c.reference.kind != "ddp"}, key=lambda c: c.name)


SETS = {
    "cover": lambda: [*dict.fromkeys(cover() + tails() + references() + FAULTS)],
    "product": product,
}


def save(directory: Path, case: Case, results: dict[str, np.ndarray]) -> None:
    np.savez(directory / f"{case.name}.npz", **results)  # type: ignore[arg-type]


def load(directory: Path, case: Case) -> dict[str, np.ndarray]:
    with np.load(directory / f"{case.name}.npz") as stored:
        return dict(stored)
