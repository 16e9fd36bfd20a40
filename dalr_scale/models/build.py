"""The student's encoder, from the sections ``model`` and ``data`` of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalr_scale.config import DataConfig, ModelConfig, new_encoder_pooler
from dalr_scale.errors import UserError
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.models.row_dropout import install_row_dropout
from dalr_scale.models.tokenizer import first_line, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def build_encoder(
    model: ModelConfig,
    data: DataConfig,
    path_of: Callable[[str], Path],
    *,
    row_keyed_dropout: bool,
    use_reentrant: bool,
) -> SentenceEncoder:
    """Return the student's encoder: pre-trained, or new from ``model.architecture``.

    A new one is drawn from torch's global generator: seed it first.

    Args:
        model: encoder or architecture, and pooler.
        data: tokenizer of a new encoder, and the longest sentence in tokens.
        path_of: fills in the placeholders of a configured path.
        row_keyed_dropout: key dropout masks by the row of the global batch.
        use_reentrant: form of activation checkpointing that ZeRO-3 needs: recomputation must see
            the parameter shapes that were gathered.

    Raises:
        UserError: the encoder cannot be loaded or built, or has too few positions.
    """
    if model.encoder:
        encoder = SentenceEncoder.from_directory(str(path_of(model.encoder)), model.pooler or None)
    else:
        encoder = _new_encoder(model, load_tokenizer(path_of(data.tokenizer)))
    if data.max_length > encoder.max_length:
        raise UserError(
            f"data.max_length = {data.max_length} exceeds the encoder's "
            f"{encoder.max_length} positions; lower it"
        )
    if row_keyed_dropout:
        encoder.row_keys = install_row_dropout(encoder.backbone)
    if model.activation_checkpointing:
        encoder.gradient_checkpointing(use_reentrant=use_reentrant)
    return encoder


def _new_encoder(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> SentenceEncoder:
    pooler = new_encoder_pooler(model)
    try:
        return SentenceEncoder.from_config(model.architecture, tokenizer, pooler)
    except UserError:
        raise
    except Exception as error:  # impossible sizes: transformers and torch raise many types
        raise UserError(f"model.architecture cannot be built: {first_line(error)}") from error
