"""Images from untrusted bytes: three formats, a cap on the pixels, and no half images."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name: extension in a shard
PIXEL_LIMIT = 50_000_000


def _open(data: bytes) -> Image.Image:
    """Open an image and check the size in its header, before anything is decoded."""
    image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"has {image.width} x {image.height} pixels")
    return image


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP image to RGB.

    Raises:
        ValueError: it has more than PIXEL_LIMIT pixels, another format, or cannot be decoded.
    """
    try:
        with _open(data) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's parsers raise whatever they trip over
        raise _reason(error) from error


def check_image(data: bytes) -> str:
    """Decode an image to the end and return the extension that belongs to its format.

    Raises:
        ValueError: as ``decode_image``.
    """
    try:
        with _open(data) as image:
            extension = FORMATS[str(image.format)]
            if extension == "jpg":
                # All of the data is still parsed, but an eighth of the size is computed.
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            return extension
    except Exception as error:  # Pillow's parsers raise whatever they trip over
        raise _reason(error) from error


def _reason(error: Exception) -> ValueError:
    if isinstance(error, ValueError) and str(error).startswith("has "):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"has more than {PIXEL_LIMIT} pixels")
    if isinstance(error, Image.UnidentifiedImageError):
        return ValueError("is not a JPEG, PNG or WebP image")
    return ValueError(f"cannot be decoded ({type(error).__name__})")
