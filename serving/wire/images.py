"""Uploaded pictures to tensors, away from the event loop. What a hostile file can cost is bounded before it is opened."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.aliases import AliasImage
from serving.wire.tensors import Array, InputError, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is opened. Others are rare, and their readers are where the holes are (EPS even starts a program)."""
_THREADS = 2
"""Pictures that are unpacked at a time: each may take four bytes a pixel, and they must leave a core to the models."""
_MOST_IMAGES = 64
_MOST_ELEMENTS = 1 << 26
"""Of the tensor: small files may become large pictures."""
_MOST_SCANS = 64
"""Of a JPEG. A progressive one has about ten; each costs a pass over the whole picture, and may have twenty bytes."""
_MOST_WEBP_PIXELS = 4_000_000
"""Its reader does not let go of the interpreter: nothing else moves meanwhile, 40 ms for so many."""
_GAP = 3
"""How much larger than the tensor a picture is left at first. What is shrunk so is not told from what was resized at once."""
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_CLEAR_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_ROWS = 64


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "image")


async def tensor_of(files: Sequence[bytes], how: AliasImage, datatype: str) -> Array:
    """The pictures as one tensor of how's shape; several only where it has a batch. Raises InputError that says which is wrong."""
    if len(files) > 1 and "N" not in how.layout:
        raise InputError(f"{len(files)} images were sent, this path takes one")
    if len(files) > _MOST_IMAGES:
        raise InputError(f"{len(files)} images were sent, the limit is {_MOST_IMAGES}")
    most = _MOST_ELEMENTS // (how.width * how.height * how.channels)
    if len(files) > most:
        raise InputError(f"{len(files)} images were sent, the limit at this size is {most}", status=413)
    return await asyncio.get_running_loop().run_in_executor(_threads(), _tensor_of, files, how, datatype)


def _tensor_of(files: Sequence[bytes], how: AliasImage, datatype: str) -> Array:
    left, pixels = how.max_pixels, []
    for file in files:
        array, size = _pixels(file, how, left)
        left -= size
        pixels.append(array)
    return arranged(np.stack(pixels), how, datatype)


def arranged(pixels: Array, how: AliasImage, datatype: str) -> Array:
    """(images, height, width, channels) of 0 to 255 as the model wants it."""
    if datatype == "UINT8" and how.scale == 1 and not how.mean and not how.std:
        values: Array = pixels
    else:
        values = pixels.astype(np.float64 if datatype == "FP64" else np.float32)
        values *= how.scale
        if how.mean:
            values -= np.asarray(how.mean, values.dtype)
        if how.std:
            values /= np.asarray(how.std, values.dtype)
        dtype = np.dtype({"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<f4"}.get(datatype, datatype.lower()))
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            # The largest whole number of 64 bits is no float32: step down to one that is.
            top = np.nextafter(np.float32(limits.max), np.float32(0)) if dtype.itemsize > 2 else limits.max
            values = np.clip(np.rint(values), limits.min, top)
        with np.errstate(over="ignore"):  # of FP16: the settings' scale is the operator's
            values = values.astype(dtype)
    if "C" not in how.layout:
        values = values[..., 0]
    if "N" not in how.layout:
        values = values[0]
    have = [letter for letter in "NHWC" if letter in how.layout]
    return np.ascontiguousarray(values.transpose([have.index(letter) for letter in how.layout]))


def _pixels(file: bytes, how: AliasImage, left: int) -> tuple[Array, int]:
    """(height, width, channels) of uint8, and how many pixels were sent; at most `left` may be. Raises InputError."""
    from PIL import Image as images
    from PIL import ImageOps, UnidentifiedImageError

    if not file:
        raise InputError("the image is empty: it has no bytes")
    if file.startswith(b"\xff\xd8") and file.count(b"\xff\xda") > _MOST_SCANS:
        raise InputError(f"the image is a JPEG of more than {_MOST_SCANS} scans; save it again")
    try:
        with images.open(io.BytesIO(file), formats=FORMATS) as opened:
            width, height = opened.size
            _check_size(opened, how, left)
            side = max(how.width, how.height) * _GAP  # it may lie on its side
            if opened.format == "JPEG":
                opened.draft(None, (side, side))
            opened.load()
            small = _smaller(_eight_bits(opened), side)
            upright = ImageOps.exif_transpose(small)
            made = _resized(_plain(upright, how), how)
            return np.asarray(made).reshape(how.height, how.width, how.channels), width * height
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"the image is none of {quoted(FORMATS)}") from error
    except (images.DecompressionBombError, images.DecompressionBombWarning) as error:
        raise InputError("the image has more pixels than can be right; send it smaller", status=413) from error
    except Exception as error:  # what the decoders raise on broken files has no base of its own
        raise InputError(f"the image cannot be read: {error or type(error).__name__}") from error


def _check_size(image: Image, how: AliasImage, left: int) -> None:
    """Before anything is unpacked. Raises InputError."""
    width, height = image.size
    if how.resize == "exact" and sorted(image.size) != sorted((how.width, how.height)):
        raise _other_size(image, how)
    limit = min(left, _MOST_WEBP_PIXELS) if image.format == "WEBP" else left
    if width * height > limit:
        what = (
            f"the limit is {min(limit, how.max_pixels)}"
            if limit == how.max_pixels or image.format == "WEBP"
            else (f"with those before it more than the limit of {how.max_pixels}")
        )
        raise InputError(f"the image has {width} x {height} pixels, {what}; send it smaller", status=413)


def _other_size(image: Image, how: AliasImage) -> InputError:
    return InputError(
        f"the image has {image.width} x {image.height} pixels, this path takes {how.width} x {how.height}"
    )


def _eight_bits(image: Image) -> Image:
    """With eight bits a channel, and no palette."""
    from PIL import Image as images

    if image.mode in _DEEP_MODES:
        deep = np.asarray(image)
        upper = np.empty(deep.shape, np.uint8)
        for start in range(0, len(deep), _ROWS):
            part = deep[start : start + _ROWS].astype(np.float32)
            upper[start : start + _ROWS] = np.clip(np.rint(part / 257), 0, 255)
        return images.fromarray(upper)
    if "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("P", "1"):
        return image.convert("L" if image.mode == "1" else "RGB")
    return image


def _smaller(image: Image, side: int) -> Image:
    """By a whole number, so that both sides stay at least `side` long: what follows goes over the whole picture several times."""
    factor = min(image.size) // side
    return image.reduce(factor) if factor > 1 else image


def _plain(image: Image, how: AliasImage) -> Image:
    """As many channels as are wanted; what shines through is the background."""
    from PIL import Image as images

    if how.channels == 4:
        return image.convert("RGBA")
    if image.mode in _CLEAR_MODES:
        over = image.convert("RGBA")
        grey = images.new("RGBA", over.size, (how.background,) * 3 + (255,))
        image = images.alpha_composite(grey, over)
    return image.convert("RGB" if how.channels == 3 else "L")


def _resized(image: Image, how: AliasImage) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    size = (how.width, how.height)
    if image.size == size:
        return image
    if how.resize == "exact":
        raise _other_size(image, how)
    method = images.Resampling.BILINEAR
    if how.resize == "fit":
        colour: Any = {1: how.background, 3: (how.background,) * 3, 4: (*(how.background,) * 3, 255)}[how.channels]
        return ImageOps.pad(image, size, method, color=colour)
    if how.resize == "crop":
        return ImageOps.fit(image, size, method)
    return image.resize(size, method)
