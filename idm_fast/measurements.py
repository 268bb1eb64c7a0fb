"""Measurements as a file: what a sensing device hands over, and all that reconstruction needs besides the weights.

A file is a NumPy `.npz` without pickled objects:

    format_version  ()              1
    y               (C, n, q)       float32; C = 1 (luma) or 3 (red, green, blue), n = H·W / block_size²
    image_size      (2,)            height and width of the image
    padded_size     (2,)            (H, W) that was sensed: image_size, zero-padded to multiples of block_size
    channels        ()              "y" or "rgb"
    ratio           ()              in (0, 1]; q = ceil(ratio · block_size²)
    block_size      ()
    seed            ()              of `BlockCompressedSensing`; or instead of it both of
    matrix          (block_size², q)  float32, orthonormal columns
    permutation     (H·W,)          int64
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from idm_fast.images import crop, pad_to_block
from idm_fast.outputs import InputError, reason, write_atomically
from idm_fast.physics import BlockCompressedSensing, measurements_per_block

FORMAT_VERSION = 1
REQUIRED = ("y", "image_size", "padded_size", "channels", "ratio", "block_size")


@dataclass(frozen=True, eq=False)
class Measurements:
    """y of an image and how it was sensed. Raises InputError on construction if the parts do not fit together.

    y: (C, n, q) float32, finite. image_size, padded_size: (height, width) in pixels. channels: "y" or "rgb".
    Either `seed`, or `matrix` (block_size², q) and `permutation` (H·W,), say which operator sensed it.
    """

    y: Tensor
    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    channels: str
    ratio: float
    block_size: int
    seed: int | None = None
    matrix: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        if self.channels not in ("y", "rgb"):
            raise InputError(f"channels is {self.channels!r}; expected 'y' or 'rgb'")
        try:
            q = measurements_per_block(self.ratio, self.block_size)
        except ValueError as error:
            raise InputError(str(error)) from error
        for side, padded in zip(self.image_size, self.padded_size, strict=True):
            if side < 1 or padded != side + -side % self.block_size:
                raise InputError(
                    f"image_size {self.image_size} and padded_size {self.padded_size} do not fit: padded_size must be "
                    f"image_size rounded up to multiples of block_size {self.block_size}"
                )
        blocks = self.padded_size[0] * self.padded_size[1] // self.block_size**2
        expected = (3 if self.channels == "rgb" else 1, blocks, q)
        if tuple(self.y.shape) != expected:
            raise InputError(
                f"y has shape {tuple(self.y.shape)}; expected {expected} = (channels, H·W/block_size², "
                f"ceil(ratio·block_size²)) for channels {self.channels!r}, padded size {self.padded_size}, "
                f"block_size {self.block_size} and ratio {self.ratio:g}"
            )
        if not bool(torch.isfinite(self.y).all()):
            count = int((~torch.isfinite(self.y)).sum())
            raise InputError(f"y holds {count} NaN or infinite values of {self.y.numel()}; measurements must be finite")
        if self.seed is None and (self.matrix is None or self.permutation is None):
            raise InputError("how y was sensed is missing: expected seed, or both matrix and permutation")

    def physics(self) -> BlockCompressedSensing:
        """The operator that sensed y, on the CPU. Raises InputError if matrix or permutation are not valid."""
        try:
            if self.seed is not None:
                return BlockCompressedSensing(self.padded_size, self.ratio, self.block_size, self.seed)
            return BlockCompressedSensing(
                self.padded_size, self.ratio, self.block_size, matrix=self.matrix, permutation=self.permutation
            )
        except ValueError as error:
            raise InputError(str(error)) from error

    def save(self, path: str | Path) -> Path:
        """Writes the file in one step. Raises InputError if it cannot be written."""
        arrays: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "y": self.y.detach().cpu().numpy().astype(np.float32),
            "image_size": self.image_size,
            "padded_size": self.padded_size,
            "channels": self.channels,
            "ratio": self.ratio,
            "block_size": self.block_size,
        }
        if self.seed is not None:
            arrays["seed"] = self.seed
        else:
            assert self.matrix is not None and self.permutation is not None
            arrays["matrix"] = self.matrix.detach().cpu().numpy().astype(np.float32)
            arrays["permutation"] = self.permutation.detach().cpu().numpy().astype(np.int64)
        return write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> Measurements:
        """Reads and checks a file; pickles in it are refused, never executed. Raises InputError naming the file."""
        arrays = _read_arrays(Path(path))
        try:
            version = int(_scalar(arrays, "format_version", "iu")) if "format_version" in arrays else FORMAT_VERSION
            if version != FORMAT_VERSION:
                raise InputError(f"format_version is {version}; this idm-fast reads {FORMAT_VERSION}: update idm-fast")
            missing = [name for name in REQUIRED if name not in arrays]
            if missing:
                raise InputError(
                    f"{', '.join(missing)} missing; expected what `idm-fast reconstruct --save_measurements` writes"
                )
            return cls(
                y=_tensor(arrays, "y", "f", np.float32),
                image_size=_size(arrays, "image_size"),
                padded_size=_size(arrays, "padded_size"),
                channels=str(_scalar(arrays, "channels", "U")),
                ratio=float(_scalar(arrays, "ratio", "fiu")),
                block_size=int(_scalar(arrays, "block_size", "iu")),
                seed=int(_scalar(arrays, "seed", "iu")) if "seed" in arrays else None,
                matrix=_tensor(arrays, "matrix", "f", np.float32) if "matrix" in arrays else None,
                permutation=_tensor(arrays, "permutation", "iu", np.int64) if "permutation" in arrays else None,
            )
        except InputError as error:
            raise InputError(f"measurement file {path}: {error}") from error


def sense(
    image: Tensor, ratio: float, block_size: int = 32, seed: int = 2025, device: torch.device | str = "cpu"
) -> tuple[Measurements, BlockCompressedSensing]:
    """Senses an image of any size: zero-pads it to the block size and measures every channel with the same operator.

    image: (C, H, W) in [0, 1], C = 1 or 3; device: where it is measured. Returns the measurements (on the CPU) and the
    operator (on the device).
    Raises InputError if a side is under one block.
    """
    size = (image.shape[-2], image.shape[-1])
    require_one_block(size, block_size)
    padded = pad_to_block(image.float(), block_size)
    padded_size = (padded.shape[-2], padded.shape[-1])
    physics = BlockCompressedSensing(padded_size, ratio, block_size, seed).to(device)
    with torch.no_grad():
        y = physics.A(padded[:, None].to(device)).cpu()
    channels = "rgb" if image.shape[0] == 3 else "y"
    return Measurements(y, size, padded_size, channels, ratio, block_size, seed), physics


def require_one_block(size: tuple[int, int], block_size: int) -> None:
    """Raises InputError if a side of the image is under one block: its padding would outweigh the image."""
    if min(size) < block_size:
        raise InputError(
            f"the image is {size[0]}×{size[1]} pixels (height×width), under one block on a side; "
            f"expected at least {block_size}×{block_size}"
        )


def to_image(x: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A batch of channels (C, 1, H, W) from the model or from Aᵀ → the image (C, height, width), padding cut off."""
    return crop(x[:, 0], image_size)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read measurement file {path}: {reason(error)}") from error
    if not content:
        raise InputError(f"measurement file {path} is empty (0 bytes)")
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise InputError(f"measurement file {path} is damaged or no .npz file")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # damaged archives raise from zipfile, zlib, struct and NumPy alike
        raise InputError(f"measurement file {path} cannot be read: {reason(error)}") from error


def _checked(arrays: dict[str, np.ndarray], name: str, kinds: str, shape: tuple[int, ...] | None) -> np.ndarray:
    array = arrays[name]
    if array.dtype.kind not in kinds or (shape is not None and array.shape != shape):
        raise InputError(f"{name} has type {array.dtype} and shape {array.shape}, which is not what the format says")
    return array


def _scalar(arrays: dict[str, np.ndarray], name: str, kinds: str) -> Any:
    return _checked(arrays, name, kinds, ()).item()


def _size(arrays: dict[str, np.ndarray], name: str) -> tuple[int, int]:
    height, width = _checked(arrays, name, "iu", (2,)).tolist()
    return height, width


def _tensor(arrays: dict[str, np.ndarray], name: str, kinds: str, dtype: type) -> Tensor:
    return torch.from_numpy(_checked(arrays, name, kinds, None).astype(dtype))
