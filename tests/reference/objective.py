"""The total loss of a batch, from the states of the encoder and the frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference import losses
from reference.losses import Discontinuities, cosines, cross_entropy, row_kl, unit, with_margin

if TYPE_CHECKING:
    from dalr_scale.config import Config

BATCH_NORM_EPS = 1e-5
TIE = {"fp64": 2.0**-40, "fp32": 2.0**-20}  # scores closer than this are ties in ListMLE


@dataclass
class Frozen:
    """What the teachers say about a batch.

    image [B, d_v], caption [B, d_c] or None; text: [B, H_k] a teacher; tokens: ([B, T, H_t], bool
    [B, T]) a teacher; image_ids [B], -1 in a text batch.
    """

    image_ids: Tensor
    image: Tensor | None
    caption: Tensor | None
    text: list[Tensor]
    tokens: list[tuple[Tensor, Tensor]]


class Objective:
    """L_con alone on text, L_con + lambda (cross-modal) + mu (intra-modal) on pairs."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        self.o, self.seed, self.weights = config.objective, config.run.seed, weights
        self.alpha = mixing_weights(config)
        self.token_alpha = token_weights(config)
        self.tie = TIE["fp64" if config.engine.precision == "fp64" else "fp32"]

    def __call__(
        self, h_1: Tensor, h_2: Tensor, kind: str, frozen: Frozen, step: int
    ) -> tuple[Tensor, dict[str, Tensor], Discontinuities]:
        """Total loss, every term by its name, and the closest jump."""
        o, seen = self.o, Discontinuities()
        batch = _Batch(self, h_1, h_2, kind, frozen, step, seen)
        terms = {"con": batch.contrastive()}
        total = terms["con"]
        groups = [(o.cross_weight, batch.cross_terms())] if kind == "pair" else []
        if kind == "pair" or o.distil_text_batches:
            groups.append((o.intra_weight, batch.intra_terms()))
        for group, members in groups:
            for name, (weight, term) in members.items():
                if group * weight != 0:
                    terms[name] = term()
                    total = total + group * weight * terms[name]
        return total, terms, seen


class _Batch:
    """One batch: similarity matrices, and the terms that are made of them."""

    def __init__(self, objective, h_1, h_2, kind, frozen, step, seen) -> None:
        self.o, self.weights, self.alpha = objective.o, objective.weights, objective.alpha
        self.token_alpha, self.seed = objective.token_alpha, objective.seed
        self.tie = objective.tie
        self.h, self.kind, self.frozen, self.step, self.seen = (h_1, h_2), kind, frozen, step, seen
        self.z_1, self.z_2 = (torch.tanh(self._linear("sentence_head.linear", h)) for h in self.h)
        on = kind == "pair" or self.o.margin_in_text_batches
        self.margin = self.o.margin if on else 0.0
        self.plain = cosines(self.z_1, self.z_2)
        self.s = with_margin(self.plain, self.margin, None, seen) / self.o.temperature
        ids = frozen.image_ids
        same = (ids.unsqueeze(1) == ids) & (ids >= 0) & ~torch.eye(len(ids), dtype=torch.bool)
        self.same = same
        self.masked = same if self.o.same_image == "mask" else torch.zeros_like(same)
        self._aligned: tuple[Tensor, Tensor] | None = None

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def contrastive(self) -> Tensor:
        return cross_entropy(self.s, self.masked)

    def cross_terms(self):
        o = self.o
        return {
            "cons": (o.consistency_weight, self.consistency),
            "cma": (o.cross_kl_weight, self.cross_kl),
            "xce": (o.image_weight, lambda: self.grounding("image", o.soft_labels)),
            "xce_caption": (
                o.caption_weight, lambda: self.grounding("caption", o.caption_soft_labels)
            ),
        }  # fmt: skip

    def intra_terms(self):
        o = self.o
        intra = {
            "ima": (o.intra_kl_weight, self.intra_kl),
            "rank": (o.rank_weight, self.ranking),
        }
        if self.kind == "pair":
            intra["g2l"] = (o.g2l_weight, self.global_to_local)
        return intra

    # -- cross-modal ------------------------------------------------------------------------

    def aligned(self) -> tuple[Tensor, Tensor]:
        """f_t(z_1) and f_v(V); the module runs once a step."""
        if self._aligned is None:
            self._aligned = (
                self._aligner("text_aligner", self.z_1),
                self._aligner("image_aligner", self.frozen.image),
            )
        return self._aligned

    def _aligner(self, name: str, x: Tensor) -> Tensor:
        for linear, norm in ((0, 1), (3, 4)):
            x = self._linear(f"{name}.{linear}", x)
            variance, mean = torch.var_mean(x, dim=0, correction=0)
            x = (x - mean) / (variance + BATCH_NORM_EPS).sqrt()
            x = x * self.weights[f"{name}.{norm}.weight"] + self.weights[f"{name}.{norm}.bias"]
            self.seen.see_kink(x)
            x = x.relu()
        return x

    def consistency(self) -> Tensor:
        text, image = self.aligned()
        rows = torch.arange(len(text))
        unmatched = (rows - self._shift(len(text))) % len(text)
        kept = torch.ones(len(text), dtype=torch.bool)
        if self.o.unmatched == "shift":
            kept = self.frozen.image_ids != self.frozen.image_ids[unmatched]
        return losses.consistency(text, image, unmatched, kept)

    def _shift(self, rows: int) -> int:
        if self.o.unmatched == "roll":
            return 5
        # a random draw has no other definition than its generator
        return int(np.random.default_rng([self.seed, self.step, 7]).integers(1, max(rows, 2)))

    def cross_kl(self) -> Tensor:
        o, v = self.o, self.frozen.image
        assert v is not None
        z = self.z_1
        if z.shape[1] != v.shape[1]:
            z = self._linear("image_projection", z)
        c = cosines(z, v)
        if o.cross_kl_student == "margin":
            c = with_margin(c, self.margin, None, self.seen) / o.temperature
        taus = o.kl_teacher_temperature, o.kl_student_temperature
        images = row_kl(cosines(v, v), c.T, *taus)
        return (images + row_kl(self.s_tt(), c, *taus)) / 2

    def grounding(self, columns: str, soft: str) -> Tensor:
        """L_xce of both views against the images or the captions of the image teacher."""
        own = self.frozen.image if columns == "image" else self.frozen.caption
        assert own is not None
        u = unit(torch.tanh(self._linear(f"{columns}_grounding.linear", own)))
        masked = self.masked | self._false_negatives(columns)
        labels = self._soft_labels(soft)
        total = torch.zeros((), dtype=u.dtype)
        for h in self.h:
            p = unit(torch.tanh(self._linear("text_grounding.linear", h)))
            x = with_margin(cosines(p, u), self.o.vl_margin, labels, self.seen)
            total = total + cross_entropy(x / self.o.vl_temperature, masked)
        return total / 2

    def _false_negatives(self, columns: str) -> Tensor:
        o, f = self.o, self.frozen
        if not o.false_negative_threshold:
            return torch.zeros_like(self.masked)
        assert f.image is not None and f.caption is not None
        rows, keys = (f.caption, f.image) if columns == "image" else (f.image, f.caption)
        diagonal = torch.eye(len(rows), dtype=torch.bool)
        return (cosines(rows, keys) > o.false_negative_threshold) & ~diagonal

    def _soft_labels(self, source: str) -> Tensor | None:
        if source == "none":
            return None
        if source == "consistency":
            text, image = self.aligned()
            s = cosines(text, image).detach()
        else:
            features = self.frozen.image if source == "image" else self.frozen.caption
            assert features is not None
            s = cosines(features, features)
        return s.clamp(0, 1) if self.o.clamp_soft_labels else s

    # -- intra-modal ------------------------------------------------------------------------

    def _text_teacher_cosines(self, features: Tensor) -> Tensor:
        """Each cosine is rounded to ``teacher_similarity_dtype`` before anything is mixed."""
        dtype = getattr(torch, self.o.teacher_similarity_dtype)
        return cosines(features, features).to(dtype).double()

    def _text_cosines(self) -> Tensor:
        pairs = zip(self.alpha, self.frozen.text, strict=True)
        return sum(a * self._text_teacher_cosines(e) for a, e in pairs)  # type: ignore

    def s_tt(self) -> Tensor:
        if self.o.teacher_mix == "similarities":
            return self._text_cosines()
        pairs = zip(self.alpha, self.frozen.text, strict=True)
        mixed = sum(a * e for a, e in pairs)
        return self._text_teacher_cosines(mixed)  # type: ignore[arg-type]

    def intra_kl(self) -> Tensor:
        o = self.o
        student = self.s if o.intra_kl_student == "margin" else self.plain
        return row_kl(self.s_tt(), student, o.kl_teacher_temperature, o.kl_student_temperature)

    def ranking(self) -> Tensor:
        o = self.o
        student = self.s if o.rank_student == "margin" else self.plain / o.temperature
        cosine = self._text_cosines()
        if o.rank_loss == "listnet":
            return losses.listnet(student, cosine / o.rank_teacher_temperature)
        self.seen.see_order(cosine, self.tie)
        mean = o.listmle_reduction == "mean"
        return losses.listmle(student, cosine, mean=mean, eps=o.listmle_eps, grid=self.tie)

    def global_to_local(self) -> Tensor:
        tokens, alpha = self.frozen.tokens, self.token_alpha
        # auto: the encoders of the tests have one tokenizer and one width
        if self.o.g2l_mix != "losses":
            mixed = sum(a * values for a, (values, _) in zip(alpha, tokens, strict=True))
            return self._one_token_teacher(0, mixed, tokens[0][1])  # type: ignore[arg-type]
        parts = [self._one_token_teacher(k, *pair) for k, pair in enumerate(tokens)]
        return sum(a * part for a, part in zip(alpha, parts, strict=True))  # type: ignore

    def _one_token_teacher(self, number: int, values: Tensor, mask: Tensor) -> Tensor:
        z = self.z_1
        if z.shape[1] != values.shape[2]:
            z = self._linear(f"token_projections.{number}", z)
        return losses.global_to_local(
            z,
            values,
            mask,
            self.o.temperature,
            axis_norm=self.o.g2l_norm == "axis",
            unit_rows=self.o.g2l_unit_rows,
            excluded=self.masked,
        )


def mixing_weights(config: Config) -> tuple[float, ...]:
    """alpha_k of the sentence teachers: as configured, the published ones for two, or equal."""
    count, weights = len(config.teachers.text), config.teachers.text_weights
    if weights:
        return weights
    return (0.33, 0.67) if count == 2 else (1 / count,) * count if count else ()


def token_weights(config: Config) -> tuple[float, ...]:
    """Several token teachers have the weights of the sentence teachers at their places."""
    count = len(config.teachers.tokens)
    return mixing_weights(config) if count > 1 else (1.0,) * count
