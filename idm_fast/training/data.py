"""Random crops of a folder of images, every random choice a function of (seed, step, place in the global batch).

Nothing is drawn from a running generator. So a resumed run sees what the uninterrupted one would have seen, and n
processes with batch b together see what one process with batch n·b sees. As published: crops of the luma, images
smaller than the crop left out; one of 8 flips and rotations, one ratio and one permutation for the whole batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from idm_fast.images import list_images, read_luma
from idm_fast.outputs import InputError, reason

T = TypeVar("T")

CACHE_BYTES = 2**30
"""Lumas are decoded once and kept, a byte a pixel, if all of them fit here."""

_STEP, _SAMPLE = 1, 2  # what a stream is for; numpy seeds (s, 1) and (s, 1, 0) alike, so streams have one length


def _stream(seed: int, purpose: int, step: int, sample: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, step, sample))))


@dataclass(frozen=True, eq=False)
class StepDraw:
    """What one update draws for its whole global batch."""

    ratio: float
    transform: int
    """0 … 7: rotated by transform % 4 quarter turns, mirrored first from 4 on."""
    network_seed: int
    """For torch's own generator, should the network draw (dropout)."""
    permutation: Tensor
    """(side²,) int64."""


def draw_step(seed: int, step: int, ratios: Sequence[float], side: int) -> StepDraw:
    """The choices of update `step` (0-based) for crops of side × side pixels."""
    stream = _stream(seed, _STEP, step)
    ratio, transform = ratios[int(stream.integers(len(ratios)))], int(stream.integers(8))
    network_seed = int(stream.integers(2**63))
    return StepDraw(ratio, transform, network_seed, torch.from_numpy(stream.permutation(side * side)))


class RandomCrops(Dataset[Tensor]):
    """`crops[step, sample]`: the crop at place `sample` of the global batch of update `step`, uint8 (1, side, side).

    Values are the 8-bit luma (divide by 255). Crops are not flipped; see `transform`.

    Args:
        folder: searched with its subfolders.
        side: of a crop in pixels. Images with a side below it are left out and counted in `skipped`.
        seed: of the whole run.
        progress: show a bar while the images are read.

    Raises:
        InputError: no images, none large enough, or a file that is no image or is truncated (noticed here when the
            images fit the cache, else when the image is first drawn).
    """

    def __init__(self, folder: Path, side: int, seed: int, *, progress: bool = False) -> None:
        found = list_images(folder, recursive=True)
        sizes = dict(zip(found, _map(_header_size, found, "reading sizes", progress), strict=True))
        self.paths = [path for path in found if min(sizes[path]) >= side]
        self.skipped = len(found) - len(self.paths)
        if not self.paths:
            largest = max(min(size) for size in sizes.values())
            raise InputError(
                f"--train_data_dir {folder}: all {len(found)} images have a side below --resolution {side} "
                f"(the largest short side is {largest}); lower --resolution or give larger images"
            )
        self.side, self.seed = side, seed
        listing = "".join(f"{path.relative_to(folder).as_posix()} {sizes[path]}\n" for path in self.paths)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()
        pixels = sum(width * height for width, height in map(sizes.__getitem__, self.paths))
        self._lumas = _map(_read_bytes, self.paths, "reading images", progress) if pixels <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        stream = _stream(self.seed, _SAMPLE, *place)
        index = int(stream.integers(len(self.paths)))
        luma = self._lumas[index] if self._lumas is not None else _read_bytes(self.paths[index])
        top, left = (int(stream.integers(length - self.side + 1)) for length in luma.shape)
        return torch.from_numpy(luma[None, top : top + self.side, left : left + self.side])


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """The (step, sample) places that one process loads, a forward pass at a time, from `first_step` to the last.

    The global batch of an update has accumulation · processes · batch places. Forward pass m of process r takes the
    places from (m · processes + r) · batch on.
    """

    def __init__(
        self, first_step: int, last_step: int, batch: int, accumulation: int = 1, process: int = 0, processes: int = 1
    ) -> None:
        self.steps = range(first_step, last_step)
        self.batch, self.accumulation, self.process, self.processes = batch, accumulation, process, processes

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for m in range(self.accumulation):
                start = (m * self.processes + self.process) * self.batch
                yield [(step, sample) for sample in range(start, start + self.batch)]


def transform(x: Tensor, mode: int) -> Tensor:
    """One of the 8 flips and rotations of (…, side, side), as numbered by `StepDraw.transform`."""
    mirrored = x.flip(-1) if mode >= 4 else x
    return mirrored.rot90(mode % 4, (-2, -1))


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow's readers raise almost anything on a damaged header
        raise InputError(f"{path} is not an image that Pillow can read: {reason(error)}; remove it") from error


def _read_bytes(path: Path) -> np.ndarray:
    # 8 bits, as the published training data had, so that cached and uncached runs are the same.
    return (read_luma(path) * 255).round().to(torch.uint8).numpy()


def _map(function: Callable[[Path], T], paths: Sequence[Path], title: str, progress: bool) -> list[T]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, paths), title, len(paths), leave=False, disable=not progress))
