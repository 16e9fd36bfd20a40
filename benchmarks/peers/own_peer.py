"""This package's own step of a global batch, on the model of the case. Not connected yet.

``step`` has to make one SGD step of rate ``RATE`` on ``Encoder(load_bert(job))`` with the pairs
``job.own`` of ``pairs()``, in chunks of ``CHUNK``, with InfoNCE at the inverse temperature
``SCALE`` over the pairs of all ranks, on the engine ``job.engine``, and return the BERT.
"""

from __future__ import annotations

from peers.case import Job, Unsupported
from torch import nn


def step(job: Job) -> nn.Module:
    """One step; returns the BERT with its new weights.

    Raises:
        Unsupported: for a precision that the engine does not train.
    """
    raise Unsupported("not connected yet")
