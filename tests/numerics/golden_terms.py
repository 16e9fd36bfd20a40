"""The golden vectors, and the loss terms of the published code in terms of the public functions.

The files hold synthetic inputs with the values and gradients that the published DALR loss gives
for them in float64. File b has every hyper-parameter different from its default.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dalr_kernels as K
import numpy as np
import torch
from torch import Tensor

DIRECTORY = Path(__file__).parent / "golden"
LEAVES = ("z1", "z2", "p1", "p2", "v")
TERMS = (
    "contrastive",
    "cross_modal_contrastive",
    "cross_modal_kl",
    "intra_modal_kl",
    "rank_listnet",
    "rank_listmle",
    "global_to_local",
)


@functools.cache
def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Arrays and hyper-parameters of golden file "a" or "b"."""
    with np.load(DIRECTORY / f"golden_{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key != "hyper"}
        return arrays, json.loads(str(archive["hyper"]))


class Golden:
    """Inputs of one file as tensors, sliced to the rows of one simulated rank.

    Attributes:
        leaves: The differentiable inputs, whole; gradients of all ranks add up in them.
        rows: Slice of the rows of this rank; columns are always all of them.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.arrays, self.hyper = load(name)
        inputs = {k[3:]: v for k, v in self.arrays.items() if k.startswith("in.")}
        self.x = {key: torch.tensor(value, dtype=dtype) for key, value in inputs.items()}
        self.leaves = {key: self.x[key].requires_grad_() for key in LEAVES}
        self.size = self.x["z1"].shape[0]
        self.rows = slice(0, self.size)

    def local(self, key: str) -> Tensor:
        """Rows of an input that belong to this rank."""
        return self.x[key][self.rows]

    def similarity(self, *weighted: tuple[float, Tensor]) -> K.Similarity:
        """Weighted cosines of constants with themselves, this rank's rows by all columns."""
        return K.Similarity(tuple((w, t[self.rows], t) for w, t in weighted))

    def s_vv(self) -> K.Similarity:
        return self.similarity((1.0, self.x["image_teacher"]))

    def s_tt(self) -> K.Similarity:
        """Cosine of the un-normalised mix of both text teachers (published form)."""
        alpha = self.hyper["alpha"]
        mix = alpha * self.x["text_teacher_1"] + (1 - alpha) * self.x["text_teacher_2"]
        return self.similarity((1.0, mix))

    def ranking(self) -> K.Similarity:
        """Mix of both teachers' cosines."""
        alpha = self.hyper["alpha"]
        first, second = self.x["text_teacher_1"], self.x["text_teacher_2"]
        return self.similarity((alpha, first), (1 - alpha, second))

    def image_ids(self) -> dict[str, Tensor]:
        """Two rows per image."""
        ids = torch.arange(self.size) // 2
        return {"row_ids": ids[self.rows], "col_ids": ids}

    def student(self) -> dict[str, float]:
        return {"margin": self.hyper["margin1"], "temperature": self.hyper["temp"]}

    def token_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.local("token_features"),
            self.local("token_mask"),
            self.x["token_features"],
            self.x["token_mask"],
        )


def contrastive(g: Golden, **how: Any) -> Tensor:
    return K.info_nce(g.local("z1"), g.x["z2"], **g.student(), **how)


def cross_modal_contrastive(g: Golden, **how: Any) -> Tensor:
    how.setdefault("margin", g.hyper["margin2"])
    how.setdefault("soft_labels", g.s_vv())
    losses = [
        K.info_nce(g.local(p), g.x["v"], temperature=g.hyper["temp_vl"], **how)
        for p in ("p1", "p2")
    ]
    return (losses[0] + losses[1]) / 2


def cross_modal_kl(g: Golden, **how: Any) -> Tensor:
    images = K.alignment_kl(g.local("image_teacher"), g.x["z1"], g.s_vv(), **g.student(), **how)
    texts = K.alignment_kl(g.local("z1"), g.x["image_teacher"], g.s_tt(), **g.student(), **how)
    return (images + texts) / 2


def intra_modal_kl(g: Golden, **how: Any) -> Tensor:
    return K.alignment_kl(g.local("z1"), g.x["z2"], g.s_tt(), **g.student(), **how)


def rank_listnet(g: Golden, **how: Any) -> Tensor:
    how.setdefault("teacher_temperature", g.hyper["tau2"])
    return K.list_net(g.local("z1"), g.x["z2"], g.ranking(), **g.student(), **how)


def rank_listmle(g: Golden, **how: Any) -> Tensor:
    how = {"reduction": "sum", "eps": 1e-7} | how
    return K.list_mle(g.local("z1"), g.x["z2"], g.ranking(), **g.student(), **how)


def global_to_local(g: Golden, **how: Any) -> Tensor:
    how = {"norm": "axis", "unit_rows": False} | how
    tokens = g.token_inputs()
    return K.global_to_local(g.local("z1"), *tokens, temperature=g.hyper["temp"], **how)


PUBLISHED: dict[str, Callable[..., Tensor]] = {name: globals()[name] for name in TERMS}
