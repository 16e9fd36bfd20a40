"""tevatron's retriever with ``--grad_cache``: its model, its GradCacheTrainer, its arguments.

``GradCacheTrainer`` hands GradCache a loss without a temperature, so the reference has scale 1.
https://github.com/texttron/tevatron
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers.case import CHUNK, Job, pairs, tokenize, trainer_arguments

if TYPE_CHECKING:
    from torch import nn


def step(job: Job) -> nn.Module:
    """One step as ``tevatron.retriever.driver.train --grad_cache`` sets it up."""
    from tevatron.retriever.arguments import ModelArguments, TevatronTrainingArguments
    from tevatron.retriever.gc_trainer import GradCacheTrainer
    from tevatron.retriever.modeling import DenseModel

    arguments = TevatronTrainingArguments(
        **trainer_arguments(job),
        grad_cache=True,
        gc_q_chunk_size=CHUNK,
        gc_p_chunk_size=CHUNK,
        remove_unused_columns=False,
    )
    model_arguments = ModelArguments(
        model_name_or_path=str(job.model), pooling="mean", normalize=True, temperature=1.0
    )
    model = DenseModel.build(model_arguments, arguments, add_pooling_layer=False)
    model = model.to(job.torch_dtype)
    queries, positives = pairs()

    def collate(rows: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        chosen = [[texts[row] for row in rows] for texts in (queries, positives)]
        return tokenize(job.model, chosen[0]), tokenize(job.model, chosen[1])

    trainer = GradCacheTrainer(
        model=model, args=arguments, train_dataset=list(range(len(queries))), data_collator=collate
    )
    trainer.train()
    return model.encoder
