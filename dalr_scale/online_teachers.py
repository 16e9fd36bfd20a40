"""Frozen teachers that run beside the student, for features that no shard stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dalr_scale.config import Config
from dalr_scale.data.loader import Batch
from dalr_scale.dist.gather import pad_to_common_length
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import TeacherBatch
from dalr_scale.objective import Needs


@dataclass(frozen=True)
class OnlineTeachers:
    """Teachers by role: ``image``, ``caption``, ``text0`` ..., ``tokens``; widths likewise."""

    image: Any = None
    texts: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

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
        for role, teacher in self.texts.items():
            if not paired and not (with_text and role.startswith("text")):
                continue
            pooled, own_tokens, own_mask = teacher.encode(batch.sentences)
            if role == "tokens":
                tokens, mask = own_tokens, own_mask
            else:
                features[role] = pooled
        if tokens is not None and mask is not None:
            tokens, mask = pad_to_common_length(tokens, mask)
        text = [features[f"text{k}"] for k in range(num_text)] if with_text else []
        return TeacherBatch(
            ids=batch.image_ids,
            image=features.get("image"),
            caption=features.get("caption"),
            text=text,
            tokens=[tokens] if tokens is not None else [],
            token_masks=[mask] if mask is not None else [],
        )


def build_online_teachers(
    config: Config, needs: Needs, tokenizer: Any, device: torch.device
) -> OnlineTeachers:
    """Loads the teachers that the configuration names as models rather than as stored features."""
    teachers = config.teachers
    specs: dict[str, tuple[str, str]] = {}
    if needs.text:
        poolers = teachers.text_poolers or ("",) * len(teachers.text)
        if len(poolers) != len(teachers.text):
            raise UserError("teachers.text_poolers needs one entry for each of teachers.text")
        specs |= {
            f"text{k}": pair for k, pair in enumerate(zip(teachers.text, poolers, strict=True))
        }
    if needs.caption:
        specs["caption"] = (teachers.caption, "")
    if needs.tokens:
        specs["tokens"] = (teachers.tokens, "cls_before_pooler")
    texts = {
        role: _text_teacher(config, spec, pooler, role, tokenizer).to(device)
        for role, (spec, pooler) in specs.items()
        if not spec.startswith("features:")
    }
    image = None
    if needs.image and not teachers.image.startswith("features:"):
        from dalr_scale.models.teachers import load_image_teacher

        image = load_image_teacher(str(_model_path(config, teachers.image, "open_clip"))).to(device)
    widths = {role: teacher.width for role, teacher in texts.items()}
    return OnlineTeachers(image, texts, widths | ({"image": image.width} if image else {}))


def _text_teacher(config: Config, spec: str, pooler: str, role: str, tokenizer: Any) -> Any:
    from dalr_scale.models.teachers import compare_tokenizers, load_text_teacher

    kind = spec.partition(":")[0]
    path = _model_path(config, spec, kind)
    if kind == "hf" and not pooler:
        raise UserError(f"teachers.text '{spec}' needs its pooler in teachers.text_poolers")
    teacher = load_text_teacher(f"{kind}:{path}", pooler=pooler or None, tokens=role == "tokens")
    if config.objective.teacher_tokenizer == "must_match":
        compare_tokenizers(tokenizer, teacher.tokenizer)
    return teacher


def _model_path(config: Config, spec: str, kind: str) -> str:
    prefix, colon, path = spec.partition(":")
    if not colon or prefix not in ("hf", "open_clip") or prefix != kind:
        raise UserError(f"teacher '{spec}' must be features:NAME, hf:FOLDER or open_clip:FOLDER")
    return path if path.startswith("package:") else str(config.path(path))
