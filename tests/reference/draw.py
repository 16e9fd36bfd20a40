"""Random configurations of whole runs, each a function of its number.

All keys that change numbers are drawn: objective, batches, order, optimizer, encoder, engine,
interruptions. What is drawn must train; ``impossible`` breaks a configuration in a known way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import as_layer, tiny_layer

from dalr_scale.config import Config, build_config
from reference.compare import Bounds
from reference.material import SIZES
from reference.runs import Stop

PRESETS = ("simcse", "mcse", "kdmcse", "dalr-reference", "dalr")
VERSION = 1  # raise it when the same number gives another row


@dataclass
class Row:
    """One run: its configuration, ranks, and stops. `broken` names what must be refused."""

    number: int
    changes: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    stops: list[Stop] = field(default_factory=list)
    broken: str = ""

    def config(self, data: Path) -> Config:
        base = tiny_layer(data)
        base["model"].pop("architecture")
        base["data"].pop("tokenizer")
        base["eval"].pop("graded_dev")
        base["eval"].pop("every")
        base.pop("teachers")
        changes = {key: _filled(value, data) for key, value in self.changes.items()}
        return build_config([base, as_layer(changes)])

    @property
    def precision(self) -> str:
        return self.changes["engine.precision"]

    @property
    def summary(self) -> str:
        kind = self.changes["engine.kind"]
        offload = " offload" if self.changes.get("engine.offload_optimizer") else ""
        worlds = "-".join(str(r) for r in (self.ranks, *(s.ranks for s in self.stops)))
        ends = ",".join(f"{s.how}@{s.step}" for s in self.stops)
        encoder = self.changes.get("model.encoder", "scratch").rpartition("/")[2]
        return (
            f"{self.changes['objective.preset']} {encoder} {kind}{offload} {self.precision} "
            f"W{worlds} {ends} {self.broken}"
        ).rstrip()

    @property
    def bounds(self) -> Bounds:
        """float64 to 1e-9; fp32 to 1e-4; bf16 to 0.1, and only norms can be compared.

        bf16 has eight bits: a product is off by up to 0.4 %, and over layers of width 16, where
        little averages out, gradient norms were seen to be off by 6 % (losses by less than 1 %).

        A frozen encoder computes in float32 in every run, and in float64 in the reference.
        """
        if self.precision == "bf16":
            return Bounds(steps=0.1, weights=0.05, gate=0, order=0, kink=0, norms=True)
        online = any("hf:" in str(value) for value in self.changes.values())
        if self.precision == "fp64" and not online:
            return Bounds(steps=1e-9, weights=1e-9, gate=1e-12, order=1e-14, kink=1e-13)
        return Bounds(steps=1e-4, weights=1e-4, gate=3e-6, order=1.2e-7, kink=2e-6)


def _filled(value: Any, data: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{shards}", str(data))
    if isinstance(value, list):
        return [_filled(item, data) for item in value]
    return value


def draw(number: int) -> Row:
    """The row of a number; every fifteenth is one that must be refused."""
    random = _Random(number)
    row = Row(number)
    _engine(row, random)
    _data(row, random)
    _model(row, random)
    _objective(row, random)
    _optimizer(row, random)
    _interruptions(row, random)
    if number % 15 == 14:
        impossible(row)
    return row


class _Random:
    def __init__(self, number: int) -> None:
        self.rng = np.random.default_rng([number, VERSION])

    def of(self, *values: Any, p: tuple[float, ...] | None = None) -> Any:
        return values[int(self.rng.choice(len(values), p=p))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        return round(float(self.rng.uniform(low, high)), 4)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))


def _engine(row: Row, random: _Random) -> None:
    kind, precision = random.of(
        ("ddp", "fp64"), ("ddp", "fp32"), ("zero1", "fp32"), ("zero2", "fp32"), ("zero3", "fp32"),
        ("ddp", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"),
        p=(0.5, 0.08, 0.08, 0.12, 0.15, 0.02, 0.03, 0.02),
    )  # fmt: skip
    row.ranks = random.of(1, 2, 4, p=(0.5, 0.38, 0.12))
    row.changes |= {"engine.kind": kind, "engine.precision": precision, "run.seed": row.number}
    if kind != "ddp":
        row.changes["engine.offload_optimizer"] = random.chance(0.4)


def _data(row: Row, random: _Random) -> None:
    size = random.of(16, 20, 24)
    share = size // row.ranks
    weighted = random.chance(0.12)
    row.changes |= {
        "batch.global_size": size,
        "batch.micro_size": random.integer(1, share) if random.chance(0.6) else 0,
        "batch.sort_by_length": random.chance(0.5),
        "batch.dropout_keys": "row",
        "data.max_length": random.of(6, 8, 32, p=(0.2, 0.2, 0.6)),
        "data.workers": random.of(0, 1, 2, p=(0.7, 0.2, 0.1)),
        "log.every": 1,
    }
    if weighted:
        row.changes |= {
            "data.pairs": ["{shards}/train-000000.tar", "{shards}/train-000001.tar"],
            "data.pair_weights": [random.of(1.0, 2.0, 0.5), 1.0],
            "data.text": ["{shards}/text-*.tar", "{shards}/more-*.tar"],
            "data.text_weights": [random.of(1.0, 3.0), 1.5],
        }
    elif random.chance(0.3):
        row.changes["data.text"] = ["{shards}/text-*.tar", "{shards}/more-*.tar"]
    if random.chance(0.3):
        row.changes["data.pair_fraction"] = random.of(0.25, 0.5, 0.7)
    if not weighted and random.chance(0.08):
        row.changes.pop("data.pair_fraction", None)
        row.changes["data.text"] = []
    row.changes["objective.tail"] = "keep" if not weighted and random.chance(0.4) else "drop"
    row.changes["objective.alternation"] = random.of("reference", "proportional")
    if row.changes["objective.alternation"] == "reference":
        row.changes.pop("data.pair_fraction", None)  # two rules for one thing are refused


def _model(row: Row, random: _Random) -> None:
    kind = random.of("bert", "roberta", "distilbert", p=(0.5, 0.3, 0.2))
    poolers = ("mean", "cls_before_pooler") + (() if kind == "distilbert" else ("cls",))
    row.changes |= {
        "model.pooler": random.of(*poolers),
        "model.grounding_width": random.of(4, 8, 17),
        "model.consistency_width": random.of(4, 8, 17),
        "model.head_init_std": random.of(0.02, 0.2),
        "model.activation_checkpointing": random.chance(0.25),
    }
    if random.chance(0.5):
        row.changes["model.encoder"] = f"{{shards}}/encoders/{kind}"
        return
    dropout = {} if random.chance(0.75) else _dropout(kind, random.of(0.0, 0.3))
    if 0.0 in dropout.values():
        row.changes["batch.dropout_keys"] = random.of("rank", "row")
    spread = random.of(0.02, 0.2)
    if row.precision != "fp64":
        # small weights may give all sentences one vector: gradients are rounding errors then, which
        # AdamW divides by their own size
        spread = 0.2
    row.changes |= {
        "data.tokenizer": "{shards}/vocab.txt",
        "model.architecture": {
            "model_type": kind, **SIZES[kind], "initializer_range": spread, **dropout,
        },
    }  # fmt: skip


def _dropout(kind: str, p: float) -> dict[str, float]:
    if kind == "distilbert":
        return {"dropout": p, "attention_dropout": p}
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


def _objective(row: Row, random: _Random) -> None:
    preset = random.of(*PRESETS, p=(0.1, 0.1, 0.15, 0.25, 0.4))
    chosen: dict[str, Any] = {"preset": preset}
    menu: dict[str, Callable[[], Any]] = {
        "temperature": lambda: random.of(0.05, 0.1, 0.5),
        "vl_temperature": lambda: random.of(0.05, 0.2),
        "margin": lambda: random.of(0.0, 0.1, 0.2, 0.4),
        "vl_margin": lambda: random.of(0.0, 0.1, 0.2, 0.4),
        "margin_in_text_batches": lambda: random.chance(0.5),
        "cross_weight": lambda: random.of(0.1, 0.5),
        "clamp_soft_labels": lambda: random.chance(0.5),
        "same_image": lambda: random.of("keep", "mask"),
        "unmatched": lambda: random.of("roll", "shift"),
        "kl_student_temperature": lambda: random.of(0.3, 0.45, 1.0),
        "kl_teacher_temperature": lambda: random.of(0.3, 0.5, 1.0),
    }
    if preset.startswith("dalr"):
        menu |= {
            "intra_weight": lambda: random.of(0.2, 0.5),
            "consistency_weight": lambda: random.of(0.0, 0.01, 1.0),
            "cross_kl_weight": lambda: random.of(0.0, 0.5),
            "image_weight": lambda: random.of(0.0, 0.5),
            "intra_kl_weight": lambda: random.of(0.0, 0.5),
            "rank_weight": lambda: random.of(0.0, 2.0),
            "g2l_weight": lambda: random.of(0.0, 0.5),
            "caption_weight": lambda: random.of(0.0, 0.5),
            "soft_labels": lambda: random.of("none", "image", "caption", "consistency"),
            "caption_soft_labels": lambda: random.of("none", "image", "caption", "consistency"),
            "cross_kl_student": lambda: random.of("margin", "cosine"),
            "intra_kl_student": lambda: random.of("margin", "cosine"),
            "rank_student": lambda: random.of("margin", "cosine"),
            "rank_loss": lambda: random.of("listmle", "listnet"),
            "listmle_reduction": lambda: random.of("sum", "mean"),
            "listmle_eps": lambda: random.of(0.0, 1e-7, 1e-3),
            "rank_teacher_temperature": lambda: random.of(0.05, 0.5),
            "teacher_mix": lambda: random.of("features", "similarities"),
            "g2l_norm": lambda: random.of("axis", "token"),
            "g2l_unit_rows": lambda: random.chance(0.5),
            "g2l_mix": lambda: random.of("auto", "features", "losses"),
            "distil_text_batches": lambda: random.chance(0.5),
        }
    elif preset in ("mcse", "kdmcse"):
        menu["false_negative_threshold"] = lambda: random.of(0.0, 0.2, 0.5)
        menu["soft_labels"] = lambda: random.of("none", "image", "caption", "consistency")
    for key, value in menu.items():
        if random.chance(0.25):
            chosen[key] = value()
    chosen["teacher_similarity_dtype"] = _similarity_dtype(row, chosen, random)
    chosen.setdefault("image_projection", "learned")
    chosen.setdefault("token_projection", "learned")
    chosen["teacher_tokenizer"] = random.of("must_match", "retokenise")
    row.changes |= {f"objective.{key}": value for key, value in chosen.items()}
    _teachers(row, random)


def _similarity_dtype(row: Row, chosen: dict[str, Any], random: _Random) -> str:
    """Coarse scores tie often, and rounding in float32 decides a tie that float64 does not see."""
    if row.precision == "fp64" or chosen.get("rank_loss") == "listnet":
        return random.of("float16", "float32", "float64")
    return random.of("float32", "float64")


def _teachers(row: Row, random: _Random) -> None:
    """Teachers that every drawn weight could need; what no term uses must change nothing."""
    matching = row.changes["objective.teacher_tokenizer"] == "must_match"
    texts = ["features:same", "features:t1"] if not matching else ["features:same"]
    count = random.of(1, 2)
    mixed = row.changes.get("objective.teacher_mix") == "features" or (
        row.changes["objective.preset"] == "dalr-reference"
        and "objective.teacher_mix" not in row.changes
    )
    narrow = ["features:t1", "features:t0"] if not matching else ["features:t1", "features:t1"]
    chosen = narrow[:count] if mixed else (texts * 2)[:count]
    row.changes["teachers.text"] = chosen
    if row.changes["objective.preset"].startswith("dalr") and random.chance(0.12):
        kinds = [random.of("bert", "roberta") for _ in chosen]
        row.changes["teachers.text"] = [f"hf:{{shards}}/encoders/{kind}" for kind in kinds]
        row.changes["teachers.text_poolers"] = [
            random.of("cls_before_pooler", "mean", "cls") for _ in chosen
        ]
        # float32 rounding of an online teacher would decide between neighbours of a coarse grid
        row.changes["objective.teacher_similarity_dtype"] = random.of("float32", "float64")
    if count == 2 and random.chance(0.5):
        row.changes["teachers.text_weights"] = random.of([0.33, 0.67], [0.8, 0.2])
    row.changes["teachers.image"] = random.of("features:img", "features:near")
    row.changes["teachers.caption"] = "features:cap"
    _token_teachers(row, random)


def _token_teachers(row: Row, random: _Random) -> None:
    """Stored tokens are one teacher; encoders are as many as the sentence teachers, or one."""
    preset, texts = row.changes["objective.preset"], row.changes["teachers.text"]
    reference = preset == "dalr-reference"
    axis = row.changes.get("objective.g2l_norm", "axis" if reference else "token") == "axis"
    if axis or random.chance(0.3):
        encoders = ["hf:{shards}/encoders/bert", "hf:{shards}/encoders/roberta"]
        same = texts if texts[0].startswith("hf:") else encoders
        row.changes["teachers.tokens"] = same[: random.of(1, len(texts))]
    else:
        matching = row.changes["objective.teacher_tokenizer"] == "must_match"
        row.changes["teachers.tokens"] = ["features:tok2" if matching else "features:tok"]


def _optimizer(row: Row, random: _Random) -> None:
    steps = random.integer(7, 12)
    lr = 10 ** random.between(-4, -2.5)
    strict = row.precision == "fp64"
    row.changes |= {
        "optim.lr": float(f"{lr:.2e}"),
        "optim.steps": steps,
        "optim.warmup": random.integer(0, steps - 1) if random.chance(0.5) else 0,
        "optim.clip": random.of(0.0, 0.1, 1.0, 20.0),
        "optim.weight_decay": random.of(0.0, 0.01, 0.3),
        "optim.eps": random.of(1e-8, 1e-6) if strict else random.of(1e-6, 1e-5),
        "optim.betas": random.of([0.9, 0.999], [0.8, 0.95], [0.0, 0.5]),
        "optim.name": "sgd" if strict and random.chance(0.1) else "adamw",
    }
    if row.changes["objective.alternation"] == "proportional" and random.chance(0.2):
        row.changes |= {"optim.steps": 0, "optim.epochs": random.of(0.5, 0.6)}
        row.changes["optim.warmup"] = min(row.changes["optim.warmup"], 3)
    if random.chance(0.25):
        row.changes["optim.embedding_lr"] = float(f"{lr * random.of(0.1, 3.0):.2e}")


def _interruptions(row: Row, random: _Random) -> None:
    steps = row.changes["optim.steps"] or 5  # half an epoch has more
    row.changes["save.every_steps"] = random.of(0, 1, 3)
    if random.chance(0.5):
        row.changes["eval.graded_dev"] = "{shards}/graded.jsonl"
        row.changes["eval.every"] = random.of(0, 2, 3, 5)
    if not random.chance(0.35):
        return
    at = sorted({random.integer(1, steps - 1) for _ in range(random.of(1, 2, p=(0.7, 0.3)))})
    for step in at:
        how = random.of("STOP", "SIGTERM", "SIGKILL")
        ranks = row.ranks if random.chance(0.5) else random.of(1, 2, 4)
        micro = row.changes["batch.micro_size"]
        if row.changes["batch.global_size"] // ranks < micro:
            ranks = row.ranks
        row.stops.append(Stop(step, how, ranks))


BREAKS: dict[str, dict[str, Any]] = {
    "the batch does not divide": {"batch.global_size": 17},
    "micro batch above the share": {"batch.micro_size": 99},
    "fp64 under ZeRO": {"engine.kind": "zero2", "engine.precision": "fp64"},
    "no learned projection": {
        "objective.cross_weight": 0.1,
        "objective.image_projection": "identity", "objective.preset": "dalr",
        "teachers.image": "features:img", "objective.cross_kl_weight": 1.0,
    },
    "no such features": {"teachers.image": "features:none", "objective.preset": "mcse"},
    "a kept tail of weighted sources": {
        "objective.tail": "keep",
        "data.pairs": ["{shards}/train-000000.tar", "{shards}/train-000001.tar"],
        "data.pair_weights": [1.0, 2.0],
        "data.text": ["{shards}/text-*.tar"],
        "data.text_weights": [],
    },
    "warm-up beyond the run": {"optim.warmup": 99},
    "axis norm of stored tokens": {
        "objective.preset": "dalr", "objective.g2l_norm": "axis", "objective.g2l_weight": 1.0,
        "objective.intra_weight": 0.2, "teachers.tokens": ["features:tok"],
        "objective.teacher_tokenizer": "retokenise",
    },
    "teachers of two widths mixed": {
        "objective.preset": "dalr", "objective.teacher_mix": "features",
        "teachers.text": ["features:t0", "features:same"],
        "objective.teacher_tokenizer": "retokenise", "objective.intra_kl_weight": 1.0,
    },
    "a batch above the stream": {
        "batch.global_size": 160, "batch.micro_size": 0, "objective.tail": "drop",
    },
    "sentences above the positions": {"data.max_length": 64},
}  # fmt: skip


def impossible(row: Row) -> None:
    row.broken = list(BREAKS)[row.number // 15 % len(BREAKS)]
    if row.broken == "warm-up beyond the run":
        row.changes["optim.steps"] = 7
    row.stops = []
    row.ranks = 2 if row.broken == "the batch does not divide" else row.ranks
    row.changes |= BREAKS[row.broken]
