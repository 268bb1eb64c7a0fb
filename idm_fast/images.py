"""Image files to tensors in [0, 1] and back, for every kind of file that Pillow opens.

What is read: the first frame, turned as its EXIF orientation says. Alpha and palette transparency are dropped, as
OpenCV's `imread` does: the colour stored under a transparent pixel counts. Gray 16-bit and 32-bit integer files are
scaled by 65535 and keep all their bits; 16-bit colour is read by Pillow through its upper 8 bits. Float files must
hold values in [0, 1]. Luma is Pillow's `convert("L")`, equal to OpenCV's Y: results compare with published ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageOps
from torch import Tensor

from idm_fast.outputs import InputError, reason, write_atomically

__all__ = ["InputError", "crop", "list_images", "pad_to_block", "read_image", "read_luma", "to_uint8", "write_image"]

IMAGE_SUFFIXES = frozenset(".bmp .gif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())


def read_luma(path: str | Path) -> Tensor:
    """The luma of an image file: (H, W) float32 in [0, 1]. Raises InputError where `read_image` does."""
    return read_image(path, "y")[0]


def read_image(path: str | Path, channels: str = "y") -> Tensor:
    """An image file as (1, H, W) luma for `channels="y"` or (3, H, W) for `"rgb"`; float32 in [0, 1].

    A gray file read as "rgb" has three equal channels.
    Raises InputError for a path that is no file, a file that is no image, is truncated, or holds values out of range.
    """
    if channels not in ("y", "rgb"):
        raise ValueError(f"channels is {channels!r}; expected 'y' or 'rgb'")
    image = _decode(Path(path))
    if image.mode in ("L", "RGB"):
        pixels = np.asarray(image.convert("L" if channels == "y" else "RGB"), np.float32) / np.float32(255)
    else:
        pixels = _deep_gray(image, Path(path))
    tensor = torch.from_numpy(np.array(pixels, np.float32))
    if tensor.ndim == 3:
        return tensor.permute(2, 0, 1).contiguous()
    return tensor[None] if channels == "y" else tensor.expand(3, -1, -1).contiguous()


def _decode(path: Path) -> Image.Image:
    """Opens, decodes and turns the file; the mode is L, RGB, or one of the deep gray modes I;16*, I, F."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected an image file")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); expected an image file")
        with warnings.catch_warnings():
            # Large photographs are welcome; Pillow still refuses at twice the size that it warns about.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that Pillow can read") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise InputError(f"{path} cannot be read as an image: {reason(error)}") from error
    if image.mode in ("L", "RGB", "I", "F") or image.mode.startswith("I;16"):
        return image
    try:
        if image.mode in ("1", "LA"):
            return image.convert("L")
        if image.mode == "La":
            return image.convert("LA").convert("L")
        # Through RGBA, because Pillow would blend nothing but warn about a palette with a transparent entry.
        if image.mode in ("P", "PA", "RGBa"):
            image = image.convert("RGBA")
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"{path} has the colour space {image.mode}, which cannot be turned into RGB") from error


def _deep_gray(image: Image.Image, path: Path) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)
    # A NaN makes both of these NaN, and every comparison with it is False.
    low, high, top = values.min(), values.max(), 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= top):
        raise InputError(f"{path} holds values from {low:g} to {high:g}; expected 0 to {top} in an image of this kind")
    return values / top


def to_uint8(image: Tensor) -> np.ndarray:
    """(H, W), (1, H, W) or (3, H, W), any range → uint8 (H, W) or (H, W, 3): clamped to [0, 1], times 255, rounded."""
    if image.ndim == 3 and image.shape[0] == 1:
        image = image[0]
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def write_image(path: str | Path, image: Tensor) -> Path:
    """Writes an 8-bit PNG: gray for (H, W) or (1, H, W), colour for (3, H, W). Raises InputError if it cannot."""

    def write(file: BinaryIO) -> None:
        Image.fromarray(to_uint8(image)).save(file, format="png")

    return write_atomically(path, write)


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, by their ending, sorted by path. Raises InputError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; expected a folder of images")
    found = folder.rglob("*") if recursive else folder.glob("*")
    try:
        paths = sorted(
            path for path in found
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise InputError(f"cannot list {folder}: {reason(error)}") from error
    if not paths:
        raise InputError(f"{folder} holds no images (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def pad_to_block(x: Tensor, block_size: int) -> Tensor:
    """(…, H, W) with zero rows below and zero columns at the right, so that both sides are multiples of block_size."""
    height, width = x.shape[-2:]
    return functional.pad(x, (0, -width % block_size, 0, -height % block_size))


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The upper left (…, size[0], size[1]) of x: undoes `pad_to_block`."""
    return x[..., : size[0], : size[1]]
