"""Frozen teachers that run during training, for features that no shard stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalr_scale.data.shards.features_store import open_features
from dalr_scale.distributed.collectives import pad_to_common_length
from dalr_scale.errors import UserError
from dalr_scale.models.tokenizer import compare_tokenizers, tokenizer_hash
from dalr_scale.teachers.models import ImageTeacher, TextTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dalr_scale.config import TeachersConfig
    from dalr_scale.data.stream.batch import Batch
    from dalr_scale.data.stream.source import Source
    from dalr_scale.objective.term import Needs

STORED = "features:"


@dataclass(frozen=True)
class OnlineText:
    """A text teacher and the roles it plays: ``text0`` ..., ``caption``, ``tokens0`` ..."""

    teacher: TextTeacher
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

    image: ImageTeacher | None = None
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

    def batch(self, batch: Batch, *, with_text: bool) -> Batch:
        """The batch with all frozen features: stored ones as they are, the others computed here.

        Args:
            batch: as the loader gives it.
            with_text: whether this batch is distilled (paired, or by configuration).
        """
        used = batch.paired or with_text
        # in every step: padding to one length is a collective, whatever kind a rank holds
        reads = self._read(batch) if used or self.pad_alike else []
        # stored as float16: gathering float16 halves the bytes and is exact
        features = {role: values.half() for role, values in batch.features.items()}
        tokens: dict[str, tuple[Tensor, Tensor]] = {}
        if batch.paired and self.image is not None:
            assert batch.images is not None
            encode = self.image.encode
            (features["image"],) = self._in_chunks(lambda images: (encode(images),), batch.images)
        for online, read in zip(self.texts, reads, strict=True) if used else ():
            pooled, *own = self._in_chunks(online.teacher.encode_ids, *read)
            for role in online.roles:
                if role.startswith("tokens"):
                    tokens[role] = own[0], own[1]
                else:
                    features[role] = pooled
        return self._with_features(batch, features, tokens, with_text=with_text)

    def _with_features(
        self,
        batch: Batch,
        features: dict[str, Tensor],
        tokens: dict[str, tuple[Tensor, Tensor]],
        *,
        with_text: bool,
    ) -> Batch:
        """The batch with what its objective reads, and nothing else."""
        roles = ["image", "caption"] if batch.paired else ["image"]
        roles += [f"text{k}" for k in range(self.num_text)] if with_text else []
        numbers = range(self.num_tokens if batch.paired else 0)
        stored = next(zip(batch.token_features, batch.token_masks, strict=True), None)
        pairs = [tokens.get(f"tokens{k}", stored) for k in numbers]
        assert None not in pairs
        return replace(
            batch,
            features={role: features[role] for role in roles if role in features},
            token_features=[pair[0] for pair in pairs if pair],
            token_masks=[pair[1] for pair in pairs if pair],
            images=None,
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
        # a model may recognize padding by its id, and return other states for another id
        fill = getattr(online.teacher.tokenizer, "pad_token_id", None)
        return pad_to_common_length(*read, fill or 0)

    def _in_chunks(
        self, encode: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor
    ) -> list[Any]:
        """Return `encode` of all rows, computed in chunks of rows."""
        rows = len(inputs[0])
        size = self.micro_rows or rows
        parts = [encode(*(x[at : at + size] for x in inputs)) for at in range(0, rows, size)]
        return [
            None if column[0] is None else _stack(column) for column in zip(*parts, strict=True)
        ]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of all parts; a shorter token axis [n, T, ...] is zero-padded."""
    if parts[0].ndim < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (0, 0) * (p.ndim - 2) + (0, longest - p.shape[1])) for p in parts])


@dataclass(frozen=True)
class OnlineOptions:
    """How online teachers are loaded and run.

    Attributes:
        path_of: fills in the placeholders of a configured path.
        max_length: tokens kept of a sentence.
        student_ids: teachers must have the student's tokenizer, and read its token ids.
        norm_over_axis: the norm of token features runs over the padded token axis.
        micro_rows: rows that a teacher encodes at a time; 0: all.
    """

    path_of: Callable[[str], Path]
    max_length: int
    student_ids: bool
    norm_over_axis: bool = False
    micro_rows: int = 0


def build_online_teachers(
    teachers: TeachersConfig,
    needs: Needs,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    options: OnlineOptions,
) -> OnlineTeachers:
    """Load the teachers that the configuration names as models rather than as stored features.

    Args:
        teachers: the section of the configuration.
        needs: the features that the objective reads.
        tokenizer: the student's tokenizer.
        device: device of the teachers.
        options: how they are loaded and run.

    Raises:
        UserError: a teacher is missing or does not fit the student.
    """
    texts = [
        OnlineText(_text_teacher(spec, pooler, roles, tokenizer, options).to(device), tuple(roles))
        for (spec, pooler), roles in _text_roles(teachers, needs).items()
    ]
    widths = {
        role: online.teacher.token_width if role.startswith("tokens") else online.teacher.width
        for online in texts
        for role in online.roles
    }
    image = None
    if needs.image and not teachers.image.startswith(STORED):
        from dalr_scale.teachers.models import load_image_teacher

        image = load_image_teacher(_model_spec(teachers.image, options)).to(device)
        widths["image"] = image.width
    return OnlineTeachers(
        image,
        texts,
        widths,
        num_text=len(teachers.text) if needs.text else 0,
        num_tokens=len(teachers.tokens) if needs.tokens else 0,
        student_ids=options.student_ids,
        pad_alike=options.norm_over_axis and _computes_tokens(texts),
        micro_rows=options.micro_rows,
    )


def _computes_tokens(texts: Sequence[OnlineText]) -> bool:
    return any(role.startswith("tokens") for text in texts for role in text.roles)


def _text_roles(teachers: TeachersConfig, needs: Needs) -> dict[tuple[str, str], list[str]]:
    """Return (spec, pooler) -> roles: a teacher of sentences and tokens is loaded once."""
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
    spec: str,
    pooler: str,
    roles: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    options: OnlineOptions,
) -> TextTeacher:
    from dalr_scale.teachers.models import load_text_teacher

    tokens = any(role.startswith("tokens") for role in roles)
    if spec.startswith("hf:") and not pooler:
        if not all(role.startswith("tokens") for role in roles):
            raise UserError(f"teachers.text '{spec}' needs its pooler in teachers.text_poolers")
        pooler = "mean"  # token features do not depend on it
    teacher = load_text_teacher(
        _model_spec(spec, options),
        pooler=pooler or None,
        tokens=tokens,
        max_length=options.max_length if spec.startswith("hf:") else None,
    )
    if options.student_ids:
        compare_tokenizers(tokenizer, teacher.tokenizer)
    return teacher


def check_stored_tokenizers(
    teachers: TeachersConfig, source: Source, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Require that stored features were computed with the student's tokenizer.

    Raises:
        UserError: another tokenizer.
    """
    specs = [s for s in (*teachers.text, *teachers.tokens) if s.startswith(STORED)]
    for name in (spec.removeprefix(STORED) for spec in specs):
        stored = open_features(source.shards[0], name).manifest["tokenizer_sha256"]
        if stored != tokenizer_hash(tokenizer):
            raise UserError(
                f"feature set '{name}' of {source.shards[0]} was computed with another tokenizer "
                "than the student's; set --objective.teacher_tokenizer=retokenise"
            )


def _model_spec(spec: str, options: OnlineOptions) -> str:
    prefix, colon, path = spec.partition(":")
    if not colon or prefix not in ("hf", "open_clip"):
        raise UserError(
            f"teacher '{spec}' must be features:NAME, hf:DIRECTORY or open_clip:DIRECTORY"
        )
    return spec if path.startswith("package:") else f"{prefix}:{options.path_of(path)}"
