"""Frozen teachers that run beside the student, for features that no shard stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dalr_scale.config import Config
from dalr_scale.data.shards.features_store import open_features
from dalr_scale.data.stream.batch import Batch
from dalr_scale.data.stream.source import Source
from dalr_scale.distributed.collectives import pad_to_common_length
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import TeacherBatch
from dalr_scale.objective.term import Needs

STORED = "features:"


@dataclass(frozen=True)
class OnlineText:
    """A text teacher and the roles it plays: ``text0`` ..., ``caption``, ``tokens0`` ..."""

    teacher: Any
    roles: tuple[str, ...]


@dataclass(frozen=True)
class OnlineTeachers:
    """The models that compute what the shards do not store; each runs once per batch.

    Attributes:
        num_text, num_tokens: sentence and token teachers of the run, stored ones included.
        student_ids: teachers read the student's token ids (equal tokenizers), not the sentences.
        pad_alike: all ranks pad what teachers read to one length, because token features at
            padding count (the published global-to-local norm runs over the padded token axis).
        micro_rows: rows that a teacher encodes at a time; 0: all.
    """

    image: Any = None
    texts: Sequence[OnlineText] = ()
    widths: dict[str, int] = field(default_factory=dict)
    num_text: int = 0
    num_tokens: int = 0
    student_ids: bool = False
    pad_alike: bool = False
    micro_rows: int = 0

    @property
    def read_sentences(self) -> bool:
        """Whether a teacher reads sentences rather than the student's token ids."""
        return bool(self.texts) and not self.student_ids

    def batch(self, batch: Batch, *, with_text: bool) -> TeacherBatch:
        """The frozen features of a batch, stored ones as they are, the others computed here.

        Args:
            with_text: whether this batch is distilled (paired, or by configuration).
        """
        paired = batch.kind == "pair"
        used = paired or with_text
        # in every step: ranks that hold different kinds must not part where they pad alike
        reads = self._read(batch) if used or self.pad_alike else []
        # stored as float16: travelling as such costs half the bytes and loses nothing
        features = {role: values.half() for role, values in batch.features.items()}
        tokens = {}
        if batch.token_features is not None and batch.token_feature_mask is not None:
            tokens["stored"] = (batch.token_features, batch.token_feature_mask)
        if paired and self.image is not None:
            assert batch.images is not None
            (features["image"],) = self._in_chunks(self._encode_images, batch.images)
        for online, read in zip(self.texts, reads, strict=True) if used else ():
            pooled, *own = self._in_chunks(online.teacher.encode_ids, *read)
            for role in online.roles:
                if role.startswith("tokens"):
                    tokens[role] = tuple(own)
                else:
                    features[role] = pooled
        count = self.num_tokens if paired else 0
        pairs = [tokens.get(f"tokens{k}") or tokens["stored"] for k in range(count)]
        return TeacherBatch(
            ids=batch.image_ids,
            paired=paired,
            image=features.get("image"),
            caption=features.get("caption") if paired else None,
            text=[features[f"text{k}"] for k in range(self.num_text)] if with_text else [],
            tokens=[values for values, _ in pairs],
            token_masks=[own_mask for _, own_mask in pairs],
        )

    def _read(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Token ids and mask for each teacher: the student's, or its tokenizer's own."""
        student = batch.input_ids, batch.attention_mask
        if not self.student_ids:
            own = [online.teacher.tokenize(batch.sentences) for online in self.texts]
            return [self._padded(o, read) for o, read in zip(self.texts, own, strict=True)]
        # equal tokenizers have one padding id
        return [self._padded(self.texts[0], student)] * len(self.texts) if self.texts else []

    def _padded(self, online: OnlineText, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not self.pad_alike:
            return read
        # a model may tell padding by its id: with another one its states there are others
        fill = getattr(online.teacher.tokenizer, "pad_token_id", None)
        return pad_to_common_length(*read, fill or 0)

    def _encode_images(self, images: Tensor) -> tuple[Tensor]:
        return (self.image.encode(images),)

    def _in_chunks(
        self, encode: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor
    ) -> list[Any]:
        """What `encode` gives for all rows, computed for some of them at a time."""
        rows = len(inputs[0])
        size = self.micro_rows or rows
        parts = [encode(*(x[at : at + size] for x in inputs)) for at in range(0, rows, size)]
        return [
            None if column[0] is None else _stack(column) for column in zip(*parts, strict=True)
        ]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts; a shorter token axis [n, T, ...] is filled with zeros."""
    if parts[0].ndim < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (0, 0) * (p.ndim - 2) + (0, longest - p.shape[1])) for p in parts])


def build_online_teachers(
    config: Config, needs: Needs, tokenizer: Any, device: torch.device
) -> OnlineTeachers:
    """Loads the teachers that the configuration names as models rather than as stored features."""
    texts = [
        OnlineText(_text_teacher(config, spec, pooler, roles, tokenizer).to(device), tuple(roles))
        for (spec, pooler), roles in _text_roles(config, needs).items()
    ]
    widths = {
        role: online.teacher.token_width if role.startswith("tokens") else online.teacher.width
        for online in texts
        for role in online.roles
    }
    image = None
    if needs.image and not config.teachers.image.startswith(STORED):
        from dalr_scale.teachers.models import load_image_teacher

        image = load_image_teacher(_model_spec(config, config.teachers.image)).to(device)
        widths["image"] = image.width
    return OnlineTeachers(
        image,
        texts,
        widths,
        num_text=len(config.teachers.text) if needs.text else 0,
        num_tokens=len(config.teachers.tokens) if needs.tokens else 0,
        student_ids=config.objective.teacher_tokenizer == "must_match",
        pad_alike=_pads_alike(config, texts),
        micro_rows=config.batch.micro_size,
    )


def _pads_alike(config: Config, texts: Sequence[OnlineText]) -> bool:
    online = any(role.startswith("tokens") for text in texts for role in text.roles)
    return online and config.objective.g2l_norm == "axis"


def _text_roles(config: Config, needs: Needs) -> dict[tuple[str, str], list[str]]:
    """(spec, pooler) -> roles, so that a teacher of sentences and tokens is loaded once."""
    teachers = config.teachers
    poolers = teachers.text_poolers or ("",) * len(teachers.text)
    if len(poolers) != len(teachers.text):
        raise UserError("teachers.text_poolers needs one entry for each of teachers.text")
    roles: dict[tuple[str, str], list[str]] = {}
    for k, pair in enumerate(zip(teachers.text, poolers, strict=True) if needs.text else ()):
        roles.setdefault(pair, []).append(f"text{k}")
    pooler_of = dict(roles)  # a token teacher that is a sentence teacher too shares its model
    if needs.caption:
        roles.setdefault((teachers.caption, ""), []).append("caption")
    for k, spec in enumerate(teachers.tokens if needs.tokens else ()):
        shared = next((pair for pair in pooler_of if pair[0] == spec), (spec, ""))
        roles.setdefault(shared, []).append(f"tokens{k}")
    return {pair: names for pair, names in roles.items() if not pair[0].startswith(STORED)}


def _text_teacher(
    config: Config, spec: str, pooler: str, roles: Sequence[str], tokenizer: Any
) -> Any:
    from dalr_scale.teachers.models import compare_tokenizers, load_text_teacher

    tokens = any(role.startswith("tokens") for role in roles)
    if spec.startswith("hf:") and not pooler:
        if not all(role.startswith("tokens") for role in roles):
            raise UserError(f"teachers.text '{spec}' needs its pooler in teachers.text_poolers")
        pooler = "mean"  # token features do not depend on it
    teacher = load_text_teacher(
        _model_spec(config, spec),
        pooler=pooler or None,
        tokens=tokens,
        max_length=config.data.max_length if spec.startswith("hf:") else None,
    )
    if config.objective.teacher_tokenizer == "must_match":
        compare_tokenizers(tokenizer, teacher.tokenizer)
    return teacher


def check_stored_tokenizers(config: Config, source: Source, tokenizer: Any) -> None:
    """``teacher_tokenizer = must_match`` for teachers whose features are stored in shards."""
    from dalr_scale.teachers.models import tokenizer_hash

    if config.objective.teacher_tokenizer != "must_match":
        return
    specs = [s for s in (*config.teachers.text, *config.teachers.tokens) if s.startswith(STORED)]
    for name in (spec.removeprefix(STORED) for spec in specs):
        stored = open_features(source.shards[0], name).manifest["tokenizer_sha256"]
        if stored != tokenizer_hash(tokenizer):
            raise UserError(
                f"feature set '{name}' of {source.shards[0]} was made with another tokenizer than "
                "the student's; set --objective.teacher_tokenizer=retokenise"
            )


def _model_spec(config: Config, spec: str) -> str:
    prefix, colon, path = spec.partition(":")
    if not colon or prefix not in ("hf", "open_clip"):
        raise UserError(
            f"teacher '{spec}' must be features:NAME, hf:DIRECTORY or open_clip:DIRECTORY"
        )
    return spec if path.startswith("package:") else f"{prefix}:{config.path(path)}"
