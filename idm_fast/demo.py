"""From nothing to reconstructed photographs in minutes, on a CPU: `python -m idm_fast.demo`.

Trains a tiny IDM on photographs that come with scikit-image, saves it, loads it again, and reconstructs photographs
that it never saw from 10, 25 and 50 % of the measurements. It takes the road that a user takes:
`training.trainer.train`, `IDM.from_pretrained`, `evaluation.protocol` and `evaluation.report`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import skimage
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from idm_fast.cli import INPUT_ERROR, INTERRUPTED
from idm_fast.evaluation.protocol import SEED, ImageResult, Reconstruction, reconstructions
from idm_fast.evaluation.report import ComparisonRow, comparison_figure, table, write_csv
from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError, output_folder
from idm_fast.training.config import TrainingConfig
from idm_fast.training.trainer import METRICS, train

TRAINING_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "coins.png", "grass.png", "gravel.png", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = ("camera.png", "chelsea.png", "coffee.png")  # none shows a scene of the training photographs
RATIOS = (0.1, 0.25, 0.5)
SHORT_SIDE = 256  # pixels, of every photograph
SPEED_TRIAL_STEPS = 6


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 after one line on wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m idm_fast.demo", description="Trains a tiny IDM and shows what it does.")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=200, help="length of the training (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        demonstrate(options.output_dir, options.seconds)
    except InputError as error:
        print(f"idm_fast.demo: {error}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print("\nidm_fast.demo: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def demonstrate(folder: Path, seconds: float) -> list[ImageResult]:
    """Trains for `seconds`, reconstructs, prints tables, and writes photographs, weights, CSV and picture to `folder`.

    Returns a result for each held-out photograph and ratio. Raises InputError if the folder cannot be written,
    `seconds` isn't a positive number, or the installed scikit-image lacks a photograph.
    """
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds is {seconds}; expected a positive number, e.g. 200")
    folder = output_folder(folder)
    training, held_out = write_photographs(folder / "photographs")
    print(f"Training a tiny IDM for {seconds:.0f} s on {len(TRAINING_PHOTOGRAPHS)} photographs", flush=True)
    weights = train_for(seconds, training, folder / "weights")
    model = IDM.from_pretrained(weights)
    print(f"Reconstructing {len(held_out)} photographs that it never saw", flush=True)
    found = reconstruct(model, held_out)
    results = [item.result for item in found]
    for ratio in RATIOS:
        print()
        print(table([result for result in results if result.ratio == ratio], f"{ratio:.0%} of the measurements"))
    picture = comparison_figure([_row(item) for item in found], folder / "demo.png")
    values = write_csv(results, folder / "results.csv")
    print(f"\nPicture to look at: {picture}\nResults:            {values}\nWeights:            {weights}")
    print(f"Photographs:        {folder / 'photographs'}")
    command = Path(sys.executable).with_name("idm-fast")
    print(f"\nWith a photograph of your own: {command} reconstruct PHOTO --weights {weights}")
    return results


def write_photographs(folder: Path) -> tuple[Path, list[Path]]:
    """Writes scikit-image's photographs as luma to folder/training, the centres of those held out to folder/held_out.

    All are scaled to a short side of 256 pixels where it is longer. Returns the training folder and the held-out
    files. Raises InputError if one isn't in the installed scikit-image.
    """
    source = Path(skimage.__file__).parent / "data"
    missing = [name for name in (*TRAINING_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS) if not (source / name).is_file()]
    if missing:
        raise InputError(
            f"scikit-image {version('scikit-image')} in {source} comes without {', '.join(missing)}; "
            "pip install scikit-image==0.26.0"
        )
    training, held_out = output_folder(folder / "training"), output_folder(folder / "held_out")
    for name in TRAINING_PHOTOGRAPHS:
        luma = _scaled_luma(source / name)
        luma.save(training / f"{Path(name).stem}.png")
    paths = [held_out / f"{Path(name).stem}.png" for name in HELD_OUT_PHOTOGRAPHS]
    for name, path in zip(HELD_OUT_PHOTOGRAPHS, paths, strict=True):
        ImageOps.fit(_scaled_luma(source / name), (SHORT_SIDE, SHORT_SIDE)).save(path)
    return training, paths


def _scaled_luma(path: Path) -> Image.Image:
    with Image.open(path) as photograph:
        luma = photograph.convert("L")
    scale = min(1, SHORT_SIDE / min(luma.size))
    width, height = (round(scale * side) for side in luma.size)
    return luma.resize((width, height), Image.Resampling.LANCZOS)


def train_for(seconds: float, photographs: Path, folder: Path) -> Path:
    """Trains a tiny IDM for all ratios for about `seconds` and returns the folder of its weights.

    The learning rate falls with the steps, and how many fit into the time depends on the machine: a short trial tells,
    which also decides the number of PyTorch's threads from here on.
    An earlier training run in `folder` is removed; InputError if something else is there.
    """
    if (folder / METRICS).is_file():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else than a training run; choose another --output_dir")
    end = time.monotonic() + seconds
    print("Measuring the speed of this machine ...", flush=True)
    threads, step_seconds = _fastest_threads(photographs, seconds / 20)
    torch.set_num_threads(threads)
    left = max(1.0, end - time.monotonic())
    steps = max(1, round(left / step_seconds))
    print(f"{threads} thread{'s' if threads > 1 else ''}, {step_seconds:.2f} s a step", flush=True)
    return train(_settings(photographs, folder, steps, left))


def _fastest_threads(photographs: Path, seconds: float) -> tuple[int, float]:
    """The number of threads with the shortest training step, and its seconds; `seconds` bounds each number's trial.

    All cores aren't always the fastest: where another program keeps one busy, threads wait for each other at every
    operation, and a step can take fifty times as long as with a single thread.
    """
    most = torch.get_num_threads()
    found = {}
    for threads in sorted({most, *(2**k for k in range(most.bit_length()))}):
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as trial, contextlib.redirect_stdout(io.StringIO()):
            train(_settings(photographs, Path(trial), SPEED_TRIAL_STEPS, seconds))
            lines = map(json.loads, Path(trial, METRICS).read_text().splitlines())
            found[threads] = min(line["seconds"] for line in lines if "loss" in line)
    torch.set_num_threads(most)
    fastest = min(found, key=lambda threads: found[threads])
    return fastest, found[fastest]


def _settings(photographs: Path, folder: Path, steps: int, seconds: float) -> TrainingConfig:
    """A recipe for a few hundred steps; the published one, which is the default, is for 50,000."""
    return TrainingConfig(
        train_data_dir=photographs,
        output_dir=folder,
        model="tiny",
        cs_ratio=RATIOS,
        resolution=64,
        train_batch_size=4,
        max_train_steps=steps,
        max_train_seconds=seconds,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=steps // 20,
        adam_beta2=0.99,
        max_grad_norm=0.3,
        schedule="store",  # of memory there is enough, and storing is the fastest
        seed=SEED,
    )


def reconstruct(model: IDM, paths: Iterable[Path]) -> list[Reconstruction]:
    """The published protocol at every ratio, with a progress bar; by photograph, then ratio."""
    paths = list(paths)
    found: list[Reconstruction] = []
    with tqdm(total=len(paths) * len(RATIOS), desc="reconstructing", unit="photograph") as bar:
        for ratio in RATIOS:
            for item in reconstructions(model, paths, ratio, seed=SEED):
                found.append(item)
                bar.update()
    return sorted(found, key=lambda item: (item.result.name, item.result.ratio))


def _row(item: Reconstruction) -> ComparisonRow:
    name = f"{Path(item.result.name).stem}, {item.result.ratio:.0%}"
    return ComparisonRow(name, item.adjoint, item.output, item.original)


if __name__ == "__main__":
    sys.exit(main())
