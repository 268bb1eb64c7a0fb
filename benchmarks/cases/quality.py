"""Quality: PSNR and SSIM by the published test protocol, in float32 and bfloat16, beside what others published.

Settings are environment variables: IDM_BENCH_WEIGHTS, a folder or a published .pkl (default: the tiny weights of the package);
IDM_BENCH_TEST_DATA, folders of images separated as in PATH (default: photographs of scikit-image that the tiny weights have not
seen); IDM_BENCH_RATIOS, as "0.1,0.3" (default: what the weights were trained for).
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.case import Cell, Context, Plot, Result, Table, case
from benchmarks.contenders import ours_on
from idm_fast import IDM
from idm_fast.demo import write_photographs
from idm_fast.evaluation.protocol import ImageResult, averages, evaluate
from idm_fast.images import list_images
from idm_fast.ops import registry
from idm_fast.pretrained import load_weights

MOST_DIFFERENCE = 0.02
"""dB that bfloat16 may cost, averaged over a set."""
FEW = 3
BLOCK_SIZE = 32
PUBLISHED_SETS = ("Set11", "CBSD68", "Urban100", "DIV2K")
PUBLISHED = [
    ("IDM, T = 3", "32.92/38.85/42.48", "28.69/34.67/39.57", "31.41/36.76/40.33", "31.07/36.98/41.15"),
    ("PRL-PGD+", "31.70/37.89/41.78", "28.50/33.41/37.37", "28.77/34.73/38.57", "30.75/36.64/40.97"),
    ("PCT (learned sampling)", "32.24/38.72/42.71", "29.18/34.86/39.57", "28.50/34.88/39.11", "31.12/37.26/41.76"),
    ("DMP-DUN+, 4 steps (learned sampling)", "33.22/–/42.82", "–", "–", "–"),
    ("DDNM+, 1000 steps (in DMP-DUN's paper)", "25.78/–/29.01", "–", "–", "–"),
]
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


QUESTION = "How good are reconstructions by the published protocol, and what does bfloat16 cost?"


@case(QUESTION, seconds=(90, 1200), quick=("cuda",))
def run(context: Context) -> Result:
    result = context.new_result()
    weights = os.environ.get("IDM_BENCH_WEIGHTS")
    model = load_weights(weights).to(context.device)
    block_size = model.config["block_size"] or BLOCK_SIZE
    asked = os.environ.get("IDM_BENCH_RATIOS")
    ratios = [float(r) for r in asked.split(",")] if asked else model.config["trained_ratios"] or [0.1]
    rows: list[list[Cell]] = []
    bars: dict[str, list[tuple[Cell, float]]] = {}
    moved: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in test_sets(Path(folder)).items():
            for ratio in ratios:
                label = f"{name}, ratio {ratio:g}"
                found = {}
                for dtype in DTYPES:
                    few = paths if dtype == "float32" else paths[: images_in_bfloat16(context)]
                    score = partial(scores, model, few, ratio, block_size, context, dtype)
                    found[dtype] = result.attempt(f"{label}, {dtype}", score)
                for dtype, images in found.items():
                    if images:
                        rows.append(row(result, label, dtype, images))
                if all(found.values()):
                    of_same = found["float32"][: len(found["bfloat16"])]
                    difference = averages(found["bfloat16"])["psnr"] - averages(of_same)["psnr"]
                    result.count(f"{label}: bfloat16 less float32", "dB", difference, "higher", exact=False)
                    moved.append(abs(difference))
                    if not moved[-1] <= MOST_DIFFERENCE:
                        how = f"bfloat16 moves PSNR by {difference:.3f} dB"
                        result.failures.append(f"{label}: {how}, allowed are {MOST_DIFFERENCE}")
                if found["float32"]:
                    mean = averages(found["float32"])
                    bars.setdefault("Aᵀy, the measurements put back", []).append((label, mean["psnr_adjoint"]))
                    bars.setdefault("IDM", []).append((label, mean["psnr"]))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    columns = ["images", "number", "dtype", "PSNR (dB)", "SSIM", "PSNR of Aᵀy (dB)", "s an image", "s an image, first"]
    title = f"Measured: {'tiny weights of the package' if weights is None else Path(weights).name}, {size:.2f} M parameters"
    note = "Seconds: median over the images, and the first, which warms up."
    if context.device == "cuda":
        note += f" Ops: {ours_on(context)}."
    if moved:
        note += f" bfloat16 moves the PSNR of the same images by {max(moved):.3f} dB at most; {MOST_DIFFERENCE} are allowed."
    result.tables.append(Table(title, columns, rows, note))
    result.tables.append(
        Table(
            "Published PSNR (dB) at ratio 0.1/0.3/0.5",
            ["method", *PUBLISHED_SETS],
            [list(line) for line in PUBLISHED],
            "On the published crops of 256² or 480×288 pixels, with networks of their own size: to be held against weights of "
            "the full width on those crops (IDM_BENCH_WEIGHTS, IDM_BENCH_TEST_DATA).",
        )
    )
    if bars:
        adjoint, ours = (points for points in bars.values())
        gain = sum(o[1] - a[1] for o, a in zip(ours, adjoint, strict=True)) / len(ours)
        title = f"IDM gains {gain:.1f} dB over the measurements put back (T = {model.config['steps']}, {size:.2f} M parameters)"
        baseline = next(iter(bars))
        result.plots.append(Plot(title, "test images, measurements a pixel", "PSNR (dB)", bars, baseline=baseline, bars=True))
    return result


def test_sets(folder: Path) -> dict[str, list[Path]]:
    """Images by the name of their set; photographs are written into `folder`."""
    given = os.environ.get("IDM_BENCH_TEST_DATA")
    if given:
        return {Path(part).name: list_images(part) for part in given.split(os.pathsep)}
    return {"3 photographs": write_photographs(folder)[1]}


def scores(
    model: IDM, paths: list[Path], ratio: float, block_size: int, context: Context, dtype: str
) -> list[ImageResult]:
    """The published protocol, under autocast unless in float32."""
    lower = DTYPES[dtype]
    autocast = torch.autocast(context.device, lower or torch.bfloat16, enabled=lower is not None)
    with autocast, registry.use(ours_on(context)):
        return evaluate(model, paths, ratio, block_size, device=context.device)


def images_in_bfloat16(context: Context) -> int | None:
    """How many images of a set are reconstructed so: 40 s each on two cores that have no instructions for it."""
    return FEW if context.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def row(result: Result, label: str, dtype: str, images: list[ImageResult]) -> list[Cell]:
    mean = averages(images)
    result.count(f"{label}, {dtype}: PSNR", "dB", mean["psnr"], "higher", exact=False)
    result.count(f"{label}, {dtype}: SSIM", "1", mean["ssim"], "higher", exact=False)
    seconds = [image.seconds for image in images]
    middle = result.samples(f"{label}, {dtype}: an image", "s", seconds[1:] or seconds).median
    return [label, len(images), dtype, mean["psnr"], mean["ssim"], mean["psnr_adjoint"], middle, seconds[0]]
