"""What does one op call cost on the host? `python -m benchmarks.dispatch`, on any machine; the bound is 15 µs a call.

Dispatch: from the call of the operator to the implementation, here one that returns outputs made before, with PyTorch's
dispatcher, the choice of implementation, the check of the arguments, which native implementations make in C++ and so have less
of, and, with a gradient, the node that is recorded. Preparation: what a Triton implementation does around kernel[grid](…),
which a stub replaces: outputs, launch configuration; Triton's own launch comes on top.
Times are of this thread on the processor, the least of many repetitions, so that other programs count little.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from idm_fast.kernels import couple, geglu, group_norm_silu, launch, layer_norm, project
from idm_fast.ops import registry


def microseconds(call: Callable[[], Any], calls: int = 100, repetitions: int = 300) -> float:
    """Least time of one call."""
    times = []
    for _ in range(repetitions):
        start = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - start) / calls)
    return min(times) * 1e6


def arguments() -> dict[str, tuple]:
    """Small arguments by op: time on the host does not depend on sizes."""
    x, w, v = torch.zeros(1, 4, 2, 2), torch.ones(4), torch.ones(1)
    image, y, matrix, permutation = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 2), torch.eye(4)[:, :2], torch.arange(16)
    of_groups, of_rows = torch.ones(1, 2), torch.ones(1, 4, 2, 1)
    row = torch.ones(2)
    return {
        "couple": (x, x, v),
        "uncouple": (x, x, x, v),
        "geglu": (x,),
        "geglu_backward": (x[..., :1], x),
        "group_norm_silu": (x, w, w, 2, 1e-5, True, None),
        "group_norm_silu_backward": (x, x, w, w, of_groups, of_groups, 2, True),
        "layer_norm": (x, row, row, 1e-5, None),
        "layer_norm_backward": (x, x, row, row, of_rows, of_rows),
        "gram": (image, matrix, permutation),
        "project_step": (image, image, y, matrix, permutation, v, v),
    }


def dispatch(name: str, given: tuple, gradient: bool) -> float:
    """Time of a call of the op without what it computes."""
    op = registry.OPS[name]
    with torch.no_grad():
        outputs = op.overload(*given)
    if gradient:
        given = tuple(a.clone().requires_grad_() if i == 0 and isinstance(a, Tensor) else a for i, a in enumerate(given))

    def implementation(*_: object) -> Tensor | tuple[Tensor, ...]:
        return outputs.detach() if isinstance(outputs, Tensor) else tuple(map(Tensor.detach, outputs))

    # What the implementation itself takes is no part of the dispatch.
    alone = microseconds(implementation)
    stub = mock.patch.dict(op.implementations, {"reference": (implementation, None)})
    with stub, registry.use("reference"), torch.set_grad_enabled(gradient):
        return microseconds(lambda: op.overload(*given)) - alone


class Stub:
    """In the place of a kernel: kernel[grid](…) does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


def preparation(name: str, given: tuple) -> tuple[float, int]:
    """Time that a Triton implementation takes without its launches, and how many these are."""
    module = next(m for m in (couple, geglu, group_norm_silu, layer_norm, project) if hasattr(m, name))
    kernels = {k: Stub() for k, value in vars(module).items() if k.endswith("_kernel")}
    implementation = getattr(module, name)
    with launch.recording() as launches:
        implementation(*given)
    with mock.patch.multiple(module, **kernels):
        return microseconds(lambda: implementation(*given)), len(launches)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.dispatch", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    lines = [
        f"Microseconds on the host for one op call; torch {torch.__version__}, Triton {triton.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}.",
        "",
        "| op | dispatch | dispatch, gradient recorded | preparation of its launches | launches |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, given in arguments().items():
        differentiable = not (name.endswith("backward") or name == "uncouple")
        recorded = f"{dispatch(name, given, True):.1f}" if differentiable else "–"
        prepared, launches = preparation(name, given)
        lines.append(f"| `{name}` | {dispatch(name, given, False):.1f} | {recorded} | {prepared:.1f} | {launches} |")
        print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
