"""Pictures from untrusted bytes: three formats, a cap on the pixels, and no half pictures."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name: extension in a shard
PIXEL_LIMIT = 50_000_000


def _open(data: bytes) -> Image.Image:
    """Open a picture and check the size in its header, before anything is decoded."""
    picture = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    if picture.width * picture.height > PIXEL_LIMIT:
        raise ValueError(f"has {picture.width} x {picture.height} pixels")
    return picture


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP picture to RGB.

    Raises:
        ValueError: it has more than PIXEL_LIMIT pixels, another format, or cannot be decoded.
    """
    try:
        with _open(data) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow's parsers raise whatever they trip over
        raise _reason(error) from error


def check_image(data: bytes) -> str:
    """Decode a picture to the end and return the extension that belongs to its format.

    Raises:
        ValueError: as ``decode_image``.
    """
    try:
        with _open(data) as picture:
            extension = FORMATS[str(picture.format)]
            if extension == "jpg":
                # All of the data is still parsed, but an eighth of the size is computed.
                picture.draft("RGB", (max(1, picture.width // 8), max(1, picture.height // 8)))
            picture.load()
            return extension
    except Exception as error:  # Pillow's parsers raise whatever they trip over
        raise _reason(error) from error


def _reason(error: Exception) -> ValueError:
    if isinstance(error, ValueError) and str(error).startswith("has "):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"has more than {PIXEL_LIMIT} pixels")
    if isinstance(error, Image.UnidentifiedImageError):
        return ValueError("is not a JPEG, PNG or WebP picture")
    return ValueError(f"cannot be decoded ({type(error).__name__})")
