"""When do reversible layers pay? Memory against depth, and the time that it costs: `python examples/when_it_pays.py --out DIR`.

Each stack of residual blocks is trained plainly, with torch.utils.checkpoint around every block, and through
`make_reversible`. Peak activations are counted under fake tensors, exactly and on any machine; times are measured here.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from comparison import MIB, count, now, prepare, pyplot
from reversible_resnet import PreActivationBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from idm_fast import make_reversible


class DenseBlock(nn.Module):
    """x → x + tanh(linear(x)): a body that stores little more than its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Checkpointed(nn.Sequential):
    """Every block behind torch.utils.checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def transformer_layer(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, width // 16, 4 * width, dropout=0.0, batch_first=True, norm_first=True)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense, small (width 16)": (lambda: DenseBlock(16), (64, 16)),
    "dense, large (width 1024)": (lambda: DenseBlock(1024), (128, 1024)),
    "convolution, small (8 channels, 8²)": (lambda: PreActivationBlock(8), (4, 8, 8, 8)),
    "convolution, large (64 channels, 32²)": (lambda: PreActivationBlock(64), (4, 64, 32, 32)),
    "transformer, small (width 32, 16 tokens)": (lambda: transformer_layer(32), (4, 16, 32)),
    "transformer, large (width 256, 64 tokens)": (lambda: transformer_layer(256), (4, 64, 256)),
}
"""Name → a block and the shape of its input."""

WAYS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "plain": lambda blocks: nn.Sequential(*blocks),
    "checkpointed": lambda blocks: Checkpointed(*blocks),
    "reversible": lambda blocks: make_reversible(nn.Sequential(*blocks), blocks=type(blocks[0])),
}


def stack(name: str, way: str, depth: int) -> nn.Module:
    block, _ = BLOCKS[name]
    return WAYS[way]([block() for _ in range(depth)])


@functools.cache
def peak(name: str, way: str, depth: int) -> int:
    """Bytes of activations. A reversible run takes two blocks or more; a single one is plain."""
    return count(lambda: stack(name, "plain" if depth == 1 else way, depth), BLOCKS[name][1]).peak_bytes


def break_even(name: str, other: str, deepest: int = 16) -> int | None:
    """The smallest depth from which on a reversible stack takes less than the other, if that is at most `deepest`."""
    wins = [peak(name, "reversible", depth) < peak(name, other, depth) for depth in range(1, deepest + 1)]
    depth = deepest + 1 - next((k for k, win in enumerate(reversed(wins)) if not win), deepest)
    return depth if depth <= deepest else None


def milliseconds(name: str, depth: int, repeats: int) -> dict[str, float]:
    """Median training step of each way, in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {way: stack(name, way, depth).to(device) for way in WAYS}
    x = torch.randn(*BLOCKS[name][1], device=device)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, model in models.items():
            start = now(device)
            model(x).square().mean().backward()
            if repeat:  # the first is to warm up
                seconds[way].append(now(device) - start)
    return {way: 1e3 * statistics.median(times) for way, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for memory.csv, memory.png and time.csv (default: write nothing)")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="numbers of blocks")
    parser.add_argument("--timed_depth", type=int, default=8, help="blocks of the timed stacks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two depths, one repeat and no break-even, to see that it runs")
    options = parser.parse_args()
    if options.out is not None:
        prepare(options.out)
    if options.quick:
        options.depths, options.timed_depth, options.repeats = [2, 4], 2, 1
    memory = {(name, way): [peak(name, way, depth) / MIB for depth in options.depths] for name in BLOCKS for way in WAYS}
    time = {name: milliseconds(name, options.timed_depth, options.repeats) for name in BLOCKS}

    print("Peak activations in MiB\n\n| block | training | " + " | ".join(map(str, options.depths)) + " blocks |")
    print("|---|---|" + "---|" * len(options.depths))
    for (name, way), peaks in memory.items():
        print(f"| {name} | {way} | " + " | ".join(f"{mib:.3g}" for mib in peaks) + " |")
    print(f"\nTime of a step of {options.timed_depth} blocks, and the depth from which on reversible takes less memory\n")
    print("| block | plain, ms | checkpointed | reversible | less than plain from | less than checkpointed from |")
    print("|---|---|---|---|---|---|")
    for name, ms in time.items():
        depths = ["not looked for" if options.quick else break_even(name, other) for other in ("plain", "checkpointed")]
        shown = " | ".join("–" if depth is None else f"{depth}" for depth in depths)
        factors = " | ".join(f"× {ms[way] / ms['plain']:.2f}" for way in ("checkpointed", "reversible"))
        print(f"| {name} | {ms['plain']:.3g} | {factors} | {shown} |")
    if options.out is not None:
        write(options.out / "memory.csv", ["block", "training", *options.depths], [[*key, *v] for key, v in memory.items()])
        write(options.out / "time.csv", ["block", *WAYS], [[name, *ms.values()] for name, ms in time.items()])
        curves(memory, options.depths, options.out / "memory.png")


def write(path: Path, head: list, rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def curves(memory: dict[tuple[str, str], list[float]], depths: list[int], path: Path) -> None:
    """Peak activations against depth, a panel for each block."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, name in zip(axes.T.flat, BLOCKS, strict=True):
        for way in WAYS:
            axis.plot(depths, memory[name, way], marker="o", label=way)
        axis.set(title=name.replace(" (", "\n("), xlabel="blocks", ylabel="peak activations, MiB", ylim=(0, None))
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
