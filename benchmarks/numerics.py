"""How exact are a reversible chain's recovered input and gradients, and at what memory? `python -m benchmarks.numerics`.

Chains of residual GroupNorm–SiLU–convolution bodies, on a CPU, less than a minute. Reported are

    recovered input   largest error of the first layer's two recovered streams over the largest true value (`check_inverse`)
    gradients         |g − g_store| / |g_store| over all parameters, g_store by plain autograd on streams of the same kind
    bytes held        memory between forward and backward, over the elements of one stream
"""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ReversibleSequence
from idm_fast.memory.count import AllocationCounter
from idm_fast.reversible.drift import TOLERANCE

DEPTHS = (4, 8, 11, 16, 32, 64)
STREAMS = {"float32": torch.float32, "float64": torch.float64, "fixed": torch.int32}
BODIES = {"float32": None, "bfloat16": torch.bfloat16}
VALUES_OF_V = (0.25, 0.45, 0.5, 0.9)
SEEDS = (0, 1, 2)
SHAPE = (1, 16, 16, 16)
FINDINGS = {
    ("float32", "float32"): {4: 4e-7, 8: 7e-6, 11: 6e-5, 16: 2e-3},
    ("float32", "bfloat16"): {4: 1e-3, 8: 3e-3, 11: 5e-3, 16: 0.14},
}
"""Recovered-input errors at v = 0.5 measured before this engine was written."""
NOTES = [
    "With bfloat16 bodies an error in the last place of a float32 stream matters where it tips a body's rounding, and is 2^−8",
    "there at once. So the largest error of a short chain is large or tiny by chance, and grows with the number of elements.",
    "",
    "The arithmetic of a coupling is not what limits float32 streams: computed in float64 and rounded once each way, it leaves",
    "errors smaller by a fifth at most, of the input after 11 layers at v = 0.45, 0.5 or 0.7. What grows is y1's rounding.",
    "",
    "v = 0.5 and 0.25 flatter float64 streams: halving is exact until it has used up the 29 bits that float64 has beyond",
    "float32. At any other v they round from the first layer on, and the error grows as it does in float32, from 1e-16.",
]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, SHAPE[1])
        self.conv = nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


@dataclass(frozen=True)
class Sample:
    """Errors of one chain."""

    stream: str
    body: str
    v: float
    depth: int
    recovered: float
    gradients: float


def make_chain(stream: str, depth: int, v: float, seed: int, **options: object) -> ReversibleSequence:
    torch.manual_seed(seed)
    bodies = [Body() for _ in range(depth)]
    net = ReversibleSequence(bodies, stream_dtype=STREAMS[stream], min_v=0.5 if v >= 0.5 else 0.25, **options)
    with torch.no_grad():
        for weight in net.v:
            weight.fill_(v)
    return net


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    x1, x2 = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return x1, x2


def autocast(body: str) -> AbstractContextManager:
    dtype = BODIES[body]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def measure(stream: str, body: str, v: float, depth: int, seed: int) -> Sample:
    net = make_chain(stream, depth, v, seed, check_inverse=True)
    gradients = {}
    for net.recovery in ("store", "invert"):
        with autocast(body):
            y1, y2 = net(*inputs(seed))
        loss = (y1 + y2).square().mean()
        gradients[net.recovery] = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    error = (gradients["invert"] - gradients["store"]).norm() / gradients["store"].norm()
    return Sample(stream, body, v, depth, max(net.drift[:2]), float(error))


def measure_all() -> Iterator[Sample]:
    for stream in STREAMS:
        for body in BODIES:
            for v in VALUES_OF_V:
                for depth in DEPTHS:
                    samples = [measure(stream, body, v, depth, seed) for seed in SEEDS]
                    recovered, gradients = (median(getattr(s, name) for s in samples) for name in ("recovered", "gradients"))
                    yield Sample(stream, body, v, depth, recovered, gradients)


def bytes_held(stream: str, v: float, recovery: str) -> tuple[float, float]:
    """Bytes that 16 layers hold from forward to backward, and what each further layer adds, an element of one stream."""

    def held(depth: int) -> int:
        net, x = make_chain(stream, depth, v, 0, recovery=recovery, preserve_rng_state=False), inputs(0)
        counter = AllocationCounter()
        counter.ignore([*x, *net.parameters()])
        with counter:
            loss = net(*x)[0].sum()
            moment = counter.mark()
        size = loss.nbytes
        del loss
        return counter.summarize([], moment)[1] - size

    elements = torch.Size(SHAPE).numel()
    return held(16) / elements, (held(24) - held(16)) / 8 / elements


def error_table(samples: list[Sample], v: float) -> list[str]:
    lines = [
        f"At v = {v}: error of the recovered input (of the gradients)",
        "",
        "| streams | bodies | " + " | ".join(f"{depth} layers" for depth in DEPTHS) + " |",
        "|---|---|" + "---|" * len(DEPTHS),
    ]
    for stream in STREAMS:
        for body in BODIES:
            chosen = {s.depth: s for s in samples if (s.stream, s.body, s.v) == (stream, body, v)}
            cells = (f"{chosen[depth].recovered:.0e} ({chosen[depth].gradients:.0e})" for depth in DEPTHS)
            lines.append(f"| {stream} | {body} | " + " | ".join(cells).replace("0e+00", "0") + " |")
    return [*lines, ""]


def findings_table(samples: list[Sample]) -> list[str]:
    lines = [
        "Recovered input at v = 0.5, here against what was measured before this engine was written:",
        "",
        "| streams | bodies | layers | here | before | here / before |",
        "|---|---|---|---|---|---|",
    ]
    for (stream, body), before in FINDINGS.items():
        for depth, error in before.items():
            found = next(s for s in samples if (s.stream, s.body, s.v, s.depth) == (stream, body, 0.5, depth)).recovered
            lines.append(f"| {stream} | {body} | {depth} | {found:.1e} | {error:.1e} | {found / error:.2g} |")
    return [*lines, "", *NOTES, ""]


def tolerance_line(samples: list[Sample]) -> list[str]:
    """What the tolerance of `check_inverse` lets pass."""
    worst = {body: max(s.gradients for s in samples if s.body == body and s.recovered <= TOLERANCE) for body in BODIES}
    text = ", ".join(f"{error:.0e} with {body} bodies" for body, error in worst.items())
    return [
        f"Where the recovered input is within {TOLERANCE:g}, the tolerance of `check_inverse`, the gradients' error is at most",
        f"{text}.",
        "",
    ]


def memory_table() -> list[str]:
    lines = [
        "Bytes held from forward to backward, an element of one stream (float32 bodies). The output is not counted; with float",
        "streams it is the same memory.",
        "",
        "| recovery | streams | v | 16 layers | each further layer |",
        "|---|---|---|---|---|",
    ]
    for recovery, streams in (("invert", STREAMS), ("keep", ["float32"]), ("store", ["float32"])):
        for stream in streams:
            for v in (0.25, 0.5) if stream == "fixed" else (0.5,):
                first, further = bytes_held(stream, v, recovery)
                promise = f"in [{v}, 1]" if stream == "fixed" else "any"
                lines.append(f"| `{recovery}` | {stream} | {promise} | {first:.4g} | {further:.4g} |")
    return [*lines, ""]


def plot(samples: list[Sample], path: Path) -> None:
    """Errors against depth, a column for each v; what is exactly 0 stands on the lowest line, what is beyond 1000 outside."""
    from matplotlib.figure import Figure

    exact = 1e-17
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, len(VALUES_OF_V), sharex=True, sharey=True)
    for row, (name, title) in enumerate((("recovered", "recovered input"), ("gradients", "gradients"))):
        for column, v in enumerate(VALUES_OF_V):
            axis = axes[row, column]
            for color, stream in enumerate(STREAMS):
                for body in BODIES:
                    chosen = [s for s in samples if (s.stream, s.body, s.v) == (stream, body, v)]
                    axis.plot(
                        [s.depth for s in chosen],
                        [max(getattr(s, name), exact) for s in chosen],
                        f"C{color}" + ("o-" if body == "float32" else "s--"),
                        markersize=4,
                        label=f"{stream} streams, {body} bodies",
                    )
            axis.axhline(TOLERANCE, color="gray", linewidth=0.6, linestyle=":")
            axis.set(xscale="log", yscale="log", title=f"{title}, v = {v}")
            axis.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_yticks([exact, 1e-14, 1e-11, 1e-8, 1e-5, 1e-2, 10], ["0", "1e-14", "1e-11", "1e-8", "1e-5", "0.01", "10"])
            axis.set_ylim(exact / 10, 1e3)
    for axis in axes[1]:
        axis.set_xlabel("layers")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.numerics", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file, and a plot beside it (.png)")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "check_inverse", RuntimeWarning)
        samples = list(measure_all())
    lines = [
        f"Chains of residual GroupNorm–SiLU–convolution bodies on streams of {SHAPE}, medians of {len(SEEDS)} seeds; "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()} CPU. What is measured stands in "
        "`benchmarks/numerics.py`.",
        "",
        *(line for v in VALUES_OF_V for line in error_table(samples, v)),
        *findings_table(samples),
        *tolerance_line(samples),
        *memory_table(),
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines).rstrip() + "\n")
        plot(samples, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
