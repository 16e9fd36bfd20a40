"""Matrix products of a call: 16-bit or float32 operands, sums in float32.

Library products everywhere. On CPU (the interpreter) 16-bit operands are multiplied in float32,
which is what the tensor cores do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Rows of a product that is added through a temporary, where no library call adds in float32.
ADD_ROWS = 8192


def scores(rows: Tensor, cols: Tensor, out: Tensor) -> None:
    """``out = rows @ cols.T`` in the type of the operands, summed in float32."""
    if rows.is_cuda or rows.dtype == torch.float32:
        torch.mm(rows, cols.T, out=out)
    else:
        out.copy_(rows.float() @ cols.float().T)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """``total += left @ right`` in float32; `first` overwrites."""
    beta = 0.0 if first else 1.0
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif not left.is_cuda:
        torch.addmm(total, left.float(), right.float(), beta=beta, out=total)
    elif first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    elif _adds_in_float32(total.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        for start in range(0, total.shape[0], ADD_ROWS):
            part = slice(start, start + ADD_ROWS)
            total[part] += torch.mm(left[part], right, out_dtype=torch.float32)


@functools.cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether addmm takes 16-bit operands with a float32 sum (torch 2.8 had only mm for that)."""
    ones = torch.ones(16, 16, dtype=torch.float16, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17.0).all())


@contextmanager
def full_sums(device: torch.device) -> Iterator[None]:
    """Forbid library products to add partial sums in 16 bit."""
    if device.type != "cuda":
        yield
        return
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction = before
