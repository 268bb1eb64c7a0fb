"""Kernels: every op, every implementation of it that this machine has, at the shapes of IDM's U-Net.

An implementation is timed when it agrees with the reference in float64, with an error of at most twice that of the reference
in the same dtypes. Its time stands against what the machine can do: the bandwidth of copying, the rate of a matrix product.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Cell, Context, Plot, Result, Table, case
from benchmarks.contenders import missing_kernels
from benchmarks.fastest import FILE, fastest, speedups
from benchmarks.timing import copy_bandwidth, matrix_rate, take_turns
from idm_fast import BlockCompressedSensing, kernels, ops
from idm_fast.kernels.cost import Cost, size
from idm_fast.ops.registry import OPS

COMPILED_QUICKLY = ("couple", "uncouple", "geglu")
"""What torch.compile is held against in a quick run: it compiles for seconds to a minute an op. A full run compiles all ops,
for the first level."""
COST_OF = {"decouple": "couple", "uncouple_": "uncouple", "inject_uncouple_": "inject_uncouple"}
SHOWN = {"reference": "eager PyTorch"}
V = 0.5
FRACTION_BITS, KEPT_BITS = 20, 1
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""For glibc: memory that was freed is used again, as PyTorch does on a GPU. Or else some calls write their outputs to new
pages, which take the system longer than an op takes."""


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net: features (B, C, side, side) of images r times as large."""

    batch: int
    channels: int
    side: int
    r: int

    def __str__(self) -> str:
        return f"{self.batch}×{self.channels}×{self.side}²"


def levels(context: Context) -> list[Level]:
    """Batch 8 of 256² on a GPU; a CPU gets batch 1, and quickly 128²."""
    batch = 8 if context.device == "cuda" else 1
    side = 64 if context.device == "cpu" and context.quick else 128
    both = [Level(batch, 320, side, 2), Level(batch, 640, side // 2, 4)]
    return both[:1] if context.quick else both


def arguments(level: Level, device: str) -> dict[str, tuple[Any, ...]]:
    """What each op is called with at this level: bfloat16 bodies on float32 streams on a GPU, float32 alone on a CPU."""
    generator = torch.Generator().manual_seed(0)
    body = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    B, C, s, r = level.batch, level.channels, level.side, level.r
    features = (B, C, s, s)
    image_size = (r * s, r * s)
    physics = BlockCompressedSensing(image_size, 0.1).to(device)
    operator = (physics.matrix, physics.permutation)
    images = x, e, g = tuple(draw(B, 1, *image_size) for _ in range(3))
    y, v = physics.A(x), torch.full((1,), V, device=device)
    abar = (torch.tensor([0.25], device=device), torch.tensor([0.5], device=device))
    planes = C // r**2
    read, write = draw(1, planes, 1, 1), draw(planes, 3, 1, 1)
    weight, bias = draw(C), draw(C)
    stream, F, d1 = draw(*features), draw(*features, dtype=body), draw(*features)
    h = draw(*features)  # an injector reads a stream as it is
    tokens, hidden = draw(B, s * s, C), draw(B, s * s, 8 * C, dtype=body)
    statistics = OPS["group_norm_silu"].overload(stream, weight, bias, 32, 1e-5, True, body)[1:]
    layer = OPS["layer_norm"].overload(tokens, weight, bias, 1e-5, body)[1:]
    grid = (FRACTION_BITS, KEPT_BITS)
    fixed = ops.to_fixed(stream, FRACTION_BITS)
    wired, packed = OPS["fixed_couple"].overload(F, fixed, v, *grid)
    codes = torch.randint(0, 2, (stream.numel(),), generator=generator, dtype=torch.uint8).to(device)
    return {
        "couple": (F, stream, v),
        "decouple": (stream, F, v),
        "couple_backward": (d1, F, stream, v),
        "uncouple": (stream, F, d1, v),
        "uncouple_": (stream.clone(), F, d1, v.clone()),
        "group_norm_silu": (stream, weight, bias, 32, 1e-5, True, body),
        "group_norm_silu_backward": (F, stream, weight, bias, *statistics, 32, True),
        "layer_norm": (tokens, weight, bias, 1e-5, body),
        "layer_norm_backward": (draw(B, s * s, C, dtype=body), tokens, weight, bias, *layer),
        "geglu": (hidden,),
        "geglu_backward": (draw(B, s * s, 4 * C, dtype=body), hidden),
        "inject_read": (h, read, draw(1), r),
        "inject_read_backward": (x, h, read, r, draw(*features)),
        "inject_write": (h, *images, write, draw(planes), r),
        "inject_write_backward": (d1, *images, write, r),
        "inject_couple": (h, *images, write, draw(planes), stream, v, r),
        "inject_couple_backward": (d1, h, *images, write, draw(planes), stream, v, r),
        "inject_uncouple": (stream, d1, h, *images, write, draw(planes), v, r),
        "inject_uncouple_": (stream.clone(), d1, h, *images, write, draw(planes), v.clone(), r),
        "measure": (x, *operator),
        "adjoint": (y, *operator, *image_size),
        "gram": (x, *operator),
        "project_step": (x, e, y, *operator, *abar),
        "project_step_backward": (g, x, e, y, *operator, *abar),
        "to_fixed": (stream, FRACTION_BITS),
        "from_fixed": (fixed, FRACTION_BITS, torch.float32),
        "fixed_add": (F, fixed, FRACTION_BITS, 1),
        "fixed_couple": (F, fixed, v, *grid),
        "fixed_decouple": (wired, F, packed, v, *grid),
        "fixed_uncouple": (wired, F, d1, packed, v, *grid),
        "pack_bits": (codes, KEPT_BITS),
        "unpack_bits": (packed, KEPT_BITS, stream.numel()),
    }


def outputs(name: str, found: Any, given: tuple[Any, ...]) -> list[Tensor]:
    """What an op computes: its outputs, and its first argument when it works in place."""
    found = [found] if isinstance(found, Tensor) else list(found)
    return [given[0], *found] if OPS[name].overload._schema.is_mutable else found


def weight_of(name: str, given: tuple[Any, ...]) -> Tensor:
    """The argument v of a coupling."""
    return given[[argument.name for argument in OPS[name].overload._schema.arguments].index("v")]


def run_once(name: str, function: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
    """`outputs` on a copy of what would be written."""
    copy = (given[0].clone(), *given[1:])
    return outputs(name, function(*copy), copy)


def in_float64(argument: Any) -> Any:
    """Floating tensors and dtypes as float64, all else as it is."""
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    return torch.float64 if argument in (torch.float32, torch.bfloat16) else argument


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Largest error of each output over its largest true value; of integers, how many differ."""
    result = []
    for ours, true in zip(found, exact, strict=True):
        if ours.is_floating_point():
            scale = true.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            result.append(float((ours.double() - true.double()).abs().max() / scale))
        else:
            result.append(float((ours != true).sum()))
    return result


SUMS = 4096
"""Outputs of fewer elements are sums over the others' elements (of v, weights, statistics)."""


def allowed(found: list[Tensor], of_reference: list[float] | None) -> list[float]:
    """Errors let through: twice the reference's, and its own no more than rounding; sums in float32 take any order.

    Integers are exact.
    """
    bounds = []
    for k, output in enumerate(found):
        if not output.is_floating_point():
            bounds.append(0.0)
            continue
        eps = torch.finfo(output.dtype).eps
        rounding = 2 * eps + 2e-5 if of_reference is None or output.numel() < SUMS else eps
        bounds.append(rounding if of_reference is None else max(2 * of_reference[k], rounding))
    return bounds


def cost_of(name: str, given: tuple[Any, ...], found: list[Tensor]) -> Cost:
    """Least traffic and FLOP: as the kernels' files state it, else each tensor in and out once and no FLOP."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name in ("__init__", "resources", "cost"):
            continue
        try:
            found_there = vars(importlib.import_module(f"idm_fast.kernels.{module.name}"))
        except ImportError:
            continue
        if (function := found_there.get(f"{COST_OF.get(name, name)}_cost")) is not None:
            return function(*given)
    return Cost(size(a for a in given if isinstance(a, Tensor)), size(found), 0)


def by_implementation(implementation: str, name: str) -> Callable[..., Any]:
    """The op, run by one implementation."""

    def call(*given: Any) -> Any:
        with ops.use(implementation):
            return OPS[name].overload(*given)

    return call


def contenders(name: str, context: Context, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Implementations of the op on this device, the reference first, then, if `compiled`, torch.compile of the reference."""
    op = OPS[name]
    here = [i for i in op.implementations if op.serves(i, context.device) and (i, context.device) != ("triton", "cpu")]
    found = {i: by_implementation(i, name) for i in sorted(here, key=lambda i: i != "reference")}
    if compiled and not op.overload._schema.is_mutable and (not context.quick or name in COMPILED_QUICKLY):
        found["torch.compile"] = torch.compile(op.implementations["reference"][0], dynamic=False)
    return found


def checked(
    result: Result, context: Context, label: str, name: str, given: tuple[Any, ...], compiled: bool = True
) -> dict[str, Callable[[], Any]]:
    """The contenders that compute what the float64 reference computes, ready to be called; the others are said to be wrong."""
    reference = OPS[name].implementations["reference"][0]
    plain = run_once(name, reference, given)
    exact = run_once(name, reference, tuple(map(in_float64, given))) if all(t.is_floating_point() for t in plain) else plain
    of_reference = errors(plain, exact)
    ready: dict[str, Callable[[], Any]] = {}
    for who, function in contenders(name, context, compiled).items():

        def check(who: str = who, function: Callable[..., Any] = function) -> None:
            found = run_once(name, function, given)
            bounds = allowed(found, None if who == "reference" else of_reference)
            for k, (error, bound) in enumerate(zip(errors(found, exact), bounds, strict=True)):
                context.check(f"output {k}", error, bound)
            ready[who] = lambda: function(*given)

        result.attempt(f"{label} by {who}", check)
    return ready


@case(
    "How close to the machine's limits do our kernels run, and how much faster than eager PyTorch?",
    seconds=(100, 1500),
    environment=KEEP_MEMORY,
)
def run(context: Context) -> Result:
    result = context.new_result(failures=missing_kernels(context.device))
    body = torch.bfloat16 if context.device == "cuda" else torch.float32
    bandwidth = result.samples("copy bandwidth", "B/s", copy_bandwidth(context.device), "higher").median
    rate = result.samples("matrix rate", "FLOP/s", matrix_rate(context.device, body), "higher").median
    rows: list[list[Cell]] = []
    roofs: dict[str, list[tuple[Cell, float]]] = {}
    gains: dict[str, list[tuple[Cell, float]]] = {}
    by_op: dict[tuple[str, str], dict[str, float]] = {}
    chosen = levels(context)
    for level in chosen:
        given_to = result.attempt(f"arguments at {level}", lambda level=level: arguments(level, context.device)) or {}
        for name, given in given_to.items():
            label = f"{name} {level}"
            first = level == chosen[0]
            check = partial(checked, result, context, label, name, given, compiled=first)
            ready = result.attempt(label, check)
            if not ready:
                continue
            cost = cost_of(name, given, run_once(name, OPS[name].implementations["reference"][0], given))
            if OPS[name].overload._schema.is_mutable:
                weight_of(name, given).fill_(1)  # then inverting again and again gives the same numbers
            samples = take_turns(
                ready, context.device, 0.1 if context.quick else 0.5, flush=True, failed=result.failed_at(label)
            )
            times = {who: result.samples(f"{label} {who}", "s", samples[who]).median for who in samples}
            by_op[name, str(level)] = {who: t for who, t in times.items() if who in OPS[name].implementations}
            result.fastest = fastest(by_op)
            for who, t in times.items():
                of_copy, of_matrix = cost.bytes / t / bandwidth, cost.flop / t / rate
                gain = times["reference"] / t if "reference" in times else float("nan")
                rows.append([name, str(level), who, 1e6 * t, cost.bytes / 1e6, 100 * of_copy, 100 * of_matrix, gain])
                if first:
                    shown = SHOWN.get(who, who)
                    roofs.setdefault(shown, []).append((name, 100 * max(of_copy, of_matrix)))
                    if who != "reference":
                        gains.setdefault(shown, []).append((name, gain))
        del given_to
    result.tables.append(
        Table(
            "Every op and implementation",
            ["op", "shape", "implementation", "µs", "MB moved at least", "% of copy bandwidth", "% of matrix rate", "× eager"],
            rows,
            f"Copying moves {bandwidth / 1e9:.1f} GB/s here, a {str(body).removeprefix('torch.')} product reaches "
            f"{rate / 1e12:.2f} TFLOP/s. Bytes: each tensor that must be read or written, as often as it must; what an "
            "implementation moves beyond that shows as a lower share. "
            + ("The GPU's cache is emptied before each sample." if context.device == "cuda" else "Above 100 %: from cache."),
        )
    )
    note = f"Over the shapes above. To run them: IDM_FAST_IMPL=DIR/{FILE}, with DIR the folder of this run."
    best: list[list[Cell]] = [list(row) for row in speedups(by_op, result.fastest)]
    result.tables.append(Table("The fastest of each op here", ["op", "implementation", "× eager"], best, note))
    _add_plots(result, chosen[0], roofs, gains)
    return result


def _add_plots(
    result: Result, level: Level, roofs: dict[str, list[tuple[Cell, float]]], gains: dict[str, list[tuple[Cell, float]]]
) -> None:
    if roofs:
        half = {who: sum(share >= 50 for _, share in points) for who, points in roofs.items()}
        claim = ", ".join(f"{who} {count} of {len(roofs[who])}" for who, count in half.items())
        result.plots.append(
            Plot(
                f"Ops at {level} that reach half of what the machine can do: {claim}",
                "",
                "share of copy bandwidth or matrix rate,\nwhichever is larger (%)",
                roofs,
                baseline=SHOWN["reference"],
                bars=True,
            )
        )
    if gains:
        medians = ", ".join(f"{who} {median(gain for _, gain in points):.2g}×" for who, points in gains.items())
        result.plots.append(
            Plot(
                f"Speed against eager PyTorch at {level}, median over the ops: {medians}",
                "",
                "times as fast as eager (1 = the same)",
                gains,
                bars=True,
            )
        )
