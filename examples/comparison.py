"""What the examples share: patches of photographs, and plain and reversible networks trained on them side by side.

The photographs come with scikit-image; nothing is downloaded. A network is told a 32² luma patch and names the photograph
that it was cut from. Every photograph is cut into upright bands of 56 pixels with 8 pixels between them; every fourth band is
for testing, so that no pixel is both trained and tested on.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from idm_fast.memory.count import StepCount, count_step

# Without motorcycle_right.png, which shows what motorcycle_left.png shows.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png", "ihc.png",
    "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
SHORT_SIDE, PATCH, BAND, GAP, TEST_EVERY = 256, 32, 56, 8, 4  # pixels; every fourth band
MIB = 2**20


@dataclass(frozen=True)
class Patches:
    """Bands of all photographs, each (height, BAND) in about [-2, 2], with the number of its photograph."""

    train: list[tuple[Tensor, int]]
    test: list[tuple[Tensor, int]]

    @classmethod
    def load(cls) -> Patches:
        train: list[tuple[Tensor, int]] = []
        test: list[tuple[Tensor, int]] = []
        for label, name in enumerate(PHOTOGRAPHS):
            with Image.open(Path(skimage.__file__).parent / "data" / name) as photograph:
                luma = photograph.convert("L")
            scale = SHORT_SIDE / min(luma.size)
            luma = luma.resize((round(scale * luma.width), round(scale * luma.height)), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(luma, dtype=np.float32)) / 64 - 2
            for k, left in enumerate(range(0, luma.width - BAND + 1, BAND + GAP)):
                bands = test if k % TEST_EVERY == TEST_EVERY - 1 else train
                bands.append((pixels[:, left : left + BAND], label))
        return cls(train, test)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training patches (size, 1, PATCH, PATCH) from random places, half of them mirrored, and their labels (size,)."""
        patches, labels = [], []
        for _ in range(size):
            band, label = self.train[_below(len(self.train), generator)]
            top, left = (_below(side - PATCH + 1, generator) for side in band.shape)
            patch = band[top : top + PATCH, left : left + PATCH]
            patches.append(patch.flip(1) if _below(2, generator) else patch)
            labels.append(label)
        return torch.stack(patches)[:, None], torch.tensor(labels)

    def held_out(self, stride: int) -> tuple[Tensor, Tensor]:
        """Test patches (n, 1, PATCH, PATCH) every `stride` pixels down and across, and their labels."""
        cut = [(band.unfold(0, PATCH, stride).unfold(1, PATCH, stride).reshape(-1, PATCH, PATCH), y) for band, y in self.test]
        return torch.cat([p for p, _ in cut])[:, None], torch.cat([torch.full((len(p),), y) for p, y in cut])


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


@dataclass(frozen=True)
class Row:
    """One network: what the table and the CSV show. `ms_per_step` is None for one that was not trained, but converted."""

    network: str
    seed: int
    parameters: int
    peak_mib: float
    gflop: float
    ms_per_step: float | None
    test_accuracy: float


def count(build: Callable[[], nn.Module], shape: Sequence[int]) -> StepCount:
    """Activation bytes and FLOP of a training step on a batch of `shape`, counted under fake tensors."""
    with FakeTensorMode():
        model, x = build(), torch.randn(*shape)
        return count_step(lambda: model(x).square().mean(), model.parameters(), [x, *model.buffers()])


def train_side_by_side(
    plain: Callable[[], nn.Module],
    reversible: Callable[[float], nn.Module],
    patches: Patches,
    held_out: tuple[Tensor, Tensor],
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> list[Row]:
    """Trains both from the same weights on the same batches, a step of each in turn so that a busy machine slows both alike.

    Args:
        reversible: scale of the branches → the reversible network. It is trained with scale 1; with scales 1 and 2 it also
            gets the trained weights of the plain one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = {"plain": plain, "reversible": lambda: reversible(1)}
    models, optimizers, schedulers = {}, {}, {}
    for name, build in networks.items():
        torch.manual_seed(seed)
        models[name] = build().to(device)
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), learning_rate, weight_decay=0.05)
        schedulers[name] = torch.optim.lr_scheduler.OneCycleLR(optimizers[name], learning_rate, steps)
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for step in range(steps):
        x, y = (t.to(device) for t in patches.batch(batch, generator))
        for name in list(networks)[:: 1 if step % 2 else -1]:
            start = now(device)
            F.cross_entropy(models[name](x), y).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(now(device) - start)
            schedulers[name].step()
    rows = []
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        counted = count(networks[name], (batch, 1, PATCH, PATCH))
        milliseconds = 1e3 * statistics.median(seconds[name])
        cost = (parameters, counted.peak_bytes / MIB, counted.flop / 1e9, milliseconds)
        rows.append(Row(name, seed, *cost, accuracy(model, *held_out)))
    for scale in (1, 2):
        converted = reversible(scale).to(device)
        converted.load_state_dict(models["plain"].state_dict())
        name, correct = f"plain's weights made reversible, scale {scale}", accuracy(converted, *held_out)
        rows.append(replace(rows[1], network=name, ms_per_step=None, test_accuracy=correct))
    return rows


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of patches whose photograph the model names."""
    model.eval()
    device = next(model.parameters()).device
    named = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(128)])
    return float((named == y).float().mean())


def run_example(
    title: str,
    plain: Callable[[], nn.Module],
    reversible: Callable[[float], nn.Module],
    steps: int,
    batch: int,
    learning_rate: float,
) -> None:
    """The command line of an example: trains, prints the table, writes results.csv and comparison.png."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--out", type=Path, help="folder for results.csv and comparison.png (default: write nothing)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training run each (default: 0)")
    parser.add_argument("--steps", type=int, default=steps, help="updates of each network (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="patches an update (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two updates of two patches, to see that it runs")
    options = parser.parse_args()
    if options.out is not None:
        prepare(options.out)
    if options.quick:
        options.steps, options.batch = 2, 2
    patches = Patches.load()
    held_out = patches.held_out(stride=8 * PATCH if options.quick else PATCH // 2)
    rows: list[Row] = []
    for seed in options.seeds:
        rows += train_side_by_side(plain, reversible, patches, held_out, options.steps, options.batch, learning_rate, seed)
    print(f"{title}: {options.steps} updates of {options.batch} patches of {PATCH}², seeds {options.seeds}\n\n{table(rows)}")
    if options.out is not None:
        write_csv(rows, options.out / "results.csv")
        bars(rows, title, options.out / "comparison.png")


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a network: median time and mean accuracy over the seeds."""
    lines = [
        "| network | parameters | peak activations | GFLOP a step | ms a step | test accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in _by_network(rows).items():
        accuracies = [run.test_accuracy for run in runs]
        spread = f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(runs) > 1 else ""
        times = [run.ms_per_step for run in runs if run.ms_per_step is not None]
        milliseconds = f"{statistics.median(times):.0f}" if times else "–"
        lines.append(
            f"| {name} | {runs[0].parameters:,} | {runs[0].peak_mib:.1f} MiB | {runs[0].gflop:.1f} | {milliseconds} "
            f"| {statistics.mean(accuracies):.1%}{spread} |"
        )
    return "\n".join(lines)


def _by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row.network == name] for name in dict.fromkeys(row.network for row in rows)}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def bars(rows: Sequence[Row], title: str, path: Path) -> None:
    """Peak activations, time a step and test accuracy as bars."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    networks = _by_network([row for row in rows if row.ms_per_step is not None])
    panels = {"peak activations, MiB": "peak_mib", "ms a step": "ms_per_step", "test accuracy": "test_accuracy"}
    for axis, (label, field) in zip(axes, panels.items(), strict=True):
        axis.bar(list(networks), [statistics.mean(getattr(run, field) for run in runs) for runs in networks.values()])
        axis.set_title(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def prepare(folder: Path) -> None:
    """Finds out before any work whether results can be written to `folder`."""
    pyplot()
    folder.mkdir(parents=True, exist_ok=True)


def pyplot():
    """matplotlib.pyplot without a display; exits with the remedy where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit('--out draws a picture, which needs matplotlib: pip install "idm-fast[bench]"')
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
