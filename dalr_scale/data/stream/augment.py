"""Random changes to images that are the same for every reader of a sample.

The random numbers of a sample come from (seed, stream, epoch, item) only, so that
ranks, workers, batch sizes and resumes do not change a pixel.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dalr_scale.errors import UserError

_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10


def sample_rng(seed: int, stream: str, epoch: int, item: int) -> np.random.Generator:
    """Return the random numbers of one item in one epoch of its stream."""
    text = f"dalr-sample {stream} {seed} {epoch} {item}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class Augment:
    """Random crop and mirror image, before the teacher's own resizing.

    Attributes:
        min_area: smallest share of the image that a crop keeps; 1 crops nothing.
        flip: probability of the mirror image.
    """

    min_area: float = 1.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise UserError(f"smallest crop {self.min_area}: choose a share of more than 0 up to 1")
        if not 0 <= self.flip <= 1:
            raise UserError(f"probability of the mirror image {self.flip}: choose 0 to 1")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Return the changed image; the size changes with a crop."""
        if self.min_area < 1:
            image = image.crop(self._box(image.width, image.height, rng))
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw a box of some area and aspect; the whole image where none fits."""
        for _ in range(_TRIES):
            area = width * height * rng.uniform(self.min_area, 1.0)
            aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(rng.integers(0, width - w + 1))
                top = int(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height
