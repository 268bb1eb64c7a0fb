"""`idm-fast evaluate`: the published protocol on a folder, for one or several ratios."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from idm_fast.commands.network import open_network, sensing_defaults
from idm_fast.evaluation.protocol import ImageResult, Reconstruction, padded_sizes, reconstructions
from idm_fast.evaluation.report import (
    ComparisonRow,
    average_line,
    comparison_figure,
    table_header,
    table_line,
    write_csv,
    write_json,
)
from idm_fast.images import list_images, write_image
from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError, output_folder
from idm_fast.pretrained import require_trained_for


def run(arguments: argparse.Namespace) -> None:
    """Checks everything, then evaluates ratio by ratio; the result files are brought up to date after each."""
    paths = list_images(arguments.data_dir)
    model, device = open_network(arguments)
    block_size, seed = sensing_defaults(arguments, model)
    ratios = _ratios(arguments, model)
    for ratio in ratios:
        require_trained_for(model, ratio, block_size, arguments.any_ratio)
    padded_sizes(paths, block_size)
    if arguments.save_images:
        _check_names(paths)
    folder = output_folder(arguments.output_dir)

    settings = {
        "data_dir": str(arguments.data_dir),
        "weights": str(arguments.weights or "of the package"),
        "steps": model.config["steps"],
        "block_size": block_size,
        "seed": seed,
        "implementation": arguments.impl,
    }
    width = max(len("average"), *(len(path.name) for path in paths))
    results: list[ImageResult] = []
    with tqdm(total=len(paths) * len(ratios), desc="evaluate", unit="image", disable=None, leave=False) as progress:
        for ratio in ratios:
            tqdm.write(f"ratio {ratio:g}\n{table_header(width)}")
            of_ratio: list[ImageResult] = []
            for item in reconstructions(model, paths, ratio, block_size, seed, device):
                of_ratio.append(item.result)
                tqdm.write(table_line(item.result, width))
                if arguments.save_images:
                    _save_images(item, output_folder(folder / f"ratio_{ratio:g}"))
                progress.update()
            tqdm.write(average_line(of_ratio, width) + "\n")
            results += of_ratio
            write_csv(results, folder / "results.csv")
            write_json(results, settings, folder / "results.json", str(device))
    print(f"written to {folder}: results.csv, results.json" + (", ratio_*/" if arguments.save_images else ""))


def _ratios(arguments: argparse.Namespace, model: IDM) -> list[float]:
    ratios = arguments.cs_ratio or model.config["trained_ratios"]
    if not ratios:
        raise InputError("these weights do not say which ratio they were trained for; pass --cs_ratio")
    return list(dict.fromkeys(ratios))


def _check_names(paths: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem.lower(), path)
        if other is not path:
            raise InputError(f"{other} and {path} would write their pictures under one name; rename one")


def _save_images(item: Reconstruction, folder: Path) -> None:
    stem = Path(item.result.name).stem
    write_image(folder / f"{stem}_idm.png", item.output)
    row = ComparisonRow(item.result.name, item.adjoint, item.output, item.original)
    comparison_figure([row], folder / f"{stem}_comparison.png")
