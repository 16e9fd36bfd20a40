"""Dropout whose masks depend on the row alone, not on where and with what it is computed.

A mask is a hash of (seed, step, global row, view, place in the model, position, feature). The same
row therefore meets the same mask at any number of ranks, in any chunk, at any padding and in any
order, and recomputation needs no saved random state. torch's own masks depend on all of these.

The hash is a chain over the axes of a tensor, so that the element (row, position, feature) has the
same value whatever the extents are: 64-bit steps (the finaliser of SplitMix64, Steele et al.,
OOPSLA 2014) down to the last axis, and one 32-bit step for each element (the multipliers of
``lowbias32``, https://github.com/skeeto/hash-prospector).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dalr_scale.errors import UserError
from dalr_scale.global_batch.keys import integer_key

ATTENTION = "row_keyed"


class RowKeys:
    """The keys of the rows that are being encoded; shared by all places of one model."""

    def __init__(self) -> None:
        self.rows_B: Tensor | None = None

    def set(self, seed: int, step: int, rows: Tensor, views: int) -> None:
        """Keys for global row numbers [b], each seen `views` times, view after view."""
        view_keys = [integer_key(seed, step, view) for view in range(views)]
        keys = [_mix64(rows.long() + key) for key in view_keys]
        self.rows_B = torch.cat(keys)

    def keep(self, place: int, shape: torch.Size, probability: float) -> Tensor:
        """Bool mask of a shape [B, ...]: False with `probability`, for this place of the model."""
        if self.rows_B is None or len(self.rows_B) != shape[0]:
            known = 0 if self.rows_B is None else len(self.rows_B)
            raise RuntimeError(f"row keys are set for {known} rows and {shape[0]} are encoded")
        state = _mix64(self.rows_B + integer_key(place))
        for extent in shape[1:-1]:
            state = _mix64(state.unsqueeze(-1) + torch.arange(extent, device=state.device))
        last = torch.arange(shape[-1], dtype=torch.int32, device=state.device)
        bits = _mix32(state.to(torch.int32).unsqueeze(-1) ^ _mix32(last))
        return bits >= round(probability * 2**32) - 2**31


class RowDropout(nn.Module):
    """Replaces an ``nn.Dropout``; attention reads its probability `p` too."""

    def __init__(self, p: float, place: int, keys: RowKeys) -> None:
        super().__init__()
        self.p, self.place, self.keys = p, place, keys

    def forward(self, x: Tensor) -> Tensor:
        """Drops elements of [B, ...] and scales the others by 1 / (1 - p)."""
        if not self.training:
            return x
        return _drop(x, self.p, self.place, self.keys)


def install_row_dropout(backbone: Any) -> RowKeys:
    """Replaces the dropout of a Hugging Face encoder, inside attention too; returns its keys.

    Raises:
        UserError: the model drops elements in a way that cannot be replaced (attention outside of
            transformers' attention interface, or calls of ``torch.nn.functional.dropout``).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    kind = backbone.config.model_type
    try:
        backbone.set_attn_implementation(ATTENTION)
    except ValueError as error:
        raise _refusal(kind) from error
    keys = RowKeys()
    for place, (name, module) in enumerate(list(backbone.named_modules())):
        module.row_dropout_place = place
        module.row_dropout_keys = keys
        if isinstance(module, nn.Dropout):
            parent = backbone.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], RowDropout(module.p, place, keys))
    if not _repeats(backbone, keys):
        raise _refusal(kind)
    return keys


def _refusal(kind: str) -> UserError:
    return UserError(
        f"a {kind} model draws dropout masks that cannot be keyed by row; set "
        "--batch.dropout_keys=rank"
    )


@torch.no_grad()
def _repeats(backbone: Any, keys: RowKeys) -> bool:
    """Whether two passes agree although torch's generator has moved on in between."""
    training = backbone.training
    backbone.train()
    device = next(backbone.parameters()).device
    keys.set(0, 0, torch.arange(2, device=device), views=1)
    ids = torch.ones(2, 4, dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[]):
        passes = [
            backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            for _ in range(2)
        ]
    backbone.train(training)
    return torch.equal(*passes)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over [B, heads, L, width] with keyed dropout of its weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    if module.training:
        weights = _drop(weights, dropout, module.row_dropout_place, module.row_dropout_keys)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _drop(x: Tensor, p: float, place: int, keys: RowKeys) -> Tensor:
    if p == 0.0:
        return x
    return x * keys.keep(place, x.shape, p) / (1 - p)


def _mix64(x: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit moves about half of the output bits."""
    x = (x ^ _shift(x, 30, 64)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27, 64)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16, 32)) * 0x7FEB352D
    x = (x ^ _shift(x, 15, 32)) * -0x7B935975
    return x ^ _shift(x, 16, 32)


def _shift(x: Tensor, count: int, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> count) & (2 ** (bits - count) - 1)
