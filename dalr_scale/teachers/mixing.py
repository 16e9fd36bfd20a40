"""How several teachers become one target: their weights, and whether their tokens are mixed.

The published weights are 0.33 for the first teacher (SimCSE) and 0.67 for the second (DiffCSE), so
the order of ``teachers.text`` matters (DALR, arXiv 2506.21096, published code).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dalr_scale.data.shards.features_store import open_features
from dalr_scale.errors import UserError
from dalr_scale.teachers.online import STORED, OnlineTeachers

if TYPE_CHECKING:
    from dalr_scale.config import Config, ObjectiveConfig
    from dalr_scale.data.stream.source import Source

PUBLISHED_WEIGHTS = (0.33, 0.67)


def text_weights(config: Config) -> tuple[float, ...]:
    """alpha_k of the sentence teachers.

    As configured, else the published ones for two teachers and equal ones for any other number.

    Raises:
        UserError: another number of weights than teachers, or weights that do not add up to 1.
    """
    count, weights = len(config.teachers.text), config.teachers.text_weights
    if not weights:
        return PUBLISHED_WEIGHTS if count == 2 else (1.0 / count,) * count if count else ()
    if len(weights) != count:
        raise UserError(
            f"teachers.text_weights has {len(weights)} entries for {count} teachers in "
            "teachers.text; give one weight each"
        )
    if abs(sum(weights) - 1) > 1e-3:
        raise UserError(f"teachers.text_weights = {weights} must add up to 1")
    return weights


def token_weights(config: Config) -> tuple[float, ...]:
    """Weights of the token teachers.

    1 for a single one, else alpha_k of the sentence teacher at the same position.

    Raises:
        UserError: several token teachers that do not correspond to the sentence teachers.
    """
    tokens, text = config.teachers.tokens, config.teachers.text
    if len(tokens) < 2:
        return (1.0,) * len(tokens)
    if len(tokens) != len(text):
        raise UserError(
            f"teachers.tokens names {len(tokens)} teachers and teachers.text {len(text)}: several "
            "token teachers take the weights of the sentence teachers by position; name as many "
            "of both, or one token teacher"
        )
    moved = [t for k, t in enumerate(tokens) if t in text and text[k] != t]
    if moved:
        raise UserError(
            f"teachers.tokens has '{moved[0]}' at another position than teachers.text, whose "
            "weights apply by position; write both in the same order"
        )
    return text_weights(config)


def resolve_token_mix(
    config: Config, pairs: Source | None, online: OnlineTeachers
) -> ObjectiveConfig:
    """The objective with ``g2l_mix = auto`` decided.

    Tokens can be added up only where all token teachers read the same tokens and are equally wide.

    Raises:
        UserError: ``g2l_mix = features`` with token teachers that cannot be added up.
    """
    objective, count = config.objective, online.num_tokens
    if count < 2 or objective.g2l_mix == "losses":
        return objective
    kinds = [_token_kind(config, pairs, online, k) for k in range(count)]
    alike = len({tuple(kind.items()) for kind in kinds}) == 1 and None not in kinds[0].values()
    if objective.g2l_mix == "features" and not alike:
        differing = [k for k in kinds[0] if len({kind[k] for kind in kinds}) > 1] or ["tokenizer"]
        values = ", ".join(f"{k} {[kind[k] for kind in kinds]}" for k in differing)
        raise UserError(
            f"the tokens of teachers {list(config.teachers.tokens)} cannot be mixed: {values} "
            "(None: not recorded); set --objective.g2l_mix=losses"
        )
    return dataclasses.replace(objective, g2l_mix="features" if alike else "losses")


def _token_kind(
    config: Config, pairs: Source | None, online: OnlineTeachers, number: int
) -> dict[str, Any]:
    """What must be equal for the tokens of two teachers to be added up."""
    role = f"tokens{number}"
    facts = next((o.teacher.facts for o in online.texts if role in o.roles), None)
    width = online.widths.get(role)
    if facts is None:
        assert pairs is not None
        name = config.teachers.tokens[number].removeprefix(STORED)
        facts, width = open_features(pairs.shards[0], name).manifest, pairs.feature_dim("tokens")
    return {
        "tokenizer": facts.get("tokenizer_sha256"),
        "length": facts.get("max_length"),
        "width": width,
    }
