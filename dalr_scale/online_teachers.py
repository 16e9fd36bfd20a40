"""Frozen teachers that run beside the student, for features that no shard stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dalr_scale.config import Config
from dalr_scale.data.loader import Batch
from dalr_scale.dist.gather import pad_to_common_length
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import TeacherBatch
from dalr_scale.objective import Needs

STORED = "features:"


@dataclass(frozen=True)
class OnlineText:
    """A text teacher and the roles it plays: ``text0`` ..., ``caption``, ``tokens``."""

    teacher: Any
    roles: tuple[str, ...]


@dataclass(frozen=True)
class OnlineTeachers:
    """The models that compute what the shards do not store; each runs once per batch."""

    image: Any = None
    texts: Sequence[OnlineText] = ()
    widths: dict[str, int] = field(default_factory=dict)

    def batch(self, batch: Batch, num_text: int, *, with_text: bool) -> TeacherBatch:
        """The frozen features of a batch, stored ones as they are, the others computed here.

        Args:
            num_text: sentence teachers of the run.
            with_text: whether this batch is distilled (paired, or by configuration).
        """
        features = dict(batch.features)
        tokens, mask = batch.tokens, batch.token_mask
        paired = batch.kind == "pair"
        if paired and self.image is not None:
            features["image"] = self.image.encode(batch.images)
        for online in self.texts if paired or with_text else ():
            pooled, own_tokens, own_mask = online.teacher.encode(batch.sentences)
            features |= {role: pooled for role in online.roles if role != "tokens"}
            if "tokens" in online.roles:
                tokens, mask = own_tokens, own_mask
        if tokens is not None and mask is not None:
            tokens, mask = pad_to_common_length(tokens, mask)
        return TeacherBatch(
            ids=batch.image_ids,
            image=features.get("image"),
            caption=features.get("caption") if paired else None,
            text=[features[f"text{k}"] for k in range(num_text)] if with_text else [],
            tokens=[tokens] if tokens is not None else [],
            token_masks=[mask] if mask is not None else [],
        )


def build_online_teachers(
    config: Config, needs: Needs, tokenizer: Any, device: torch.device
) -> OnlineTeachers:
    """Loads the teachers that the configuration names as models rather than as stored features."""
    texts = [
        OnlineText(_text_teacher(config, spec, pooler, roles, tokenizer).to(device), tuple(roles))
        for (spec, pooler), roles in _text_roles(config, needs).items()
        if not spec.startswith(STORED)
    ]
    widths = {
        role: online.teacher.token_width if role == "tokens" else online.teacher.width
        for online in texts
        for role in online.roles
    }
    image = None
    if needs.image and not config.teachers.image.startswith(STORED):
        from dalr_scale.models.teachers import load_image_teacher

        image = load_image_teacher(_model_spec(config, config.teachers.image)).to(device)
        widths["image"] = image.width
    return OnlineTeachers(image, texts, widths)


def _text_roles(config: Config, needs: Needs) -> dict[tuple[str, str], list[str]]:
    """(spec, pooler) -> roles, so that a teacher of sentences and tokens is loaded once."""
    teachers = config.teachers
    poolers = teachers.text_poolers or ("",) * len(teachers.text)
    if len(poolers) != len(teachers.text):
        raise UserError("teachers.text_poolers needs one entry for each of teachers.text")
    pooler_of = dict(zip(teachers.text, poolers, strict=True))
    roles: dict[tuple[str, str], list[str]] = {}

    def add(spec: str, role: str) -> None:
        roles.setdefault((spec, pooler_of.get(spec, "")), []).append(role)

    for k, spec in enumerate(teachers.text if needs.text else ()):
        add(spec, f"text{k}")
    if needs.caption:
        add(teachers.caption, "caption")
    if needs.tokens:
        add(teachers.tokens, "tokens")
    return roles


def _text_teacher(
    config: Config, spec: str, pooler: str, roles: Sequence[str], tokenizer: Any
) -> Any:
    from dalr_scale.models.teachers import compare_tokenizers, load_text_teacher

    if spec.startswith("hf:") and not pooler:
        if any(role != "tokens" for role in roles):
            raise UserError(f"teachers.text '{spec}' needs its pooler in teachers.text_poolers")
        pooler = "mean"  # token features do not depend on it
    path = _model_spec(config, spec)
    teacher = load_text_teacher(path, pooler=pooler or None, tokens="tokens" in roles)
    if config.objective.teacher_tokenizer == "must_match":
        compare_tokenizers(tokenizer, teacher.tokenizer)
    return teacher


def _model_spec(config: Config, spec: str) -> str:
    prefix, colon, path = spec.partition(":")
    if not colon or prefix not in ("hf", "open_clip"):
        raise UserError(f"teacher '{spec}' must be features:NAME, hf:FOLDER or open_clip:FOLDER")
    return spec if path.startswith("package:") else f"{prefix}:{config.path(path)}"
