"""Results for people (tables, figures) and for programs (CSV, JSON). Figures need Pillow alone."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import idm_fast
from idm_fast.evaluation.metrics import psnr, ssim
from idm_fast.evaluation.protocol import ImageResult, averages
from idm_fast.images import to_uint8
from idm_fast.outputs import write_atomically

ERROR_GAIN = 5
LARGEST_PANEL = 512  # pixels; larger images are scaled down in figures, smaller ones never up
SMALLEST_PANEL = 200  # so that a caption fits below
GAP = 12
TITLE_SIZE, CAPTION_SIZE = 18, 14
INK, FAINT_INK, PAPER = (20, 20, 20), (90, 90, 90), (255, 255, 255)


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """One image of a figure: (H, W) or (C, H, W) tensors in [0, 1]; `original` is None where nobody knows it."""

    name: str
    adjoint: Tensor
    output: Tensor
    original: Tensor | None = None


def comparison_figure(rows: Sequence[ComparisonRow], path: str | Path) -> Path:
    """Writes a PNG: one line an image; original, Aᵀy, IDM, |error|×5, with PSNR and SSIM below.

    Where no row has its original the columns are Aᵀy and IDM. Raises InputError if the file cannot be written.
    """
    with_original = any(row.original is not None for row in rows)
    titles = ["original", "Aᵀy", "IDM", f"error x{ERROR_GAIN}"] if with_original else ["Aᵀy", "IDM"]
    lines = [_panels(row, with_original) for row in rows]
    widths = [panel.width for line in lines for panel, _ in line if panel is not None]
    heights = [max(panel.height for panel, _ in line if panel is not None) for line in lines]
    column = max([SMALLEST_PANEL, *widths])
    title_height, caption_height = 2 * TITLE_SIZE, CAPTION_SIZE + 10
    size = (
        len(titles) * (column + GAP) + GAP,
        title_height + sum(height + caption_height + GAP for height in heights),
    )
    figure = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(figure)
    for index, title in enumerate(titles):
        _write(draw, GAP + index * (column + GAP), TITLE_SIZE // 3, title, TITLE_SIZE, INK)
    top = title_height
    for line, height in zip(lines, heights, strict=True):
        for index, (panel, caption) in enumerate(line):
            left = GAP + index * (column + GAP)
            if panel is not None:
                figure.paste(panel, (left, top))
            caption = _shortened(draw, caption, column)
            _write(draw, left, top + height + 4, caption, CAPTION_SIZE, FAINT_INK)
        top += height + caption_height + GAP

    def write(file: BinaryIO) -> None:
        figure.save(file, format="png")

    return write_atomically(path, write)


def table(results: Sequence[ImageResult], title: str = "") -> str:
    """A line an image and the averages, aligned, for the terminal."""
    width = max([len("average"), *(len(result.name) for result in results)])
    lines = [title] if title else []
    lines.append(table_header(width))
    lines += [table_line(result, width) for result in results]
    lines.append(average_line(results, width))
    return "\n".join(lines)


def table_header(width: int) -> str:
    """Two lines above `table_line`s whose names are `width` wide."""
    return (
        f"{'':{width}}  {'':>11}  {'PSNR (dB)':>15}  {'SSIM':>17}\n"
        f"{'image':{width}}  {'height×width':>12} {'Aᵀy':>7} {'IDM':>7}   {'Aᵀy':>7} {'IDM':>8}  {'seconds':>8}"
    )


def table_line(result: ImageResult, width: int) -> str:
    """One image of the table."""
    return _line(f"{result.name:{width}}", f"{result.height}×{result.width}", asdict(result))


def average_line(results: Sequence[ImageResult], width: int) -> str:
    """The last line of the table: means over the images."""
    count = f"{len(results)} image{'s' if len(results) != 1 else ''}"
    return _line(f"{'average':{width}}", count, averages(results))


def _line(name: str, size: str, values: dict[str, Any]) -> str:
    return (
        f"{name}  {size:>12} {values['psnr_adjoint']:7.2f} {values['psnr']:7.2f}   "
        f"{values['ssim_adjoint']:7.4f} {values['ssim']:8.4f}  {values['seconds']:8.2f}"
    )


def write_csv(results: Sequence[ImageResult], path: str | Path) -> Path:
    """A line an image and ratio, all digits; columns are the fields of `ImageResult`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ImageResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    return write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_json(results: Sequence[ImageResult], settings: dict[str, Any], path: str | Path, device: str) -> Path:
    """Settings, averages by ratio, every image, and what computed them. An infinite PSNR is written as null."""
    ratios = sorted({result.ratio for result in results})
    document = {
        "settings": settings,
        "environment": environment(device),
        "averages": {f"{ratio:g}": averages([r for r in results if r.ratio == ratio]) for ratio in ratios},
        "images": [asdict(result) for result in results],
    }
    text = json.dumps(_without_infinity(document), indent=2, allow_nan=False)
    return write_atomically(path, lambda file: file.write((text + "\n").encode()))


def environment(device: str) -> dict[str, Any]:
    """Versions, device and threads behind a result."""
    packages = ("diffusers", "numpy", "scikit-image", "Pillow")
    return {
        "idm_fast": idm_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build (+cpu, +cu130), which a package's version lacks
        **{name: importlib.metadata.version(name) for name in packages},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    """The device in words: "cpu (x86_64)" or "cuda:0 (its name)"."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.machine()
    return f"{device} ({name})"


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _panels(row: ComparisonRow, with_original: bool) -> list[tuple[Image.Image | None, str]]:
    """Picture and caption for each column."""
    adjoint, output = _panel(row.adjoint), _panel(row.output)
    if not with_original:
        return [(adjoint, row.name), (output, "")]
    if row.original is None:
        return [(None, row.name), (adjoint, ""), (output, ""), (None, "")]
    captions = [
        f"{psnr(image, row.original):.2f} dB, SSIM {ssim(image, row.original):.4f}"
        for image in (row.adjoint, row.output)
    ]
    error = _panel((row.output.clamp(0, 1) - row.original).abs() * ERROR_GAIN)
    pictures = [_panel(row.original), adjoint, output, error]
    return list(zip(pictures, [row.name, *captions, "black: no error"], strict=True))


def _panel(image: Tensor) -> Image.Image:
    picture = Image.fromarray(to_uint8(image)).convert("RGB")
    picture.thumbnail((LARGEST_PANEL, LARGEST_PANEL), Image.Resampling.LANCZOS)
    return picture


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    font = ImageFont.load_default(CAPTION_SIZE)
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, ink: tuple[int, int, int]) -> None:
    """Text at (x, y); "ᵀ", which Pillow's font lacks, is drawn as a small raised T."""
    for index, part in enumerate(text.split("ᵀ")):
        if index:
            small = ImageFont.load_default(0.65 * size)
            draw.text((x, y), "T", ink, small)
            x += draw.textlength("T", small)
        font = ImageFont.load_default(size)
        draw.text((x, y), part, ink, font)
        x += draw.textlength(part, font)
