"""The DALR objective: which terms a configuration switches on, and how they add up.

Pure: it sees this rank's rows and the columns of the global batch, and returns named terms, each
the mean over this rank's rows (``dalr_scale.distributed.collectives`` says why that is the right
scale).
The formulas of the terms are in ``dalr_kernels``; DALR, arXiv 2506.21096.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import dalr_kernels as kernels
import numpy as np
import torch
from dalr_kernels import Similarity
from torch import Tensor

from dalr_scale.config import ObjectiveConfig
from dalr_scale.distributed.collectives import Share, merge_log_sum_exp, merge_max, merge_sum
from dalr_scale.errors import UserError


@dataclass
class Views:
    """What the losses see of a batch; as rows (this rank's) and as columns (all ranks').

    Shapes with B rows: z1, z2 [B,H]; p1, p2, u, u_caption [B,P]; z1_image [B,d_v], z1 in the
    width of the picture features; aligned_text, aligned_image [B,C], and aligned_unmatched, the
    aligned picture of the row that L_cons pairs a row with; image, caption [B,d_v];
    text one [B,H_k] per sentence teacher; tokens/token_mask one [B,T,H_t] and [B,T] per token
    teacher, of this rank's rows only; z1_tokens one [B,H_t] per token teacher; ids [B], -1 for
    text-only rows.
    """

    z1: Tensor
    z2: Tensor
    ids: Tensor
    p1: Tensor | None = None
    p2: Tensor | None = None
    u: Tensor | None = None
    u_caption: Tensor | None = None
    z1_image: Tensor | None = None
    aligned_text: Tensor | None = None
    aligned_image: Tensor | None = None
    aligned_unmatched: Tensor | None = None
    image: Tensor | None = None
    caption: Tensor | None = None
    text: Sequence[Tensor] = ()
    tokens: Sequence[Tensor] = ()
    token_masks: Sequence[Tensor] = ()
    z1_tokens: Sequence[Tensor] = field(default_factory=list)

    def head(self, count: int) -> Views:
        """The first `count` rows of everything."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[:count]
            return None if value is None else [tensor[:count] for tensor in value]

        return Views(**{name: cut(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Needs:
    """Which heads, features and teachers an objective uses; absent terms build no parameters.

    Attributes:
        image, caption: the features of a rank's own rows; `image_columns` and `caption_columns`
            also those of all other rows, which then travel.
    """

    image: bool
    caption: bool
    image_columns: bool
    caption_columns: bool
    text: bool
    tokens: bool
    grounding: bool
    caption_grounding: bool
    image_rows: bool
    consistency: bool
    consistency_labels: bool


def needs_of(objective: ObjectiveConfig) -> Needs:
    cross, intra = objective.cross_weight > 0, objective.intra_weight > 0
    image_branch = cross and objective.image_weight > 0
    caption_branch = cross and objective.caption_weight > 0
    labels = {objective.soft_labels} if image_branch else set()
    labels |= {objective.caption_soft_labels} if caption_branch else set()
    cross_kl = cross and objective.cross_kl_weight > 0
    consistency = cross and (objective.consistency_weight > 0 or "consistency" in labels)
    threshold = objective.false_negative_threshold > 0
    unmatched = cross and objective.consistency_weight > 0
    image_columns = cross_kl or unmatched or "image" in labels or (threshold and image_branch)
    caption_columns = "caption" in labels or (threshold and caption_branch)
    above = threshold and (image_branch or caption_branch)  # a caption against a picture
    return Needs(
        image=image_branch or consistency or image_columns or above,
        caption=caption_branch or caption_columns or above,
        image_columns=image_columns,
        caption_columns=caption_columns,
        text=cross_kl or (intra and (objective.intra_kl_weight > 0 or objective.rank_weight > 0)),
        tokens=intra and objective.g2l_weight > 0,
        grounding=image_branch or caption_branch,
        caption_grounding=caption_branch,
        image_rows=cross_kl,
        consistency=consistency,
        consistency_labels="consistency" in labels,
    )


def unmatched_rows(objective: ObjectiveConfig, rows: int, seed: int, step: int) -> np.ndarray:
    """n(i) of L_cons for the whole global batch: the row whose picture row i is paired with.

    The shift is drawn from (seed, step), never from a generator with state, so that every rank
    and every resumed run draws the same one.
    """
    if objective.unmatched == "roll":
        shift = 5
    else:
        shift = int(np.random.default_rng([seed, step, 7]).integers(1, max(rows, 2)))
    return (np.arange(rows) - shift) % rows


@dataclass
class TextTerms:
    """Weighted sum of the text-text terms (differentiable) and each of them (for logging)."""

    total: Tensor
    values: dict[str, Tensor]


# Losses do not look for NaN in their inputs here (check_finite=False): the trainer looks at their
# means over all ranks, and names the step and its items.


def text_terms(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float], offset: int,
    *, paired: bool, distil: bool,
) -> TextTerms:  # fmt: skip
    """L_con, the one term of every batch, and with `distil` L_IMA and L_rank.

    All of them are losses on the similarities of z1 and z2 and mostly read the same teacher, so
    one pass makes these matrices once and the gradients of the weighted sum in one go.
    """
    factors = term_factors(objective)
    margin = objective.margin if paired or objective.margin_in_text_batches else 0.0
    contrast = kernels.InfoNCE(
        objective.temperature, margin, factors["con"], **_mask_ids(rows, cols, objective)
    )
    distil = distil and objective.intra_weight > 0
    align = distil and objective.intra_kl_weight > 0
    rank = distil and objective.rank_weight > 0
    teacher = text_similarity(rows, cols, objective, weights) if align or rank else None
    found = kernels.row_losses(
        rows.z1, cols.z2, teacher, info_nce=contrast, col_offset=offset, check_finite=False,
        alignment_kl=_alignment(objective, factors["ima"]) if align else None,
        **(_ranking(rows, cols, objective, weights, factors["rank"]) if rank else {}),
    )  # fmt: skip
    ranking = found.list_mle if found.list_net is None else found.list_net
    named = {"con": found.info_nce, "ima": found.alignment_kl, "rank": ranking}
    return TextTerms(found.total, {k: value for k, value in named.items() if value is not None})


def cross_terms(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float], offset: int,
    unmatched: np.ndarray, share: Share | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The cross-modal group: L_cons, L_CMA, L_xce and KDMCSE's caption branch.

    With a padded `share`, `rows` are the kept ones and `cols` the real ones.
    """
    terms: dict[str, Tensor] = {}
    if objective.consistency_weight > 0:
        terms["cons"] = _consistency(rows, cols, objective, offset, unmatched)
    if objective.cross_kl_weight > 0:
        terms["cma"] = _cross_kl(rows, cols, objective, weights, offset, share)
    if objective.image_weight > 0:
        labels = _soft_labels(objective.soft_labels, rows, cols)
        terms["xce"] = _cross_entropy(rows, cols.u, labels, cols, objective, offset)
    if objective.caption_weight > 0:
        labels = _soft_labels(objective.caption_soft_labels, rows, cols)
        terms["xce_caption"] = _cross_entropy(
            rows, cols.u_caption, labels, cols, objective, offset, captions=True
        )
    return terms


def token_terms(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float], offset: int,
    share: Share | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """L_g2l, the intra-modal term that reads the teachers' tokens; a weight for each of them.

    `share` as in `cross_terms`.
    """
    if objective.g2l_weight > 0 and rows.tokens:
        return {"g2l": _global_to_local(rows, cols, objective, weights, offset, share)}
    return {}


def term_factors(objective: ObjectiveConfig) -> dict[str, float]:
    """Factor of each term: L_con + lambda * (cross-modal group) + mu * (intra-modal group)."""
    group, own = objective.cross_weight, objective.intra_weight
    return {
        "con": 1.0,
        "cons": group * objective.consistency_weight,
        "cma": group * objective.cross_kl_weight,
        "xce": group * objective.image_weight,
        "xce_caption": group * objective.caption_weight,
        "ima": own * objective.intra_kl_weight,
        "rank": own * objective.rank_weight,
        "g2l": own * objective.g2l_weight,
    }


def total_loss(text: TextTerms, others: dict[str, Tensor], objective: ObjectiveConfig) -> Tensor:
    """The text-text terms, summed already, and the weighted sum of all other terms."""
    factors = term_factors(objective)
    parts = [factors[name] * value for name, value in others.items()]
    return torch.stack([text.total, *parts]).sum()


def text_similarity(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float]
) -> Similarity:
    """S_TT: the cosine of the mixed features, or the mix of the cosines."""
    dtype = getattr(torch, objective.teacher_similarity_dtype)
    if objective.teacher_mix == "features" and len(rows.text) > 1:
        mixed = [
            sum(w * _wide(e, dtype) for w, e in zip(weights, side.text, strict=True))
            for side in (rows, cols)
        ]
        return Similarity(((1.0, mixed[0], mixed[1]),), dtype)  # pyright: ignore[reportArgumentType]
    return rank_similarity(rows, cols, objective, weights)


def rank_similarity(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float]
) -> Similarity:
    """R before its temperature: always the mix of the teachers' cosines."""
    factors = tuple(zip(weights, rows.text, cols.text, strict=True))
    return Similarity(factors, getattr(torch, objective.teacher_similarity_dtype))


def _wide(features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features as they are summed: in float32 at least, in float64 where they or `dtype` are."""
    double = torch.float64 in (features.dtype, dtype)
    return features.double() if double else features.float()


def _mask_ids(rows: Views, cols: Views, objective: ObjectiveConfig) -> dict[str, Any]:
    if objective.same_image == "keep":
        return {"row_ids": None, "col_ids": None}
    return {"row_ids": rows.ids, "col_ids": cols.ids}


def _student(kind: str, objective: ObjectiveConfig) -> dict[str, Any]:
    """Arguments of the student matrix: the margin matrix over tau, or the plain cosine."""
    if kind == "margin":
        return {"margin": objective.margin, "temperature": objective.temperature}
    return {"margin": 0.0, "temperature": 1.0}


def _kl_temperatures(objective: ObjectiveConfig) -> dict[str, Any]:
    return {
        "student_temperature": objective.kl_student_temperature,
        "teacher_temperature": objective.kl_teacher_temperature,
    }


def _soft_labels(source: str, rows: Views, cols: Views) -> Similarity | None:
    if source == "none":
        return None
    if source == "consistency":
        pair = (rows.aligned_text, cols.aligned_image)
    else:
        pair = (getattr(rows, source), getattr(cols, source))
    left, right = pair
    assert left is not None and right is not None
    return Similarity(((1.0, left.detach(), right.detach()),))


def _cross_entropy(
    rows: Views, columns: Tensor | None, labels: Similarity | None, cols: Views,
    objective: ObjectiveConfig, offset: int, *, captions: bool = False,
) -> Tensor:  # fmt: skip
    """Half the sum over both views of the InfoNCE with text rows and picture columns."""
    assert columns is not None and rows.p1 is not None and rows.p2 is not None
    above = _false_negatives(rows, cols, objective, captions)
    losses = [
        kernels.info_nce(
            p, columns, temperature=objective.vl_temperature, margin=objective.vl_margin,
            soft_labels=labels, clamp_soft_labels=objective.clamp_soft_labels,
            mask_above=above, col_offset=offset, check_finite=False,
            **_mask_ids(rows, cols, objective),
        )
        for p in (rows.p1, rows.p2)
    ]  # fmt: skip
    return (losses[0] + losses[1]) / 2


def _false_negatives(
    rows: Views, cols: Views, objective: ObjectiveConfig, captions: bool
) -> tuple[Similarity, float] | None:
    """KDMCSE's threshold, on cosines: caption i against picture j, or picture i, caption j."""
    if objective.false_negative_threshold <= 0:
        return None
    pair = (rows.image, cols.caption) if captions else (rows.caption, cols.image)
    assert pair[0] is not None and pair[1] is not None
    return Similarity(((1.0, pair[0], pair[1]),)), objective.false_negative_threshold


def _consistency(
    rows: Views, cols: Views, objective: ObjectiveConfig, offset: int, unmatched: np.ndarray
) -> Tensor:
    """L_cons with the mean over the kept pairs of the global batch (dropped: same picture)."""
    assert rows.aligned_text is not None and rows.aligned_image is not None
    assert rows.aligned_unmatched is not None
    own_rows, all_rows = len(rows.ids), len(cols.ids)
    partner = torch.as_tensor(unmatched, device=rows.ids.device)
    keep = torch.ones(all_rows, dtype=torch.bool, device=rows.ids.device)
    if objective.unmatched == "shift":
        keep = (cols.ids != cols.ids[partner]) | (cols.ids < 0)
    own = slice(offset, offset + own_rows)
    total, _ = kernels.consistency(
        rows.aligned_text, rows.aligned_image, rows.aligned_unmatched, keep[own]
    )
    # a mean over this rank's rows like the other terms, whose rows count N / kept pairs each
    return total * (all_rows / own_rows) / (all_rows + keep.sum())


def _cross_kl(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float], offset: int,
    share: Share | None,
) -> Tensor:  # fmt: skip
    """L_CMA: pictures against texts under S_VV, and texts against pictures under S_TT."""
    assert rows.image is not None and cols.image is not None and rows.z1_image is not None
    options = _student(objective.cross_kl_student, objective) | _kl_temperatures(objective)
    images = Similarity(((1.0, rows.image, cols.image),))
    texts = text_similarity(rows, cols, objective, weights)
    own, merges = rows.z1_image, (merge_max, merge_sum)
    if share is not None and not share.valid:  # its one row is a copy: nothing to add or to learn
        own, merges = own.detach(), (_add_no_maximum, _add_no_sum)
    by_image = kernels.column_alignment_kl(
        own, cols.image, images, col_offset=offset, merge_max=merges[0], merge_sum=merges[1],
        **options,
    )  # fmt: skip
    by_text = kernels.alignment_kl(
        rows.z1_image, cols.image, texts, col_offset=offset, check_finite=False, **options
    )
    return (by_image + by_text) / 2


def _add_no_maximum(values: Tensor) -> Tensor:
    return merge_max(values.fill_(-torch.inf))


def _add_no_sum(values: Tensor) -> Tensor:
    return merge_sum(values.zero_())


def _alignment(objective: ObjectiveConfig, weight: float) -> kernels.AlignmentKL:
    options = _student(objective.intra_kl_student, objective) | _kl_temperatures(objective)
    return kernels.AlignmentKL(weight=weight, **options)


def _ranking(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float], weight: float
) -> dict[str, Any]:
    # without features to mix, both teachers are the same matrix: none is named, it is shared
    mixed = objective.teacher_mix == "features" and len(rows.text) > 1
    teacher = rank_similarity(rows, cols, objective, weights) if mixed else None
    # both student matrices carry 1/tau here: the plain cosine too (only its margin goes)
    margin = objective.margin if objective.rank_student == "margin" else 0.0
    if objective.rank_loss == "listnet":
        term = kernels.ListNet(
            objective.temperature, objective.rank_teacher_temperature, margin, weight, teacher
        )
        return {"list_net": term}
    return {
        "list_mle": kernels.ListMLE(
            objective.temperature, margin, objective.listmle_reduction, objective.listmle_eps,
            weight, teacher,
        )
    }  # fmt: skip


def _global_to_local(
    rows: Views, cols: Views, objective: ObjectiveConfig, weights: Sequence[float], offset: int,
    share: Share | None,
) -> Tensor:  # fmt: skip
    """L_g2l of the mixed tokens, or the weighted sum over the token teachers.

    Tokens stay on their rank: all rows are scored against this rank's tokens, and the ranks'
    partial results are merged.
    """
    ids = _mask_ids(cols, rows, objective)
    tokens, masks, shares = rows.tokens, rows.token_masks, weights
    if objective.g2l_mix == "features":
        tokens, masks, shares = [mix_tokens(tokens, weights)], masks[:1], [1.0]
    options: dict[str, Any] = {
        "temperature": objective.temperature,
        "norm": objective.g2l_norm,
        "unit_rows": objective.g2l_unit_rows,
    }
    losses = []
    for k, (factor, _) in enumerate(zip(shares, tokens, strict=True)):
        partial = kernels.token_negatives(
            cols.z1_tokens[k], tokens[k], masks[k], first_own=offset, **ids, **options
        )
        merged = _merge_negatives(*partial, share)
        loss = kernels.own_token_loss(rows.z1_tokens[k], tokens[k], masks[k], *merged, **options)
        losses.append(factor * loss)
    return torch.stack(losses).sum()


def _merge_negatives(
    partial_N: Tensor, mean_ND: Tensor, share: Share | None
) -> tuple[Tensor, Tensor]:
    """The negatives of this rank's kept rows; padding travels as copies of the last row."""
    if share is None or not share.padded:
        return merge_log_sum_exp(partial_N, mean_ND)
    if not share.valid:  # its one sentence is a copy of another rank's
        partial_N = torch.full_like(partial_N, -torch.inf)
    every = torch.as_tensor(share.places(0, share.ranks * share.rows), device=mean_ND.device)
    partial_C, mean_CD = merge_log_sum_exp(partial_N[every], mean_ND[every])
    return partial_C[: share.kept], mean_CD[: share.kept]


def mix_tokens(tokens: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """l = sum of alpha_k l_k, for teachers of one width that read the same tokens."""
    if len({t.shape for t in tokens}) > 1:
        shapes = [tuple(t.shape) for t in tokens]
        raise UserError(
            f"token teachers of shapes {shapes} cannot be mixed; set --objective.g2l_mix=losses"
        )
    return torch.stack([w * _wide(t) for w, t in zip(shares, tokens, strict=True)]).sum(0)
