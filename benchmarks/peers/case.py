"""The case that all contestants of ``exactness_peers.py`` train: model, pairs, reference, errors.

A BERT with random weights and 32 pairs of sentences, which are one global batch. Every contestant
makes one SGD step on it. The learning rate is a power of two so large that the new weights are, up
to one rounding, ``-rate * gradient``: ``(before - after) / rate`` is the gradient that the step
applied, whatever the engine did with it. So one method serves every engine and every contestant.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PAIRS, CHUNK = 32, 4
RATE = 2.0**14
SCALE = 20.0  # inverse temperature; the default of sentence-transformers
WORDS, SEED = 200, 20
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
# Tensors whose exact gradient is zero (a bias that softmax cancels) have no relative error.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Job:
    """One contestant's step in one process.

    Attributes:
        engine: "ddp", "zero1", "zero2" or "zero3".
        dtype: of weights and activations, "float32" or "float64".
        model: directory of the model, in the layout of Hugging Face.
        work: directory for what a trainer wants to write.
    """

    engine: str
    dtype: str
    rank: int
    ranks: int
    model: Path
    work: Path

    @property
    def rows(self) -> int:
        """Pairs of one rank."""
        return PAIRS // self.ranks

    @property
    def own(self) -> slice:
        """This rank's pairs of the global batch."""
        return slice(self.rank * self.rows, (self.rank + 1) * self.rows)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Unsupported(Exception):
    """The contestant does not offer this combination of engine and precision."""


def pairs() -> tuple[list[str], list[str]]:
    """Queries and positives of the global batch: 3 to 14 words each, of unequal lengths."""
    draw = random.Random(SEED)

    def text() -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(3, 14)))

    return [text() for _ in range(PAIRS)], [text() for _ in range(PAIRS)]


def write_model(directory: Path) -> None:
    """Writes a BERT of 2 layers and width 32 with random weights, no dropout, and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(WORDS))]
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    torch.manual_seed(SEED)
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    BertTokenizer(vocab=str(vocabulary), model_max_length=32).save_pretrained(directory)


def load_bert(job: Job) -> Any:
    """The BERT of the case, without a pooling layer: every weight has a gradient."""
    from transformers import BertModel

    model: Any = BertModel.from_pretrained(job.model, add_pooling_layer=False)
    return model.to(job.torch_dtype).train()


def tokenize(directory: Path, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and mask, [rows, longest] int64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Encoder(nn.Module):
    """Mean over the words' vectors, [rows, width], of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def reference(job: Job, scale: float) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of one process with the whole batch and no chunks, by plain autograd."""
    queries, positives = pairs()
    bert = load_bert(job)
    encode = Encoder(bert)
    states = [encode(**tokenize(job.model, texts)) for texts in (queries, positives)]
    scores = scale * states[0] @ states[1].T
    loss = functional.cross_entropy(scores, torch.arange(PAIRS))
    loss.backward()
    return {name: p.grad.double() for name, p in bert.named_parameters()}, loss.item()


def start_weights(directory: Path) -> dict[str, Tensor]:
    """The weights before the step, float64 copies of the float32 values on disk."""
    from safetensors.torch import load_file

    return {n: t.double() for n, t in load_file(directory / "model.safetensors").items()}


def unsharded_loading(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, in full on every rank, gathered where ZeRO-3 cut them."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().double().clone()
        else:
            found[name] = parameter.detach().double().clone()
    return found


def applied_gradient(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What an SGD step with rate ``RATE`` took from the weights."""
    return {name: (before[name] - after[name]) / RATE for name in before}


def errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Distances of two gradients.

    Returns:
        `relative`: largest ``|found - wanted| / |wanted|`` over tensors, by Euclidean norms, and
        `tensor`, where; tensors with less than 1e-6 of the whole norm count in the others only.
        `whole`: the same ratio of all tensors as one vector. `max_abs`: largest difference of an
        element. `length`: ``|found| / |wanted|``.
    """
    norm = torch.sqrt(sum((w.square().sum() for w in wanted.values()), torch.zeros(()).double()))
    gaps = {name: found[name] - w for name, w in wanted.items()}
    ratios = {
        name: float(gaps[name].norm() / w.norm())
        for name, w in wanted.items()
        if w.norm() > NEGLIGIBLE * norm
    }
    worst = max(ratios, key=lambda name: ratios[name])
    gap = torch.cat([g.flatten() for g in gaps.values()])
    length = torch.cat([found[name].flatten() for name in wanted]).norm()
    return {
        "relative": ratios[worst],
        "tensor": worst,
        "whole": float(gap.norm() / norm),
        "max_abs": float(gap.abs().max()),
        "length": float(length / norm),
    }


def ds_config(job: Job) -> dict[str, Any]:
    """A DeepSpeed configuration of numbers only: float32, no clipping, SGD allowed.

    At ZeRO-3 nothing stays whole: every tensor of the small model would count as persistent.
    """
    zero: dict[str, Any] = {"stage": STAGES[job.engine], "reduce_bucket_size": 500_000}
    if job.engine == "zero3":
        zero["stage3_prefetch_bucket_size"] = 500_000
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": job.rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": zero,
    }


def trainer_arguments(job: Job) -> dict[str, Any]:
    """Arguments of a Hugging Face trainer for one plain SGD step, nothing written, on the CPU."""
    arguments: dict[str, Any] = {
        "output_dir": str(job.work),
        "per_device_train_batch_size": job.rows,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "ddp_backend": "gloo",
        "disable_tqdm": True,
    }
    if job.engine in STAGES:
        if job.dtype != "float32":
            raise Unsupported("DeepSpeed trains no float64")
        arguments["deepspeed"] = ds_config(job)
    return arguments
