"""Heads on top of the sentence state: the sentence head, grounding heads, plain projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SentenceHead(nn.Module):
    """z = tanh(W h + b), the vector that the text-text losses see (DALR, as in SimCSE)."""

    def __init__(self, width: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.normal_(self.linear.weight, std=init_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, state_BH: Tensor) -> Tensor:
        return torch.tanh(self.linear(state_BH))


class GroundingHead(nn.Module):
    """p = unit(tanh(W h + b)), the shared image-text space; of h itself, not of z (MCSE).

    Returned in the precision of the input, in which it also travels: unit length is then kept to
    its rounding only, and losses normalise what they get.
    """

    def __init__(self, width: int, grounding_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, grounding_width)

    def forward(self, state_BH: Tensor) -> Tensor:
        grounded = torch.tanh(self.linear(state_BH))
        wide = grounded if grounded.dtype == torch.float64 else grounded.float()
        return nn.functional.normalize(wide, dim=-1, eps=1e-8).to(grounded.dtype)


def projection(width: int, target: int, init_std: float = 0.02) -> nn.Linear:
    """A bias-free map that lets z be compared with features of another width."""
    linear = nn.Linear(width, target, bias=False)
    nn.init.normal_(linear.weight, std=init_std)
    return linear
