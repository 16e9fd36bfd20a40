"""From a configuration to the parts of a run: streams, order, model, frozen teachers.

Everything that can be wrong with a configuration and its files is found here, before a process
waits for another one and before a weight is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from dalr_scale.config import Config, new_encoder_pooler
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.remote import RemoteShards
from dalr_scale.data.shards.token_id_store import Encoding
from dalr_scale.data.stream.bad_rows import BadRows
from dalr_scale.data.stream.order import Part, StreamPlan, share_rows
from dalr_scale.data.stream.source import Source
from dalr_scale.distributed.world import World
from dalr_scale.errors import UserError
from dalr_scale.models.dalr import DalrModel, FeatureWidths, LossSpec
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.models.row_dropout import install_row_dropout
from dalr_scale.models.tokenizer import first_line, load_tokenizer
from dalr_scale.objective.registry import needs_of
from dalr_scale.objective.term import Needs
from dalr_scale.teachers.mixing import resolve_token_mix, text_weights, token_weights
from dalr_scale.teachers.models import tokenizer_hash
from dalr_scale.teachers.online import (
    STORED,
    OnlineTeachers,
    build_online_teachers,
    check_stored_tokenizers,
)
from dalr_scale.training.optim import count_steps

MODELS = ("hf", "open_clip")


@dataclass(frozen=True)
class Streams:
    """The data of a run: both sources and the order that makes batches of them."""

    text: Source | None
    pairs: Source | None
    plan: StreamPlan
    total_steps: int
    bad_rows: BadRows

    @property
    def fingerprint(self) -> str:
        parts = [s.fingerprint for s in (self.text, self.pairs) if s is not None]
        return "+".join(parts)

    @property
    def contents(self) -> dict[str, dict[str, str]]:
        """Digests of the shards and their features, by stream."""
        given = {"data.text": self.text, "data.pairs": self.pairs}
        return {name: s.contents for name, s in given.items() if s is not None}


def prepare_data(config: Config, world: World) -> None:
    """Draws the quickstart's data and trains its teachers, once, on rank 0."""
    if config.data.builder != "quickstart":
        return
    from dalr_scale.quickstart.build import build_quickstart

    refusal = None
    if world.rank == 0:
        try:
            build_quickstart(config.path("{shards}"), quickstart_spec(config))
        except UserError as error:
            refusal = str(error)
    if (refusal := world.broadcast_object(refusal)) is not None:
        raise UserError(refusal)


def quickstart_spec(config: Config) -> Any:
    """``data.builder_options``, typed and checked."""
    from dalr_scale.quickstart.build import QuickstartSpec

    kinds = {f.name: type(f.default) for f in dataclasses.fields(QuickstartSpec)}
    options = config.data.builder_options
    if unknown := sorted(set(options) - set(kinds)):
        raise UserError(f"data.builder_options: unknown {unknown}; known: {sorted(kinds)}")
    for name, value in options.items():
        wanted = int | float if kinds[name] is float else int
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(
                f"data.builder_options.{name} = {value!r} must be of type {kinds[name].__name__}"
            )
    return QuickstartSpec(**options)


def build_streams(config: Config) -> Streams:
    """Opens the shards and their features, and lays out the order of the batches."""
    needs = needs_of(config.objective)
    data, size = config.data, config.batch.global_size
    roles = pair_roles(config, needs)
    pairs = _source(config, data.pairs, data.pair_weights, roles, needs)
    roles = _text_roles(config, needs) if config.objective.distil_text_batches else {}
    text = _source(config, data.text, data.text_weights, roles, None)
    fraction = data.pair_fraction
    plan = StreamPlan(
        seed=config.run.seed,
        global_batch=config.batch.global_size,
        text_items=text.num_items if text else 0,
        pair_items=pairs.num_items if pairs else 0,
        alternation="proportional" if fraction else config.objective.alternation,
        pair_fraction=Fraction(str(fraction)) if fraction else None,
        tail=config.objective.tail,
        text_parts=_parts(text, data.text_weights, size),
        pair_parts=_parts(pairs, data.pair_weights, size),
    )
    steps = count_steps(config.optim, plan.steps_per_epoch)
    given = {name: s for name, s in (("text", text), ("pair", pairs)) if s is not None}
    bad_rows = BadRows(
        {name: source.num_items for name, source in given.items()},
        {name: source.quarantine() for name, source in given.items()},
        data.max_bad_fraction,
    )
    return Streams(text, pairs, plan, steps, bad_rows)


def _source(
    config: Config,
    patterns: tuple[str, ...],
    weights: tuple[float, ...],
    roles: Mapping[str, str],
    needs: Needs | None,
) -> Source | None:
    if not patterns:
        return None
    groups = [(pattern,) for pattern in patterns] if weights else [patterns]
    parts = [_expand(config, group, tuple(roles.values())) for group in groups]
    shards = [shard for part in parts for shard in part]
    online = needs is not None and needs.image and _online(config.teachers.image)
    return Source(
        shards,
        features=roles,
        with_images=bool(online),
        part_sizes=[len(part) for part in parts],
    )


def _expand(config: Config, patterns: tuple[str, ...], features: tuple[str, ...]) -> list[Path]:
    """The shard files of some patterns; remote ones are copied to the cache first."""
    remote = RemoteShards(config.data.remote, config.data.cache, features)
    local = [str(path) for pattern in patterns for path in remote.localise(pattern, config.path)]
    return expand_shards(local)


def _parts(source: Source | None, weights: tuple[float, ...], size: int) -> tuple[Part, ...]:
    if source is None or not weights:
        return ()
    rows = share_rows(size, weights)
    return tuple(Part(n, r) for n, r in zip(source.part_items, rows, strict=True))


def pair_roles(config: Config, needs: Needs) -> dict[str, str]:
    """Role -> stored feature set, for the features that the objective reads.

    Raises:
        UserError: a teacher that the objective needs is missing, misspelt or of the wrong kind.
    """
    teachers = config.teachers
    roles = _text_roles(config, needs)
    for role, wanted, specs in (
        ("image", needs.image, (teachers.image,)),
        ("caption", needs.caption, (teachers.caption,)),
        ("tokens", needs.tokens, teachers.tokens),
    ):
        if wanted and not any(specs):
            raise UserError(
                f"this objective needs {role} features: set teachers.{role} "
                f"(features:NAME, or a model folder), or weight 0 on the terms that use them"
            )
        for spec in specs if wanted else ():
            _check_teacher(role, spec, ("open_clip",) if role == "image" else MODELS)
        stored = [spec.removeprefix(STORED) for spec in specs if spec.startswith(STORED)]
        if wanted and len(stored) > 1:
            raise UserError(f"teachers.{role} names {len(stored)} stored feature sets; one at most")
        if wanted and stored:
            roles[role] = stored[0]
    if "tokens" in roles and config.objective.g2l_norm == "axis":
        raise UserError(
            "objective.g2l_norm = axis divides by a norm over padding positions too, and stored "
            "token features have none: use an hf:FOLDER teacher, or --objective.g2l_norm=token"
        )
    return roles


def _text_roles(config: Config, needs: Needs) -> dict[str, str]:
    if needs.text and not config.teachers.text:
        raise UserError(
            "this objective needs a sentence teacher: set teachers.text (features:NAME, "
            "hf:FOLDER or open_clip:FOLDER), or weight 0 on ranking and alignment"
        )
    specs = config.teachers.text if needs.text else ()
    for spec in specs:
        _check_teacher("text", spec, MODELS)
    return {
        f"text{k}": spec.removeprefix(STORED)
        for k, spec in enumerate(specs)
        if spec.startswith(STORED)
    }


def _check_teacher(role: str, spec: str, models: tuple[str, ...]) -> None:
    """A misspelt teacher would otherwise show as a shard without pictures, or much later."""
    kind, _, name = spec.partition(":")
    if not name or (f"{kind}:" != STORED and kind not in models):
        forms = " or ".join([f"{STORED}NAME", *(f"{model}:FOLDER" for model in models)])
        raise UserError(f"teachers.{role}: '{spec}' must be {forms}")


def _online(spec: str) -> bool:
    return bool(spec) and not spec.startswith(STORED)


@dataclass(frozen=True)
class ModelParts:
    """The trainable module and what stands frozen beside it."""

    model: DalrModel
    teachers: OnlineTeachers
    tokenizer: Any


def build_model(config: Config, streams: Streams, world: World) -> ModelParts:
    """Builds the trainable module from the seed, and the online teachers.

    Called before any DeepSpeed object exists: under ZeRO-3 every ``from_pretrained`` after that
    would be sharded, frozen teachers included.
    """
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config)
    needs = needs_of(config.objective)
    teachers = build_online_teachers(config, needs, encoder.tokenizer, world.device)
    _use_stored_ids(config, streams, encoder.tokenizer)
    if streams.pairs is not None and needs.text:
        check_stored_tokenizers(config, streams.pairs, encoder.tokenizer)
    widths = _widths(config, streams, teachers, needs)
    objective = resolve_token_mix(config, streams.pairs, teachers)
    weights, shares = text_weights(config), token_weights(config) if needs.tokens else ()
    spec = LossSpec(objective, weights, config.run.seed, shares)
    # a pretrained encoder comes in evaluation mode: without dropout and activation checkpointing
    model = DalrModel(encoder, config.model, spec, widths).train()
    return ModelParts(model, teachers, encoder.tokenizer)


def _use_stored_ids(config: Config, streams: Streams, tokenizer: Any) -> None:
    encoding = Encoding(
        tokenizer_hash(tokenizer), config.data.max_length, tokenizer.pad_token_id or 0
    )
    for source in (streams.text, streams.pairs):
        if source is not None:
            source.use_token_ids(encoding)


def build_encoder(config: Config) -> SentenceEncoder:
    """The student's encoder: pre-trained, or new from ``model.architecture``."""
    if config.model.encoder:
        path = config.path(config.model.encoder)
        encoder = SentenceEncoder.from_directory(str(path), config.model.pooler or None)
    else:
        tokenizer = load_tokenizer(config.path(config.data.tokenizer))
        encoder = _new_encoder(config, tokenizer)
    if config.data.max_length > encoder.max_length:
        raise UserError(
            f"data.max_length = {config.data.max_length} exceeds the encoder's "
            f"{encoder.max_length} positions; lower it"
        )
    if config.batch.dropout_keys == "row":
        encoder.row_keys = install_row_dropout(encoder.backbone)
    if config.model.activation_checkpointing:
        # recomputation must see the same parameter shapes that ZeRO-3 gathered
        encoder.gradient_checkpointing(use_reentrant=config.engine.kind == "zero3")
    return encoder


def _new_encoder(config: Config, tokenizer: Any) -> SentenceEncoder:
    pooler = new_encoder_pooler(config.model)
    try:
        return SentenceEncoder.from_config(config.model.architecture, tokenizer, pooler)
    except UserError:
        raise
    except Exception as error:  # impossible sizes: transformers and torch raise whatever they meet
        raise UserError(f"model.architecture cannot be built: {first_line(error)}") from error


def _widths(
    config: Config, streams: Streams, teachers: OnlineTeachers, needs: Needs
) -> FeatureWidths:
    stored = streams.pairs
    online = teachers.widths

    if stored is None:
        return FeatureWidths()

    def width(role: str) -> int:
        if role in online:
            return online[role]
        return stored.feature_dim("tokens" if role.startswith("tokens") else role)

    count = len(config.teachers.tokens) if needs.tokens else 0
    tokens = tuple(width(f"tokens{k}") for k in range(count))
    texts = tuple(width(f"text{k}") for k in range(len(config.teachers.text) if needs.text else 0))
    if config.objective.teacher_mix == "features" and len(set(texts)) > 1:
        raise UserError(
            f"sentence teachers of widths {texts} cannot be mixed as features; set "
            "--objective.teacher_mix=similarities"
        )
    return FeatureWidths(
        image=width("image") if needs.image else 0,
        caption=width("caption") if needs.caption else 0,
        text=texts,
        tokens=tokens,
    )


def open_held_out(config: Config) -> Source | None:
    """The pairs for caption-picture recall, where the pictures' features are stored."""
    if not config.eval.retrieval:
        return None
    name = config.teachers.image.removeprefix(STORED)
    shards = _expand(config, config.eval.retrieval, (name,))
    return Source(shards, features={"image": name})
