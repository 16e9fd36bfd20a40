"""sentence-transformers through its own trainer, as its documentation runs it.

``torchrun`` or ``accelerate launch`` starts a script with ``SentenceTransformerTrainer``; DeepSpeed
comes in by ``SentenceTransformerTrainingArguments(deepspeed=...)``.
https://sbert.net/docs/sentence_transformer/training/distributed.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peers.case import CHUNK, SCALE, Job, pairs, trainer_arguments

if TYPE_CHECKING:
    from torch import nn


def cached(job: Job) -> nn.Module:
    """One step of CachedMultipleNegativesRankingLoss(gather_across_devices=True)."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    return _step(
        job,
        lambda model: CachedMultipleNegativesRankingLoss(
            model, scale=SCALE, mini_batch_size=CHUNK, gather_across_devices=True
        ),
    )


def uncached(job: Job) -> nn.Module:
    """The same loss without a cache or chunks: a check of the method on every engine."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    return _step(
        job,
        lambda model: MultipleNegativesRankingLoss(model, scale=SCALE, gather_across_devices=True),
    )


def accumulated(job: Job) -> nn.Module:
    """Gradient accumulation over chunks, each with negatives of its own: what chunking costs."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    return _step(
        job,
        lambda model: MultipleNegativesRankingLoss(model, scale=SCALE, gather_across_devices=True),
        chunks=job.rows // CHUNK,
    )


def _step(job: Job, make_loss: Callable[[Any], Any], chunks: int = 1) -> nn.Module:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words: Any = Transformer(str(job.model), model_kwargs={"add_pooling_layer": False})
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[words, pooling], device="cpu").to(job.torch_dtype)
    arguments = trainer_arguments(job)
    if chunks > 1:
        arguments["per_device_train_batch_size"] = job.rows // chunks
        arguments["gradient_accumulation_steps"] = chunks
        if "deepspeed" in arguments:
            arguments["deepspeed"]["train_micro_batch_size_per_gpu"] = job.rows // chunks
            arguments["deepspeed"]["gradient_accumulation_steps"] = chunks
    queries, positives = pairs()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=Dataset.from_dict({"anchor": queries, "positive": positives}),
        loss=make_loss(model),
    )
    trainer.train()
    return words.auto_model
