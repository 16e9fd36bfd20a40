"""The GradCache package, as its README runs it: DDP models, distributed loss, one cache step.

The README says nothing of DeepSpeed; there an engine takes the place of the DDP model (which rules
out ``no_sync_except_last``), and ``engine.step()`` follows. https://github.com/luyug/GradCache
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peers.case import (
    CHUNK,
    RATE,
    SCALE,
    STAGES,
    Encoder,
    Job,
    Unsupported,
    ds_config,
    load_bert,
    pairs,
    tokenize,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def step(job: Job) -> nn.Module:
    """The cache step, then the optimizer's."""
    return _step(job, coalesce=False)


def coalesced(job: Job) -> nn.Module:
    """The cache step in a context of DeepSpeed for several backwards before one reduction."""
    return _step(job, coalesce=True)


def _step(job: Job, *, coalesce: bool) -> nn.Module:
    """One step with ``DistributedContrastiveLoss``, times ranks.

    The loss of the package lets gradients flow to a rank's own rows only, so the mean that DDP
    takes is too small by the number of ranks; tevatron, by the same author, multiplies by it.
    """
    from grad_cache import GradCache
    from grad_cache.loss import DistributedContrastiveLoss

    dist.init_process_group("gloo")
    encoder = Encoder(load_bert(job))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=RATE)
    contrast = DistributedContrastiveLoss()

    def loss(queries: Tensor, positives: Tensor) -> Tensor:
        return contrast(SCALE * queries, positives) * job.ranks

    model: Any
    if job.engine in STAGES:
        model = _deepspeed_engine(job, encoder, optimizer)
    else:
        model = DistributedDataParallel(encoder, find_unused_parameters=True)
    cache = GradCache(models=[model, model], chunk_sizes=CHUNK, loss_fn=loss)
    inputs = [tokenize(job.model, texts[job.own]) for texts in pairs()]
    if job.engine in STAGES:
        with model.coalesce_grad_reduction() if coalesce else nullcontext():
            cache(*inputs)
        model.step()
    else:
        cache(*inputs, no_sync_except_last=True)
        optimizer.step()
    return encoder.bert


def _deepspeed_engine(job: Job, encoder: nn.Module, optimizer: Any) -> Any:
    if job.dtype != "float32":
        raise Unsupported("DeepSpeed trains no float64")
    import deepspeed

    engine, *_ = deepspeed.initialize(model=encoder, optimizer=optimizer, config=ds_config(job))
    return engine
