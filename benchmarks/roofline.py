"""What should a training step take on a GPU, before it is measured there? `python -m benchmarks.roofline`, on any machine.

Every launch of a step takes the longer of two times: for the bytes that it reads and writes at the GPU's bandwidth, and for its
FLOP at the rate of its matrix units. Bytes and FLOP are counted under fake tensors. The sum leaves out gaps between launches,
copies that libraries make for themselves, and whatever a kernel falls short of the two rates, so that a step takes longer;
what it is good for is the order of the schedules, and where their time goes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import CONTENDERS, PLAIN, Setting, count, counters
from idm_fast.memory.count import AllocationCounter

BANDWIDTH, RATE = 4.1, 450.0
"""TB/s and bfloat16 TFLOP/s that an H200 may be expected to reach: 85 % of 4.8 and 45 % of 989, the makers' figures."""


class Roofline(AllocationCounter):
    """Counts bytes as well, and the least time that a GPU needs.

    Args:
        bandwidth: bytes a second, reads and writes together. rate: FLOP a second.
    """

    def __init__(self, bandwidth: float, rate: float) -> None:
        super().__init__()
        self._bandwidth, self._rate = bandwidth, rate
        self.bytes = 0
        self.seconds = self.matrix_seconds = 0.0
        """`matrix_seconds`: of it, launches that multiply matrices, attention and convolutions included."""

    def launched(self, inputs: Any, outputs: Any, flop: int) -> None:
        moved = sum(addressed(leaf) for leaf in tree_leaves((inputs, outputs)) if isinstance(leaf, Tensor))
        seconds = max(moved / self._bandwidth, flop / self._rate)
        self.bytes += moved
        self.seconds += seconds
        self.matrix_seconds += seconds if flop else 0.0


def addressed(t: Tensor) -> int:
    """Bytes of the elements of `t`, each counted once where a dimension is expanded. A tensor changed in place comes twice."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.element_size()


def expected(name: str, setting: Setting, bandwidth: float, rate: float) -> tuple[float, float, float, float]:
    """TFLOP, TB, seconds, and seconds of matrix products, of a step trained the way called `name`."""
    counter = Roofline(bandwidth, rate)
    found = count(name, setting, as_on_cuda=True, counter=counter)
    return found.flop / 1e12, counter.bytes / 1e12, counter.seconds, counter.matrix_seconds


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="TB/s (default: %(default)s, an H200)")
    parser.add_argument("--rate", type=float, default=RATE, help="TFLOP/s of matrix products (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="their side in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="T (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    setting = Setting(options.steps, options.batch, options.size)
    lines = [
        f"{setting}, SD 1.5 widths, bfloat16 autocast; {options.bandwidth:g} TB/s, {options.rate:g} TFLOP/s.",
        "",
        "| | TFLOP | TB read and written | s a step at least | of it matrix products | × plain autograd |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    with counters() as submit:
        rates = 1e12 * options.bandwidth, 1e12 * options.rate
        pending = {name: submit(expected, name, setting, *rates) for name in CONTENDERS}
        plain = pending[PLAIN].result()[2]
        for name, future in pending.items():
            flop, moved, seconds, matrix = future.result()
            lines.append(f"| {name} | {flop:.0f} | {moved:.2f} | {seconds:.3f} | {matrix:.3f} | {seconds / plain:.2f} |")
            print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
