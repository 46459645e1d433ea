"""Images in a prompt's messages: which content parts are images, and reading them, within limits.

Untrusted input is limited: a few formats, a maximum number of bytes and of pixels, and nothing is downloaded.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats that are supported."""
KINDS = ("image", "image_url", "input_image")
"""The `type` of a content part that is an image: in transformers, in OpenAI's API, and in its newer API."""
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
"""The keys that may hold the image in such a part."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits: images per prompt, bytes per file, pixels per image. `local`: whether paths are allowed."""

    images: int = 32
    bytes: int = 20 << 20
    pixels: int = 40_000_000
    local: bool = True


IMAGE_LIMITS = ImageLimits()


def has_images(prompt: Any) -> bool:
    """Whether a prompt is a list of messages that contains an image."""
    if isinstance(prompt, str):
        return False
    contents = [message.get("content") for message in prompt if isinstance(message, Mapping)]
    return any(map(_is_image, (part for content in contents if isinstance(content, (list, tuple)) for part in content)))


def load_images(messages: Sequence[Mapping[str, Any]], bounds: ImageLimits = IMAGE_LIMITS) -> list[dict[str, Any]]:
    """The messages with their images loaded: each such part is `{"type": "image", "image": …}`, a Pillow image in RGB.

    Raises `TrimtabError`, naming the image by its number, for one that can't be read or exceeds the limits.
    """
    count = 0
    result = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
                raise TrimtabError(f"a message's content is a text or a list of parts, got {type(content).__name__}")
            parts: list[dict[str, Any]] = []
            for part in content:
                if not _is_image(part):
                    parts.append(_text(part))
                    continue
                count += 1
                if count > bounds.images:
                    raise TrimtabError(f"a prompt has {bounds.images} images at most; leave some out")
                parts.append(
                    {"type": "image", "image": read_image(_image_source(part, count), bounds, f"image {count}")}
                )
            content = parts
        result.append({**message, "content": content})
    return result


def image_content(images: Sequence[str | Path], text: str) -> list[dict[str, Any]]:
    """A message's content: these images, followed by the text."""
    return [*({"type": "image", "path": str(path)} for path in images), {"type": "text", "text": text}]


def text_of(content: Any) -> str:
    """A message's content as readable text, with each image replaced by its path."""
    if isinstance(content, str):
        return content
    return " ".join(
        f"[image {part.get('path', '')}]".replace(" ]", "]") if _is_image(part) else part["text"] for part in content
    )


def read_image(source: Any, bounds: ImageLimits = IMAGE_LIMITS, what: str = "the image") -> Any:
    """A Pillow image in RGB, with its EXIF orientation applied.

    Args:
        source: A Pillow image, the bytes of a file, a path, or a `data:` URL.
        bounds: The limits.
        what: The image's name, for errors.

    Raises:
        TrimtabError: It isn't an image, can't be decoded, is too large, or is a URL that would have to be downloaded.
    """
    pillow = _pillow()
    if isinstance(source, pillow.Image):
        _check_size(source, bounds, what)
        return source.convert("RGB")
    data = source if isinstance(source, (bytes, bytearray)) else _data(source, bounds, what)
    if len(data) > bounds.bytes:
        raise TrimtabError(f"{what} has {len(data)} bytes, but the limit is {bounds.bytes}; make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # its size is checked below
            image = pillow.open(BytesIO(data), formats=FORMATS)
        _check_size(image, bounds, what)
        if getattr(image, "n_frames", 1) > 1:
            raise TrimtabError(f"{what} is an animation of {image.n_frames} frames; give one frame of it")
        image.load()
        from PIL import ImageOps

        return ImageOps.exif_transpose(image).convert("RGB")
    except pillow.DecompressionBombError:
        raise TrimtabError(_too_many_pixels(what, bounds)) from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        reason = str(error).partition("<")[0].strip() or type(error).__name__
        raise TrimtabError(f"{what} can't be read ({reason}); give a {', '.join(FORMATS)} file") from None


def _check_size(image: Any, bounds: ImageLimits, what: str) -> None:
    if image.width * image.height > bounds.pixels:
        raise TrimtabError(_too_many_pixels(f"{what}, {image.width} by {image.height},", bounds))
    if not image.width or not image.height:
        raise TrimtabError(f"{what} is empty: {image.width} by {image.height} pixels")


def _too_many_pixels(what: str, bounds: ImageLimits) -> str:
    return f"{what} has more than {bounds.pixels} pixels; make it smaller"


def _data(image: Any, bounds: ImageLimits, what: str) -> bytes:
    """The bytes of a file, or of a `data:` URL."""
    if isinstance(image, str) and image[:5].lower() == "data:":
        head, comma, body = image.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise TrimtabError(f"{what}: a data: URL of an image is data:image/png;base64,…")
        if len(body) > bounds.bytes * 4 // 3 + 4:
            raise TrimtabError(f"{what} has more than {bounds.bytes} bytes; make it smaller")
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise TrimtabError(f"{what}: its data: URL isn't base64: {error}") from None
    if isinstance(image, str) and "://" in image[:32]:
        instead = "give its file, its bytes or a data: URL" if bounds.local else "give a data: URL"
        raise TrimtabError(f"{what} is a URL, and nothing is downloaded; {instead}")
    if not isinstance(image, (str, Path)):
        raise TrimtabError(f"{what} must be a Pillow image, bytes, a path or a data: URL, got {type(image).__name__}")
    if not bounds.local:
        raise TrimtabError(f"{what} isn't a data: URL; give data:image/png;base64,…")
    path = Path(image)
    try:
        if not path.is_file():
            raise TrimtabError(f"{what}: there is no file {str(path)[:200]}")
        if path.stat().st_size > bounds.bytes:
            raise TrimtabError(f"{what}: {path} has more than {bounds.bytes} bytes; make it smaller")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that contains a null character
        raise TrimtabError(f"{what}: {str(path)[:200]} can't be read: {error}") from None


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in KINDS


def _image_source(part: Mapping[str, Any], number: int) -> Any:
    """The image that a part holds."""
    present = [part[name] for name in IMAGE_KEYS if part.get(name) is not None]
    if len(present) != 1:
        raise TrimtabError(
            f"image {number}: its part needs exactly one of {', '.join(IMAGE_KEYS)}, and has {len(present)}"
        )
    source = present[0]["url"] if isinstance(present[0], Mapping) and "url" in present[0] else present[0]
    return f"data:;base64,{source}" if "base64" in part and isinstance(source, str) else source


def _text(part: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(part.get("text"), str):
        raise TrimtabError(f"a part of a message is a text or an image, got {part.get('type') or sorted(part)}")
    return {"type": "text", "text": part["text"]}


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise TrimtabError("images need Pillow: pip install 'trimtab[vision]'") from None
    return Image
