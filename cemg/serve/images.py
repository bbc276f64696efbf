"""Images of items, as clients send them."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from cemg.serve.rows import MAX_IMAGE

PICTURES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
MAX_PIXELS = 4096 * 4096  # of an image that is sent, which bounds the memory and time to decode it


def decoded(text: str) -> bytes:
    """The bytes of an image file from base64, decoded once to see that they are one.

    Raises:
        ValueError: It is not base64, is too large, or is not an image that browsers show. The message is for
            the client.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("must be the base64 of an image file; paths and URLs are not read") from None
    if len(content) > MAX_IMAGE:
        raise ValueError(f"has {len(content):,} bytes; the limit is {MAX_IMAGE:,}")
    try:
        with Image.open(io.BytesIO(content), formats=list(PICTURES)) as picture:
            size = picture.width * picture.height
            if size <= MAX_PIXELS:
                picture.load()
    except Exception as error:  # malformed files make the decoders raise almost anything
        kinds = ", ".join(PICTURES)
        raise ValueError(f"is not a readable image ({kinds}): {type(error).__name__}") from error
    if size > MAX_PIXELS:
        raise ValueError(f"has {size:,} pixels; the limit is {MAX_PIXELS:,}")
    return content


def media_type(content: bytes) -> str | None:
    """The media type of an image that browsers show; None for other files, such as SVG, which has scripts."""
    try:
        with Image.open(io.BytesIO(content), formats=list(PICTURES)) as picture:
            return PICTURES.get(picture.format or "")
    except Exception:  # malformed files make the decoders raise almost anything
        return None
