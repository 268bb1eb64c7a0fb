"""`idm-fast reconstruct`: images or measurement files → PNGs. All is checked before the first file is written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from idm_fast.commands.network import open_network, sensing_defaults
from idm_fast.evaluation.metrics import psnr, ssim
from idm_fast.evaluation.protocol import require_finite, timed_forward
from idm_fast.evaluation.report import ComparisonRow, comparison_figure
from idm_fast.images import list_images, read_image, write_image
from idm_fast.measurements import Measurements, require_one_block, sense, to_image
from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError, output_folder
from idm_fast.physics import BlockCompressedSensing
from idm_fast.pretrained import require_trained_for

MEASUREMENTS_SUFFIX = "_measurements"


@dataclass(frozen=True)
class Source:
    """A file to reconstruct from, and the name its results start with."""

    path: Path
    measured: bool
    name: str


@dataclass(frozen=True)
class Sensing:
    """How images are sensed; measurement files say it themselves."""

    ratio: float
    block_size: int
    seed: int
    channels: str


def run(arguments: argparse.Namespace) -> None:
    """Checks all inputs, then reconstructs and writes one after another. Raises InputError."""
    sources = find_sources(arguments.images)
    only_measured = all(source.measured for source in sources)
    _refuse_sensing_flags(arguments, only_measured)
    for source in sources:
        _require_file(source.path)
    model, device = open_network(arguments)
    sensing = None if only_measured else _sensing(arguments, model)
    for source in sources:
        _check(source, sensing, model, arguments.any_ratio)
    folder = output_folder(arguments.output_dir)
    _refuse_to_overwrite(sources, folder)

    width = max(len(source.path.name) for source in sources)
    for source in tqdm(sources, desc="reconstruct", unit="image", disable=None, leave=False):
        original, measurements, operator = _measure(source, sensing, device)
        with torch.no_grad():
            physics, y = operator.to(device), measurements.y.to(device)
            adjoint = to_image(physics.A_adjoint(y), measurements.image_size).cpu()
            x, seconds = timed_forward(model, y, physics)
        image = to_image(x, measurements.image_size).cpu()
        require_finite(image, source.path.name)
        target = write_image(folder / f"{source.name}_idm.png", image)
        if arguments.save_measurements and not source.measured:
            measurements.save(folder / f"{source.name}{MEASUREMENTS_SUFFIX}.npz")
        if arguments.compare:
            row = ComparisonRow(source.path.name, adjoint, image, original)
            comparison_figure([row], folder / f"{source.name}_comparison.png")
        summary = _summary(measurements, adjoint, image, original)
        tqdm.write(f"{source.path.name:{width}}  {summary}  {seconds:6.2f} s  {target}")


def find_sources(images: list[str]) -> list[Source]:
    """The files to work on, folders opened. Raises InputError if two would be written under one name."""
    paths: list[Path] = []
    for path in map(Path, images):
        paths += list_images(path) if path.is_dir() else [path]
    sources = []
    for path in dict.fromkeys(paths):
        measured = path.suffix.lower() == ".npz"
        sources.append(Source(path, measured, path.stem.removesuffix(MEASUREMENTS_SUFFIX) if measured else path.stem))
    seen: dict[str, Path] = {}
    for source in sources:
        other = seen.setdefault(source.name.lower(), source.path)
        if other is not source.path:
            target = f"{source.name}_idm.png"
            raise InputError(f"{other} and {source.path} would both be written as {target}; do them one by one")
    return sources


def _require_file(path: Path) -> None:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; expected an image or a .npz of measurements")


def _refuse_sensing_flags(arguments: argparse.Namespace, only_measured: bool) -> None:
    flags = ("cs_ratio", "channels", "block_size", "seed", "save_measurements")
    given = [f"--{flag}" for flag in flags if getattr(arguments, flag) not in (None, False)]
    if only_measured and given:
        raise InputError(f"{', '.join(given)}: the measurement file says how it was sensed; leave the flag out")


def _sensing(arguments: argparse.Namespace, model: IDM) -> Sensing:
    ratio = arguments.cs_ratio
    if ratio is None:
        if not model.config["trained_ratios"]:
            raise InputError("these weights do not say which ratio they were trained for; pass --cs_ratio")
        ratio = min(model.config["trained_ratios"])
    block_size, seed = sensing_defaults(arguments, model)
    return Sensing(ratio, block_size, seed, arguments.channels or "y")


def _check(source: Source, sensing: Sensing | None, model: IDM, any_ratio: bool) -> None:
    """Reads the file in full and sees that these weights can reconstruct it."""
    try:
        if source.measured:
            measurements = Measurements.load(source.path)
            measurements.physics()
            require_trained_for(model, measurements.ratio, measurements.block_size, any_ratio)
            return
        assert sensing is not None
        require_trained_for(model, sensing.ratio, sensing.block_size, any_ratio)
        image = read_image(source.path, sensing.channels)
        require_one_block((image.shape[-2], image.shape[-1]), sensing.block_size)
    except InputError as error:
        raise InputError(str(error) if str(source.path) in str(error) else f"{source.path}: {error}") from error


def _refuse_to_overwrite(sources: list[Source], folder: Path) -> None:
    inputs = {source.path.resolve() for source in sources}
    for source in sources:
        for ending in ("_idm.png", "_comparison.png", f"{MEASUREMENTS_SUFFIX}.npz"):
            target = (folder / f"{source.name}{ending}").resolve()
            if target in inputs and not (source.measured and target == source.path.resolve()):
                raise InputError(f"the result {target} would overwrite an input; choose another --output_dir")


def _measure(
    source: Source, sensing: Sensing | None, device: torch.device
) -> tuple[Tensor | None, Measurements, BlockCompressedSensing]:
    """The true image where it is known, its measurements, and the operator."""
    if source.measured:
        measurements = Measurements.load(source.path)
        return None, measurements, measurements.physics()
    assert sensing is not None
    original = read_image(source.path, sensing.channels)
    return original, *sense(original, sensing.ratio, sensing.block_size, sensing.seed, device)


def _summary(measurements: Measurements, adjoint: Tensor, image: Tensor, original: Tensor | None) -> str:
    height, width = measurements.image_size
    text = f"{height}×{width}  ratio {measurements.ratio:g}"
    if original is None:
        return text
    return (
        f"{text}  PSNR {psnr(image, original):5.2f} dB (Aᵀy {psnr(adjoint, original):5.2f})"
        f"  SSIM {ssim(image, original):.4f} (Aᵀy {ssim(adjoint, original):.4f})"
    )
