"""One optimizer step over a global batch, whatever chunks and ranks it is spread over.

A library that knows no model: what is encoded and which loss is taken come in as a `Task`, of which
`Functions` is the one for two plain functions. See ``examples/global_batch.py``.
"""

from dalr_scale.global_batch.chunks import Chunk, Place
from dalr_scale.global_batch.step import GlobalBatchStep
from dalr_scale.global_batch.task import Functions, States, Task, Terms
from dalr_scale.global_batch.vote import Outcome, Vote

__all__ = [
    "Chunk",
    "Functions",
    "GlobalBatchStep",
    "Outcome",
    "Place",
    "States",
    "Task",
    "Terms",
    "Vote",
]
