"""In which precision an engine computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from dalr_scale.config import EngineConfig

Precision = Literal["fp32", "bf16", "fp64"]


def resolve_precision(engine: EngineConfig) -> Precision:
    """``auto`` is bf16 where an accelerator computes in it, fp32 elsewhere."""
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
