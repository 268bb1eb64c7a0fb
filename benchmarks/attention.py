"""How fast are the library's attention kernels at the U-Net's sizes? `python -m benchmarks.attention --out DIR`.

Each kernel of `idm_fast.models.attention.BACKENDS`, forward and forward + backward, at head_dim 40 and 80 with 16,384 and 4,096
tokens (setting S of DESIGN §5), on the device at hand. A kernel's output and gradients on one head are first held against
float64: an error above twice that of plain PyTorch in the same dtype is reported in place of a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from idm_fast.models.attention import BACKENDS, device_name

HEADS = 8
SIZES = ((40, 16384), (80, 4096))
"""head_dim and tokens at the U-Net's two resolutions."""


@dataclass
class Result:
    """One kernel at one size: every sample in seconds, or why there is none."""

    kernel: str
    head_dim: int
    tokens: int
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    error: float | None = None
    """Largest error of output and gradients over that of plain PyTorch in the same dtype; at most 2."""
    refused: str | None = None


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v


def output_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], d: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d)]


def relative_error(inputs: list[Tensor], d: Tensor) -> float:
    """Of the kernel in force on the first head of the first image."""
    head = [x[:1, :1] for x in (*inputs, d)]
    found = output_and_gradients(F.scaled_dot_product_attention, head[:3], head[3])
    eager = output_and_gradients(plain, head[:3], head[3])
    exact = output_and_gradients(plain, [x.double() for x in head[:3]], head[3].double())
    return max(float((a - c).abs().max() / (b - c).abs().max()) for a, b, c in zip(found, eager, exact, strict=True))


def samples(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` runs, after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def measure(
    kernel: str, head_dim: int, tokens: int, batch: int, repeats: int, dtype: torch.dtype, device: torch.device
) -> Result:
    result = Result(kernel, head_dim, tokens)
    generator = torch.Generator(device).manual_seed(0)
    # As the U-Net has them: projections of (B, N, heads·d), seen as (B, heads, N, d).
    q, k, v, d = (
        torch.randn(batch, tokens, HEADS, head_dim, generator=generator, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(4)
    )
    try:
        with sdpa_kernel(BACKENDS[kernel]):
            result.error = relative_error([q, k, v], d)
            if not result.error <= 2:
                result.refused = f"wrong: {result.error:.1f} times the error of plain PyTorch"
                return result
            with torch.no_grad():
                result.forward = samples(lambda: F.scaled_dot_product_attention(q, k, v), repeats, device)
            step = lambda: output_and_gradients(F.scaled_dot_product_attention, [q, k, v], d)  # noqa: E731
            result.both = samples(step, repeats, device)
    except RuntimeError as error:  # out of memory is one, too
        result.refused = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return result


def table(results: list[Result], batch: int) -> list[str]:
    """Medians, and arithmetic per second: 4·N²·d multiply-adds' FLOP a head forward, 2.5 times that backward."""
    lines = ["| head_dim | tokens | kernel | forward | forward + backward | TFLOP/s | error / eager's |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        where = f"| {r.head_dim} | {r.tokens:,} | {r.kernel}"
        if r.refused is not None:
            lines.append(f"{where} | – | – | – | {r.refused} |")
            continue
        flop = 3.5 * 4 * batch * HEADS * r.tokens**2 * r.head_dim
        forward, both = median(r.forward), median(r.both)
        lines.append(f"{where} | {forward * 1e3:.2f} ms | {both * 1e3:.2f} ms | {flop / both / 1e12:.2f} | {r.error:.2f} |")
    return lines


def fastest(results: list[Result], device: torch.device) -> list[str]:
    """The lines that `idm_fast.models.attention.FASTEST` should have for this device."""
    lines = []
    for head_dim in sorted({r.head_dim for r in results}):
        timed = [r for r in results if r.head_dim == head_dim and r.both]
        if timed:
            best = min(timed, key=lambda r: median(r.both))
            lines.append(f'`("{device_name(device)}", {head_dim}): "{best.kernel}"`')
    return lines


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--divide", type=int, default=1, help="tokens by this, for a slow machine (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for attention_DEVICE.json, with every sample, and .md")
    options = parser.parse_args()
    device = torch.device(options.device)
    setup = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(), "commit": commit(),
        "dtype": options.dtype, "batch": options.batch, "heads": HEADS,
    }  # fmt: skip
    dtype = getattr(torch, options.dtype)
    results = [
        measure(kernel, head_dim, tokens // options.divide, options.batch, options.repeats, dtype, device)
        for head_dim, tokens in SIZES
        for kernel in BACKENDS
    ]
    lines = [
        f"Attention kernels of torch {setup['torch']} on {setup['device']}: batch {options.batch}, {HEADS} heads, "
        f"{options.dtype}; medians of {options.repeats}; commit {setup['commit']}.",
        "",
        *table(results, options.batch),
        "",
        "Fastest, forward + backward: " + ", ".join(fastest(results, device)) + ".",
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"attention_{device_name(device)}"
        record = {"setup": setup, "results": [asdict(r) for r in results]}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
