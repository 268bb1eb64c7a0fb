"""Does a training step take the memory that the counter predicts? `python -m benchmarks.memory_against_prediction`.

Predicted under fake tensors; measured in a real step on one device: on a GPU by the allocator (`max_memory_allocated`, above
what parameters and data take), on a CPU, where torch has no such figure, by the same counter. Both with the gradients that
exist at the peak. The error is relative to the activations alone, which are what a schedule is chosen for.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idm_fast import IDM, BlockCompressedSensing
from idm_fast.memory.count import StepCount, count_step, count_training_step, resident_threads
from idm_fast.ops import registry

SCHEDULES: dict[str, dict[str, Any]] = {
    "store": {"schedule": "store"},
    "two_level": {"schedule": "two_level"},
    "two_level, steps inverted": {"schedule": "two_level", "keep": []},
    "flat": {"schedule": "flat"},
    "flat, attention kept": {"schedule": "flat", "keep": ["attention"]},
}


@dataclass(frozen=True)
class Setting:
    """A training step: options of IDM, images a step, their side in pixels, autocast's dtype or None."""

    options: dict[str, Any]
    batch: int
    size: int
    autocast: torch.dtype | None

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"IDM({options}), batch {self.batch}, {self.size}², autocast {self.autocast}"


SETTINGS = {
    "cuda": Setting({"steps": 2}, batch=4, size=128, autocast=torch.bfloat16),
    "cpu": Setting(
        {"steps": 2, "widths": (16, 32), "heads": 2, "norm_groups": 4, "attention": (False, True)}, 2, 32, torch.bfloat16
    ),
}
"""By device type: large enough on a GPU that activations are most of the memory, and a matter of seconds on a CPU."""


@dataclass(frozen=True)
class Comparison:
    """One schedule: the counted step, and measured bytes, comparable to `predicted.peak_with_gradients`."""

    schedule: str
    predicted: StepCount
    measured: int

    @property
    def error(self) -> float:
        """(measured − predicted) / predicted activations."""
        return (self.measured - self.predicted.peak_with_gradients) / self.predicted.peak_bytes


def compare(setting: Setting, device: torch.device, schedules: dict[str, dict[str, Any]] = SCHEDULES) -> Iterator[Comparison]:
    """The schedules on `device`, with the implementations of the ops that are in use there."""
    references = [name for name, op in registry.OPS.items() if op.runs_reference(device.type)]
    for name, schedule in schedules.items():
        options = setting.options | schedule
        shape = setting.batch, setting.size
        predicted = count_training_step(
            lambda options=options: IDM(**options),
            *shape,
            autocast=setting.autocast,
            as_reference=references,
            threads=resident_threads(device),
        )
        yield Comparison(name, predicted, measure(setting, options, device, references))


def measure(setting: Setting, options: dict[str, Any], device: torch.device, references: list[str]) -> int:
    """Peak bytes of a real step, above parameters and data."""
    model = IDM(**options).to(device)
    physics = BlockCompressedSensing((setting.size, setting.size), 0.1).to(device)
    x = torch.rand(setting.batch, 1, setting.size, setting.size, device=device)

    def forward() -> Tensor:
        with nullcontext() if setting.autocast is None else torch.autocast(device.type, setting.autocast):
            return (model(physics.A(x), physics) - x).abs().mean()

    if device.type != "cuda":
        return count_step(forward, model.parameters(), [x, *physics.buffers()], references).peak_with_gradients
    forward().backward()  # the libraries' workspaces are allocated once
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward().backward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory_against_prediction", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    device = torch.device(options.device)
    setting = SETTINGS[device.type]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, measured by the same counter"
    lines = [
        f"{setting}; torch {torch.__version__}, {name}.",
        "",
        "| schedule | activations | with gradients | measured | error |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for row in compare(setting, device):
        sizes = (row.predicted.peak_bytes, row.predicted.peak_with_gradients, row.measured)
        cells = (f"{size / 2**20:,.2f} MiB" for size in sizes)
        lines.append(f"| `{row.schedule}` | {' | '.join(cells)} | {row.error:+.2%} |")
        print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
