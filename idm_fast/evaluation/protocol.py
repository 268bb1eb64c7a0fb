"""The published test protocol of IDM (`test.py` of the authors' repository).

Luma; zero padding below and at the right to the block size; one generator, seeded once, draws Φ and then one
permutation an image, in the order of the images; metrics on the unpadded region, see `metrics`. The authors take the
images in the order of the file system and draw on the GPU when there is one: here the order is given and the draws are
made on the CPU, so that results repeat on every machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from idm_fast.evaluation.metrics import psnr, ssim
from idm_fast.images import pad_to_block, read_luma
from idm_fast.measurements import require_one_block, to_image
from idm_fast.outputs import InputError
from idm_fast.physics import sensing_sequence

if TYPE_CHECKING:
    from idm_fast.models.idm import IDM

SEED = 2025  # of the published test


@dataclass(frozen=True)
class ImageResult:
    """What was measured on one image at one ratio. PSNR in dB, SSIM in [-1, 1], seconds of the network alone."""

    name: str
    height: int
    width: int
    ratio: float
    psnr_adjoint: float
    ssim_adjoint: float
    psnr: float
    ssim: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One image of the protocol: the true luma, Aᵀy, the network's output, each (H, W) on the CPU, and its result."""

    result: ImageResult
    original: Tensor
    adjoint: Tensor
    output: Tensor


def evaluate(
    model: IDM,
    image_paths: Iterable[str | Path],
    ratio: float,
    block_size: int = 32,
    seed: int = SEED,
    device: str | torch.device = "cpu",
) -> list[ImageResult]:
    """The published protocol on some images; see `reconstructions`, which it runs through."""
    return [item.result for item in reconstructions(model, image_paths, ratio, block_size, seed, device)]


def reconstructions(
    model: IDM,
    image_paths: Iterable[str | Path],
    ratio: float,
    block_size: int = 32,
    seed: int = SEED,
    device: str | torch.device = "cpu",
) -> Iterator[Reconstruction]:
    """Senses and reconstructs the images one after another, in float32, with `model` (which must be on `device`).

    The model is put into eval mode for each image and back. All images are read once before the first is sensed, so
    that InputError (no image, a side under one block, no images at all) comes before any work.
    """
    paths = [Path(path) for path in image_paths]
    operators = sensing_sequence(padded_sizes(paths, block_size), ratio, block_size, seed)
    for path, physics in zip(paths, operators, strict=True):
        physics = physics.to(device)
        original = read_luma(path)
        size = (original.shape[0], original.shape[1])
        with torch.no_grad():
            y = physics.A(pad_to_block(original, block_size)[None, None].to(device))
            adjoint = to_image(physics.A_adjoint(y), size)[0].cpu()
            x, seconds = timed_forward(model, y, physics)
        output = to_image(x, size)[0].cpu()
        require_finite(output, path.name)
        result = ImageResult(
            name=path.name,
            height=size[0],
            width=size[1],
            ratio=ratio,
            psnr_adjoint=psnr(adjoint, original),
            ssim_adjoint=ssim(adjoint, original),
            psnr=psnr(output, original),
            ssim=ssim(output, original),
            seconds=seconds,
        )
        yield Reconstruction(result, original, adjoint, output)


def timed_forward(model: IDM, y: Tensor, physics: torch.nn.Module) -> tuple[Tensor, float]:
    """`model(y, physics)` in eval mode without gradients, and the seconds it took, waiting for the device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _wait(y.device)
            start = time.perf_counter()
            x = model(y, physics)
            _wait(y.device)
            return x, time.perf_counter() - start
    finally:
        model.train(was_training)


def require_finite(output: Tensor, name: str) -> None:
    """Raises InputError if a reconstruction holds NaN or infinite values, which no picture or table should hide."""
    if not bool(torch.isfinite(output).all()):
        raise InputError(f"the reconstruction of {name} holds NaN or infinite values; the weights are not usable")


def averages(results: Sequence[ImageResult]) -> dict[str, float]:
    """Arithmetic means over images of every measured quantity, as published."""
    names = ("psnr_adjoint", "ssim_adjoint", "psnr", "ssim", "seconds")
    return {name: fmean(getattr(result, name) for result in results) for name in names}


def padded_sizes(image_paths: Iterable[str | Path], block_size: int) -> list[tuple[int, int]]:
    """(H, W) of each image after zero padding; reads them all. Raises InputError if one is not usable or none given."""
    sizes = []
    for path in image_paths:
        luma = read_luma(path)
        try:
            require_one_block((luma.shape[0], luma.shape[1]), block_size)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        padded = pad_to_block(luma, block_size).shape
        sizes.append((padded[0], padded[1]))
    if not sizes:
        raise InputError("there are no images to evaluate on")
    return sizes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
