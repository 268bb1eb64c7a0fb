"""What serves each op on this machine, and why: the rows of `idm-fast doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from idm_fast.ops.registry import MEASURED_SLOWER, OPS, ORDER, current_choice, load


@dataclass(frozen=True)
class ReportRow:
    """One line of `idm-fast doctor`: which implementation of an op serves a device type, and why."""

    op: str
    device: str
    implementation: str
    reason: str
    available: tuple[str, ...]


def report(device_types: tuple[str, ...] | None = None) -> Iterator[ReportRow]:
    """Rows for `idm-fast doctor`, for the device types of this machine."""
    if device_types is None:
        device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for name in device_types:
        load(name)
    load("triton")
    choice = current_choice()
    for op in OPS.values():
        for device in device_types:
            available = tuple(name for name in ORDER if name in op.implementations and op.serves(name, device))
            try:
                implementation = op.choose(device)
            except RuntimeError as error:
                yield ReportRow(op.name, device, "none", str(error), available)
                continue
            automatic = [name for name in available if op.automatic(name, device)]
            if op.named_in(choice) is not None:
                reason = f"chosen explicitly ({choice})"
            elif len(available) == 1:
                reason = "the only one here"
            elif len(automatic) == 1:
                slower = [name for name in available if (name, op.name) in MEASURED_SLOWER]
                reason = f"{slower[0]} measured slower" if slower else "the only one that is taken unasked"
            else:
                reason = f"first available of {', '.join(ORDER)}"
            yield ReportRow(op.name, device, implementation, reason, available)
