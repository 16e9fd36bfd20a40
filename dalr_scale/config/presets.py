"""The presets of the objective: what each one changes against the defaults, which are `dalr`.

Sources: SimCSE (arXiv 2104.08821), MCSE (2204.10931), KDMCSE (2403.17486) and DALR (2506.21096),
with the code published for each; `dalr-reference` is the published DALR loss.
"""

from __future__ import annotations

from typing import Any

_NO_TEXT_TEACHERS = {"intra_weight": 0.0, "intra_kl_weight": 0.0, "rank_weight": 0.0}
_BASELINE = _NO_TEXT_TEACHERS | {
    "consistency_weight": 0.0,
    "cross_kl_weight": 0.0,
    "g2l_weight": 0.0,
    "soft_labels": "none",
    "clamp_soft_labels": False,
    "same_image": "keep",
    "alternation": "reference",
    "tail": "keep",
}
PRESETS: dict[str, dict[str, Any]] = {
    "dalr": {},
    "simcse": _BASELINE
    | {"margin": 0.0, "vl_margin": 0.0, "cross_weight": 0.0, "image_weight": 0.0},
    "mcse": _BASELINE | {"margin": 0.0, "vl_margin": 0.0, "cross_weight": 0.01},
    "kdmcse": _BASELINE
    | {
        "margin": 0.15,
        "vl_margin": 0.15,
        "cross_weight": 0.01,
        "caption_weight": 1.0,
        "soft_labels": "image",
        "caption_soft_labels": "caption",
    },
    "dalr-reference": {
        "margin": 0.18,
        "vl_margin": 0.18,
        "consistency_weight": 0.01,
        "soft_labels": "image",
        "clamp_soft_labels": False,
        "same_image": "keep",
        "unmatched": "roll",
        "cross_kl_student": "margin",
        "intra_kl_student": "margin",
        "rank_student": "margin",
        "listmle_reduction": "sum",
        "listmle_eps": 1e-7,
        "teacher_mix": "features",
        "teacher_similarity_dtype": "float16",
        "teacher_tokenizer": "must_match",
        "image_projection": "identity",
        "token_projection": "identity",
        "g2l_norm": "axis",
        "g2l_unit_rows": False,
        "g2l_mix": "features",
        "alternation": "reference",
        "tail": "keep",
    },
}
