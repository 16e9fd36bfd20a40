"""Angular margin on cosines, without inverse trigonometric functions.

The margin of KDMCSE (arXiv 2403.17486), also used by DALR (arXiv 2506.21096), lowers the angle of
a negative pair by ``m * w``. With ``theta = acos(c)`` the identity

    cos(theta - m w) = c cos(m w) + sqrt(1 - c^2) sin(m w)

gives the same value, and unlike ``acos`` has a finite gradient at ``c = 1`` and ``c = -1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Smallest 1 - c^2 that enters the square root; below it the root is constant.
MIN_SINE_SQUARED = {torch.float32: 1e-7, torch.float64: 1e-14}


def diagonal_mask(cosines_RN: Tensor, first_column: int) -> Tensor:
    """True where column ``i + first_column`` is the positive of row i; bool ``[R, N]``."""
    mask_RN = torch.zeros_like(cosines_RN, dtype=torch.bool)
    mask_RN.diagonal(first_column).fill_(True)
    return mask_RN


def angular_margin(
    cosines_RN: Tensor, first_column: int, margin: float, soft_RN: Tensor | None = None
) -> Tensor:
    """Cosines after the margin: ``cos(theta - m w)`` for negatives with ``theta > m``.

    Positives, and negatives already closer than ``m``, keep their cosine; the jump at
    ``theta = m`` is part of the published method.

    Args:
        cosines_RN: Cosines ``[R, N]``, float32 or float64.
        first_column: Column of the positive of row 0.
        margin: ``m`` in radians.
        soft_RN: Constant soft labels s with ``w = 1 - s``; ``None`` means ``w = 1``.

    Returns:
        Cosines ``[R, N]`` of the same type.
    """
    if margin == 0.0:
        return cosines_RN
    gate_RN = cosines_RN.detach() < math.cos(margin)
    gate_RN.diagonal(first_column).fill_(False)
    # Ungated elements are replaced before the root: should its derivative be infinite there, the
    # zero from `where` would make it NaN (pytorch/pytorch#15506).
    safe_RN = torch.where(gate_RN, cosines_RN, 0.0)
    sine_squared_RN = (1.0 - safe_RN) * (1.0 + safe_RN)
    sine_RN = sine_squared_RN.clamp_min(MIN_SINE_SQUARED[cosines_RN.dtype]).sqrt()
    if soft_RN is None:
        shifted_RN = safe_RN * math.cos(margin) + sine_RN * math.sin(margin)
    else:
        angle_RN = margin * (1.0 - soft_RN)
        shifted_RN = safe_RN * angle_RN.cos() + sine_RN * angle_RN.sin()
    return torch.where(gate_RN, shifted_RN, cosines_RN)
