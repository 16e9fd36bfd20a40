"""This package's own step of a global batch."""

from __future__ import annotations

from typing import Any

import torch
from peers.case import (
    CHUNK,
    RATE,
    SCALE,
    STAGES,
    Encoder,
    Job,
    Unsupported,
    load_bert,
    pairs,
    tokenize,
)
from torch import Tensor, nn
from torch.nn import functional

from dalr_scale.config import EngineConfig
from dalr_scale.distributed.world import start_world
from dalr_scale.engines.build import build_engine
from dalr_scale.global_batch import Functions, GlobalBatchStep, States

SIDES = ("query", "positive")


def encode(model: nn.Module, rows: Any) -> States:
    return {side: model(**rows[side]) for side in SIDES}


def info_nce(model: nn.Module, rows: States, columns: States, first: int) -> Tensor:
    scores = SCALE * rows["query"] @ columns["positive"].T
    return functional.cross_entropy(scores, first + torch.arange(len(scores)))


def step(job: Job) -> nn.Module:
    """One SGD step of rate ``RATE``; returns the BERT with its new weights."""
    if job.engine in STAGES and job.dtype != "float32":
        raise Unsupported("DeepSpeed trains no float64")
    world = start_world(timeout_minutes=2, threads=1)
    encoder = Encoder(load_bert(job))
    settings = EngineConfig(
        kind=job.engine,  # type: ignore[arg-type]
        precision="fp64" if job.dtype == "float64" else "fp32",
        ds_config=own_file(job) if job.engine == "zero3" else "",
    )
    optimizer = torch.optim.SGD(encoder.parameters(), RATE)
    engine, _ = build_engine(encoder, optimizer, settings, rows=job.rows, clip=0.0, world=world)
    sides = zip(SIDES, pairs(), strict=True)
    batch = {side: tokenize(job.model, texts[job.own]) for side, texts in sides}
    task = Functions(encode, info_nce)
    GlobalBatchStep(engine, task, chunk_rows=CHUNK).backward(batch, step=0)
    engine.step(RATE)
    return encoder.bert


def own_file(job: Job) -> str:
    """A copy of the committed settings in which no tensor is too small to be partitioned."""
    import json

    from dalr_scale.engines.ds_config import stage_template

    template = stage_template(job.engine)
    template["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    job.work.mkdir(parents=True, exist_ok=True)
    file = job.work / f"ds_config-{job.rank}.json"
    file.write_text(json.dumps(template), encoding="utf-8")
    return str(file)
