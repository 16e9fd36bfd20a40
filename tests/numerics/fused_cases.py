"""Inputs, truth and limits for the fused kernels; used under the interpreter and on a GPU.

Needs only torch and the kernels. The truth is the dense definition in float64 on the same rounded
inputs; the limit is the error of plain torch in the same type, plus a tolerance.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import dalr_kernels as K
import torch
from dalr_kernels import reference
from dalr_kernels.similarity import unit
from torch import Tensor

# Largest excess over the error of plain torch, relative to the largest entry: loss, gradient.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (3e-4, 2e-3),
    torch.bfloat16: (3e-4, 6e-3),
}
UPSTREAM = 1.7
# (rows, columns, offset of the positives, width)
SHAPES = (
    (1, 65, 3, 33),
    (33, 257, 100, 24),
    (13, 131, 4, 97),
    (5, 7, 0, 96),
    (16, 16, 0, 1),
    (2, 509, 507, 64),
    (1, 1, 0, 4),
)
# Name: which terms, margins of (info_nce, alignment_kl, list_net), further options.
TERMS: dict[str, dict[str, Any]] = {
    "plain": {"nce": True},
    "margin, ids": {"nce": True, "margins": (1, 0, 0), "ids": True},
    "soft, clamped": {"nce": True, "margins": (1, 0, 0), "soft": True, "clamp": True},
    "soft, mask": {"nce": True, "margins": (1, 0, 0), "soft": True, "mask": True, "ids": True},
    "soft, wide angle": {"nce": True, "margins": (1, 0, 0), "soft": True, "margin": 0.9},
    "kl": {"kl": True},
    "kl of the margin": {"kl": True, "margins": (0, 1, 0), "kl_temperature": 0.05},
    "list_net": {"net": True},
    "triple, plain": {"nce": True, "kl": True, "net": True},
    "triple, one margin, two teachers": {
        "nce": True, "kl": True, "net": True, "margins": (1, 1, 1), "ids": True,
        "kl_temperature": 0.05, "second_teacher": True,
    },
    "triple, soft by the teacher": {
        "nce": True, "kl": True, "net": True, "margins": (1, 0, 1), "soft": "teacher",
    },
    "online": {"nce": True, "margins": (1, 0, 0), "temperature": 0.004, "ids": True},
    "triple, online": {
        "nce": True, "kl": True, "net": True, "margins": (1, 1, 0), "temperature": 0.01,
        "kl_temperature": 0.02, "teacher_temperature": 0.01,
    },
}  # fmt: skip


@dataclass
class Case:
    """Inputs of one call: float64 numbers that are exact in `dtype`."""

    rows: Tensor
    cols: Tensor
    first: Tensor
    second: Tensor
    ids: Tensor
    offset: int
    dtype: torch.dtype
    options: dict[str, Any]
    margin: float

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + len(self.rows))

    def terms(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `row_losses` with constants of this type."""
        first, second, o = self.first.to(dtype), self.second.to(dtype), self.options
        teacher = K.Similarity(((0.33, first[self.own], first), (0.67, second[self.own], second)))
        other = K.Similarity(((-0.4, second[self.own], second),))
        margins = [self.margin * on for on in o.get("margins", (0, 0, 0))]
        temperature = o.get("temperature", 0.05)
        found: dict[str, Any] = {"teacher": teacher, "col_offset": self.offset}
        if o.get("nce"):
            ids = {"row_ids": self.ids[self.own], "col_ids": self.ids} if o.get("ids") else {}
            labels = {True: other, "teacher": teacher}.get(o.get("soft", False))
            found["info_nce"] = K.InfoNCE(
                temperature, margins[0], soft_labels=labels,
                clamp_soft_labels=o.get("clamp", False),
                mask_above=(teacher, 0.05) if o.get("mask") else None, **ids,
            )  # fmt: skip
        if o.get("kl"):
            found["alignment_kl"] = K.AlignmentKL(
                0.45, o.get("teacher_temperature", 0.5), margins[1], o.get("kl_temperature", 1.0),
                weight=0.2,
            )  # fmt: skip
        if o.get("net"):
            found["list_net"] = K.ListNet(
                temperature, o.get("teacher_temperature", 0.05), margins[2], weight=0.3,
                teacher=other if o.get("second_teacher") else None,
            )  # fmt: skip
        return found

    def run(self, impl: str, dtype: torch.dtype, **how: Any) -> list[Tensor]:
        """Losses and the gradients by rows and columns under an upstream gradient."""
        leaves = [t.to(dtype).requires_grad_() for t in (self.rows, self.cols)]
        found = K.row_losses(*leaves, **self.terms(dtype), impl=impl, **how)
        grads = torch.autograd.grad(UPSTREAM * found.total, leaves)
        return [found.total.detach(), *(x for x in found[1:] if x is not None), *grads]

    def truth(self) -> list[Tensor]:
        return self.run("reference", torch.float64)

    def eager(self) -> list[Tensor]:
        """Plain torch: unit vectors and products in the input type, losses in float32."""
        leaves = [t.to(self.dtype).requires_grad_() for t in (self.rows, self.cols)]
        terms = self.terms(self.dtype)
        teacher, offset = terms.pop("teacher"), terms.pop("col_offset")
        cosines = (unit(leaves[0]) @ unit(leaves[1]).T).float()

        def block(similarity: K.Similarity, start: int, stop: int) -> Tensor:
            parts = [w * (unit(a) @ unit(b).T).float() for w, a, b in similarity.factors]
            return torch.stack(parts).sum(0)

        named = {
            name: replace(term, teacher=term.teacher or teacher) if name != "info_nce" else term
            for name, term in terms.items()
        }
        means = {name: t.losses(cosines, 0, offset, block).mean() for name, t in named.items()}
        total = torch.stack([named[name].weight * value for name, value in means.items()]).sum()
        grads = torch.autograd.grad(UPSTREAM * total, leaves)
        return [total.detach(), *(value.detach() for value in means.values()), *grads]

    def excess(self, got: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> float:
        """Largest error beyond plain torch's, in units of the tolerance; above 1 is a failure."""
        worst = 0.0
        for index, (ours, plain, exact) in enumerate(zip(got, eager, truth, strict=True)):
            if not torch.isfinite(ours).all():
                return math.inf
            gradient = index >= len(got) - 2
            tolerance = TOLERANCES[self.dtype][int(gradient)]
            # Losses are differences of logits, gradients of probabilities: both of order one.
            scale = max(float(exact.abs().max()), 0.5 if gradient else 1.0)
            error = float((ours.double() - exact).abs().max())
            allowed = float((plain.double() - exact).abs().max())
            worst = max(worst, (error - allowed) / (tolerance * scale))
        return worst


def make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    name: str,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Clustered inputs whose cosines keep clear of the margin's gate, where the loss jumps."""
    num_rows, num_cols, offset, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    cols = draw(num_cols, width) + 0.5 * draw(1, width)
    rows = cols[offset : offset + num_rows] + 0.7 * draw(num_rows, width)
    first, second = draw(num_cols, 12), draw(num_cols, 20)
    ids = torch.randint(-1, max(2, num_cols // 3), (num_cols,), generator=generator)
    rounded = [t.to(dtype).double().to(device) for t in (rows, cols, first, second)]
    options = TERMS[name]
    margin = clear_margin(rounded[0], rounded[1], options.get("margin", 0.18))
    return Case(*rounded, ids.to(device), offset, dtype, options, margin)


def clear_margin(rows: Tensor, cols: Tensor, wanted: float) -> float:
    """The angle near the wanted one whose cosine is farthest from all cosines of the pairs."""
    cosines = (unit(rows) @ unit(cols).T).flatten()
    angles = [wanted * (1.0 + step / 100) for step in range(-20, 21)]
    gaps = [float((cosines - math.cos(angle)).abs().min()) for angle in angles]
    return angles[max(range(len(angles)), key=gaps.__getitem__)]


def pairwise() -> list[tuple[str, str, torch.dtype, tuple[int, int, int, int]]]:
    """Every term with every mode, cycling through types and shapes."""
    modes, dtypes = ("workspace", "stream"), tuple(TOLERANCES)
    found = []
    for index, (name, mode) in enumerate(itertools.product(TERMS, modes)):
        dtype = dtypes[(index + index // 6) % len(dtypes)]
        found.append((name, mode, dtype, SHAPES[(index + index // 7) % len(SHAPES)]))
    return found


__all__ = ["SHAPES", "TERMS", "TOLERANCES", "Case", "make", "pairwise", "reference"]
