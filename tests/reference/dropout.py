"""Row-keyed dropout from its definition, with numpy's unsigned integers.

The mask of an element is a hash of (seed, step, global row, view, place in the model, position,
feature): SplitMix64's finaliser down to the last axis, one step of ``lowbias32`` along it. A place
is the number of a module in ``named_modules()``.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATTENTION = "reference_rows"


class Masks:
    """Masks of the batch that is being encoded: view 0 of all rows, then view 1."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rows = np.zeros(0, np.uint64)

    def start(self, step: int, rows: int) -> None:
        numbers = np.arange(rows, dtype=np.uint64)
        views = [_splitmix(numbers + _key(self.seed, step, view)) for view in (0, 1)]
        self.rows = np.concatenate(views)

    def drop(self, x: Tensor, p: float, place: int) -> Tensor:
        """Inverted dropout of [2 B, ...] with probability p."""
        if p == 0:
            return x
        state = _splitmix(self.rows + _key(place))
        for extent in x.shape[1:-1]:
            state = _splitmix(state[..., None] + np.arange(extent, dtype=np.uint64))
        last = _lowbias(np.arange(x.shape[-1], dtype=np.uint32))
        bits = _lowbias(state.astype(np.uint32)[..., None] ^ last)
        # the hash is compared as a signed number: its sign bit counts as the lowest value
        kept = (bits ^ np.uint32(1 << 31)) >= round(p * 2**32)
        return x * torch.from_numpy(kept) / (1 - p)


class _Dropout(nn.Module):
    def __init__(self, p: float, place: int, masks: Masks) -> None:
        super().__init__()
        self.p, self.place, self.masks = p, place, masks

    def forward(self, x: Tensor) -> Tensor:
        return self.masks.drop(x, self.p, self.place) if self.training else x


def key_by_row(backbone: Any, seed: int) -> Masks:
    """Makes every dropout of a Hugging Face encoder, attention's included, row-keyed."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    backbone.set_attn_implementation(ATTENTION)
    masks = Masks(seed)
    for place, (name, module) in enumerate(list(backbone.named_modules())):
        module.reference_place = place
        object.__setattr__(module, "reference_masks", masks)
        if isinstance(module, nn.Dropout):
            parent, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(parent), leaf, _Dropout(module.p, place, masks))
    return masks


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1)
    if module.training:
        weights = module.reference_masks.drop(weights, dropout, module.reference_place)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), weights


def _key(*parts: object) -> np.uint64:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little") >> 1)


def _splitmix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _lowbias(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def own_copy(config: Any) -> Any:
    """A model configuration without the attention that the run under test has chosen."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config
