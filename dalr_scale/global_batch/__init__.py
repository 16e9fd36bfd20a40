"""One optimizer step over a global batch, whatever chunks and ranks it is spread over.

A library that knows no model: what is encoded and which loss is taken come in as a `Task`, of which
`Functions` is the one for two plain functions. See ``examples/global_batch.py``.
"""

from dalr_scale.global_batch.chunks import Chunk, Place
from dalr_scale.global_batch.step import GlobalBatchStep
from dalr_scale.global_batch.task import Functions, States, Task, Terms

__all__ = ["Chunk", "Functions", "GlobalBatchStep", "Place", "States", "Task", "Terms"]
