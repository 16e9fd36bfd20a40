"""The reference run: every step's numbers and the final weights of a configuration."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dalr_scale.distributed.world import World
from dalr_scale.training.build import build_model, build_streams
from reference.dropout import key_by_row, own_copy
from reference.objective import Frozen, Objective
from reference.stream import Rows, Schedule, read

if TYPE_CHECKING:
    from dalr_scale.config import Config


@dataclass
class Step:
    """What one step shows; `terms` are unweighted.

    items is a hash of the item numbers, in the order of the batch.
    gate, order and kink: how close the step came to a jump (``losses.Discontinuities``).
    """

    stream: str
    items: str
    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float
    gate: float
    order: float
    kink: float


@dataclass
class Result:
    steps: list[Step] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)


def train(config: Config) -> Result:
    """Trains a configuration from its first step to its last."""
    run = _Run(config)
    result = Result(initial={n: w.detach().clone() for n, w in run.weights.items()})
    for step in range(run.schedule.steps):
        result.steps.append(run.step(step))
    result.weights = {name: weight.detach().clone() for name, weight in run.weights.items()}
    result.sensitivity = run.optimizer.sensitivity
    return result


class _Run:
    def __init__(self, config: Config) -> None:
        self.config = config
        streams = build_streams(config)
        # initial weights and tokenizer come from the trainer's own start: they are not under test
        parts = build_model(config, streams, World(0, 1, torch.device("cpu")))
        self.tokenizer = parts.tokenizer
        self.schedule = Schedule(config, streams.text, streams.pairs)
        encoder = parts.model.encoder
        self.pooler = encoder.pooler
        self.backbone = _backbone(encoder.backbone, with_pooler=self.pooler == "cls")
        keyed = config.batch.dropout_keys == "row"
        self.masks = key_by_row(self.backbone, config.run.seed) if keyed else None
        self.backbone.double().train()
        own = dict(self.backbone.named_parameters())
        self.weights: dict[str, Tensor] = {}
        for name, value in parts.model.named_parameters():
            local = name.removeprefix("encoder.backbone.")
            if local != name:
                self.weights[name] = own[local]
            else:
                self.weights[name] = value.detach().double().clone().requires_grad_()
        self.teachers = _Teachers(config)
        self.objective = Objective(config, self.weights)
        self.optimizer = Optimizer(config, self.weights, self._embedding_names())

    def _embedding_names(self) -> set[str]:
        modules = self.backbone.named_modules()
        names = [name for name, module in modules if isinstance(module, nn.Embedding)]
        return {f"encoder.backbone.{name}.weight" for name in names}

    def step(self, step: int) -> Step:
        rows = read(self.schedule, step, self.tokenizer)
        h_1, h_2 = self._views(rows, step)
        frozen = self.teachers.of(rows, self.schedule)
        total, terms, seen = self.objective(h_1, h_2, rows.kind, frozen, step)
        for weight in self.weights.values():
            weight.grad = None
        total.backward()
        lr = learning_rate(self.config, step, self.schedule.steps)
        norm = self.optimizer.step(lr)
        values = {name: float(term.detach()) for name, term in terms.items()}
        items = hashlib.sha256(rows.items.tobytes()).hexdigest()[:16]
        loss = float(total.detach())
        jumps = seen.gate, seen.order, seen.kink
        return Step(rows.kind, items, loss, values, lr, norm, *jumps)

    def _views(self, rows: Rows, step: int) -> tuple[Tensor, Tensor]:
        """Both views in one pass over 2B rows; [B, H] each."""
        if self.masks is not None:
            self.masks.start(step, len(rows.ids))
        ids, mask = rows.ids.repeat(2, 1), rows.mask.repeat(2, 1)
        h = pooled(self.backbone, ids, mask, self.pooler)[0]
        return tuple(h.chunk(2))  # type: ignore[return-value]


def _backbone(theirs: Any, *, with_pooler: bool) -> Any:
    config = own_copy(theirs.config)
    kind = MODEL_MAPPING[type(config)]
    options = {} if config.model_type == "distilbert" else {"add_pooling_layer": with_pooler}
    mine = kind(config, **options)
    mine.load_state_dict(theirs.state_dict())
    return mine


def pooled(backbone: Any, ids: Tensor, mask: Tensor, pooler: str) -> tuple[Tensor, Tensor]:
    """Sentence states [n, H] and last hidden states [n, L, H]."""
    hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    if pooler == "mean":
        real = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1), hidden
    first = hidden[:, 0]
    if pooler == "cls":
        first = torch.tanh(backbone.pooler.dense(first))
    return first, hidden


class _Teachers:
    """Stored features, and frozen encoders that run in float64."""

    def __init__(self, config: Config) -> None:
        self.config = config
        t = config.teachers
        poolers = t.text_poolers or ("",) * len(t.text)
        self.models = {spec: _teacher(config, spec) for spec in (*t.text, *t.tokens, t.caption)}
        self.poolers = poolers

    def of(self, rows: Rows, schedule: Schedule) -> Frozen:
        o, t = self.config.objective, self.config.teachers
        paired = rows.kind == "pair"
        uses_text = o.intra_weight * (o.intra_kl_weight + o.rank_weight) != 0
        uses_text |= o.cross_weight * o.cross_kl_weight != 0
        uses_tokens = o.intra_weight * o.g2l_weight != 0
        text = []
        if uses_text and (paired or o.distil_text_batches):
            specs = zip(t.text, self.poolers, strict=True)
            text = [
                self._sentences(spec, pooler, f"text{k}", rows, schedule)
                for k, (spec, pooler) in enumerate(specs)
            ]
        tokens = []
        if uses_tokens and paired:
            tokens = [self._tokens(spec, rows, schedule) for spec in t.tokens]
        caption = None
        if paired and t.caption:
            stored = rows.features.get("caption")
            model = self.models[t.caption]
            caption = stored if model is None else self._run(t.caption, "mean", rows, schedule)[0]
        image = rows.features.get("image") if paired else None
        return Frozen(rows.image_ids, image, caption, text, tokens)

    def _sentences(self, spec, pooler, role, rows, schedule) -> Tensor:
        if self.models[spec] is None:
            return rows.features[role]
        return self._run(spec, pooler, rows, schedule)[0]

    def _tokens(self, spec, rows, schedule) -> tuple[Tensor, Tensor]:
        if self.models[spec] is None:
            assert rows.tokens is not None
            return rows.tokens
        _, hidden, mask = self._run(spec, "mean", rows, schedule)
        return hidden[:, 1:], mask[:, 1:].bool()

    @torch.no_grad()
    def _run(self, spec, pooler, rows, schedule) -> tuple[Tensor, Tensor, Tensor]:
        model, tokenizer = self.models[spec]
        source = schedule.sources[rows.kind]
        sentences = source.read(rows.items, text=True).sentences
        encoded = tokenizer(
            sentences, truncation=True, max_length=self.config.data.max_length, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return *pooled(model, ids, mask, pooler), mask


def _teacher(config: Config, spec: str) -> Any:
    if not spec.startswith("hf:"):
        return None
    from dalr_scale.models.tokenizer import load_tokenizer

    directory = config.path(spec.removeprefix("hf:"))
    return AutoModel.from_pretrained(str(directory)).double().eval(), load_tokenizer(
        Path(directory)
    )


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then linear decay that would reach 0 after the last step."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    return o.lr * (steps - step) / (steps - o.warmup)


class Optimizer:
    """AdamW or SGD by hand. A weight outside of a step's terms has gradient 0, not none.

    `sensitivity` is how far each element would have moved if its gradient had been off by the whole
    norm of the (clipped) gradient in every step: AdamW divides by the size of the gradient, so that
    rounding moves an element whose gradient is small further than one whose gradient is large.
    """

    def __init__(self, config: Config, weights: dict[str, Tensor], embeddings: set[str]) -> None:
        self.o, self.weights, self.embeddings = config.optim, weights, embeddings
        self.m = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.sensitivity = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.count = 0

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update; returns the gradient's global norm before clipping."""
        o = self.o
        self.count += 1
        zeros = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        gradients = {n: zeros[n] if w.grad is None else w.grad for n, w in self.weights.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        scale = min(1.0, o.clip / (norm + 1e-6)) if o.clip else 1.0  # torch's form of clipping
        for name, w in self.weights.items():
            own = o.embedding_lr if o.embedding_lr and name in self.embeddings else o.lr
            rate = lr * own / o.lr
            g = gradients[name] * scale
            decay = o.weight_decay if w.ndim > 1 else 0.0
            if o.name == "sgd":
                w -= rate * (g + decay * w)
                self.sensitivity[name] += rate * scale * norm
                continue
            w *= 1 - rate * decay
            beta_1, beta_2 = o.betas
            self.m[name] = beta_1 * self.m[name] + (1 - beta_1) * g
            self.v[name] = beta_2 * self.v[name] + (1 - beta_2) * g**2
            mean = self.m[name] / (1 - beta_1**self.count)
            root = (self.v[name] / (1 - beta_2**self.count)).sqrt()
            w -= rate * mean / (root + o.eps)
            self.sensitivity[name] += rate * scale * norm / (root + o.eps)
        return norm
