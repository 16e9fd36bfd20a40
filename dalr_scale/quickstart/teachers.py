"""The quickstart's teacher: a small open_clip model, trained from scratch on captioned images.

Its image tower is open_clip's residual network with four blocks, its text tower one transformer
layer: enough to learn within a minute of CPU time that crimson and scarlet look alike. It is saved
as an open_clip directory and loaded like any other one, by ``open_clip:DIRECTORY``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dalr_scale.models.tokenizer import token_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from open_clip.model import CLIP
    from transformers import PreTrainedTokenizerBase

OpenClipConfig: TypeAlias = dict[str, dict[str, Any]]  # keys and values are open_clip's
CONTEXT_LENGTH = 22
_MEAN, _STD = 0.5, 0.25
_WARMUP = 20
_MAX_SCALE = 100.0


def teacher_config(vocab_size: int, end_id: int, image_size: int, width: int) -> OpenClipConfig:
    """Return the `open_clip_config.json` of the teacher.

    Args:
        vocab_size: entries of the tokenizer.
        end_id: id of its [SEP], where the causal text tower is read; 0 has to be [PAD].
        image_size: pixels of the square images.
        width: width of the shared space and of the text tower, a multiple of 32.
    """
    text = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": vocab_size,
        "hf_tokenizer_name": "tokenizer",  # any name: a directory's own tokenizer is used
        "width": width,
        "heads": width // 32,
        "layers": 1,
        "pool_type": "eos",
        "eos_id": end_id,
        "pad_id": 0,
    }
    vision = {"image_size": image_size, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
    return {
        "model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [_MEAN] * 3, "std": [_STD] * 3},
    }


@dataclass(frozen=True)
class TeacherTraining:
    """Settings of the teacher's training.

    Attributes:
        steps: optimizer steps; the rate decays to 0 as a cosine after a short warm-up.
        batch_size: images in a step, at most as many as there are.
        lr: peak learning rate of AdamW.
        width: width of the shared space.
        seed: of the initial weights and of every draw; torch's global generator is not used.
    """

    steps: int
    batch_size: int
    lr: float
    width: int
    seed: int


def train_teacher(
    images: np.ndarray,
    captions: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    settings: TeacherTraining,
    on_step: Callable[[float], object] = lambda _loss: None,
) -> tuple[torch.nn.Module, OpenClipConfig]:
    """Train a model on images and captions with open_clip's contrastive loss.

    Args:
        images: uint8 [n, S, S, 3].
        captions: n lists of captions of equal length; a step draws one caption of each image.
        tokenizer: Hugging Face tokenizer whose [PAD] is 0.
        settings: length and size of the training.
        on_step: called with the loss after every step.

    Returns:
        The model, in evaluation mode, and its `open_clip_config.json`.
    """
    from open_clip.loss import ClipLoss

    end_id = token_id(tokenizer, "sep") or 0
    config = teacher_config(len(tokenizer), end_id, images.shape[1], settings.width)
    model = _new_model(config, settings.seed)
    pixels = _pixels(images)
    ids = _token_ids(captions, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    loss_of = ClipLoss()
    for step, (rows, chosen) in enumerate(_draw_batches(settings, len(images), ids.shape[1])):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(step, settings.steps)
        image = functional.normalize(model.encode_image(pixels[rows]), dim=-1)
        text = functional.normalize(model.encode_text(ids[rows, chosen]), dim=-1)
        loss = loss_of(image, text, model.logit_scale.exp().squeeze())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(_MAX_SCALE))
        on_step(loss.item())
    return model.eval(), config


def _draw_batches(
    settings: TeacherTraining, images: int, captions: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the images of each step and the caption drawn for each of them."""
    rng = np.random.default_rng([settings.seed, 100])
    order = np.empty(0, np.int64)
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = rng.permutation(images)
        rows, order = order[: settings.batch_size], order[settings.batch_size :]
        yield rows, rng.integers(captions, size=settings.batch_size)


def save_teacher(
    model: torch.nn.Module,
    config: OpenClipConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write an open_clip directory: configuration, safetensors weights, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, directory / "model.safetensors"
    )
    text = json.dumps(config, indent=2)
    (directory / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


def _new_model(config: OpenClipConfig, seed: int) -> CLIP:
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # DeepSpeed does not accept a temperature without dimension.
        model = CLIP(
            **config["model_cfg"], init_logit_scale=math.log(14), nonscalar_logit_scale=True
        )
    # Twice as fast on CPUs as the default layout of small convolutions.
    model.visual = model.visual.to(memory_format=torch.channels_last)
    return model


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, S, S, 3] to the float32 [n, 3, S, S] that the saved model's transform gives."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((pixels - _MEAN) / _STD).contiguous(memory_format=torch.channels_last)


def _token_ids(captions: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Captions to int64 [n, captions each, CONTEXT_LENGTH]."""
    flat = [caption for own in captions for caption in own]
    ids = tokenizer(
        flat, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    )["input_ids"]
    return ids.view(len(captions), -1, CONTEXT_LENGTH)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
