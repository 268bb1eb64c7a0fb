"""Inference: IDM's three U-Net calls against the hundred of DDNM, both at their published sizes (the paper: 14.54×).

Weights are random: they do not change the time. On a GPU whole reconstructions are timed, quickly ten steps of DDNM times ten;
on a CPU one step of each (the U-Net and the projection behind it) times the steps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Cell, Context, Plot, Result, Table, case
from benchmarks.contenders import choices, missing_kernels
from benchmarks.timing import take_turns
from idm_fast import IDM, BlockCompressedSensing, ops
from idm_fast.evaluation.ddnm import adm_unet, ddnm
from idm_fast.ops.choice import Choice

PUBLISHED_FACTOR = 14.54
IDM_CALLS, DDNM_CALLS = 3, 100
IN_FLOAT32 = "IDM, float32"
DDNM_NAME, AS_PUBLISHED = "DDNM, float32", f"{IN_FLOAT32}, eager"
RATIO = 0.1
SIZES_ON_GPU = (256, 512)
SIZES_ON_CPU = (64, 128, 256)


@dataclass(frozen=True)
class Way:
    """A way to reconstruct: how long `function` takes, and how many times that a reconstruction takes."""

    calls: int
    times: int
    parameters: int
    function: Callable[[], Any]


@case("How much faster is IDM than DDNM with 100 steps, the paper's 14.54×?", seconds=(150, 1200))
def run(context: Context) -> Result:
    result = context.new_result()
    rows: list[list[Cell]] = []
    latencies: dict[str, list[tuple[Cell, float]]] = {}
    factors: list[str] = []
    result.failures += missing_kernels(context.device)
    on_gpu = context.device == "cuda"
    sizes = SIZES_ON_GPU if on_gpu else (32,) if context.quick else SIZES_ON_CPU
    models = networks(context)
    for size in sizes:
        for batch in (1, 8) if on_gpu and not context.quick else (1,):
            label = f"{size}², batch {batch}"
            seconds = measure(result, context, models, size, batch, label)
            if DDNM_NAME not in seconds:
                continue
            for who, (way, time) in seconds.items():
                factor = seconds[DDNM_NAME][1] / time
                rows.append([who, label, way.parameters / 1e6, way.calls, 1e3 * time / way.calls, time, batch / time, factor])
                if batch == 1:
                    latencies.setdefault(who, []).append((f"{size}²", time))
            times = {who: time for who, (_, time) in seconds.items() if who.startswith(IN_FLOAT32)}
            if batch == 1 and times:
                factors.append(f"{seconds[DDNM_NAME][1] / min(times.values()):.3g}× at {size}²")
    columns = ["method", "images", "M parameters", "U-Net calls", "ms a call", "s a batch", "images/s", "× as fast as DDNM"]
    how = "whole reconstructions" if on_gpu else "one step of each, times the steps"
    result.tables.append(
        Table(
            f"Reconstruction time, timed as {how}",
            columns,
            rows,
            f"The paper's factor between IDM and DDNM is {PUBLISHED_FACTOR}×. A call is a U-Net with the projection behind it, "
            f"block compressed sensing at ratio {RATIO}. DDNM's authors move the image to the CPU at every step; on a GPU both "
            f"are quoted. {AS_PUBLISHED}: plain PyTorch as in the published code, without this package's kernels; the others "
            "say whose ops they run. float32 is as PyTorch has it by default: on a GPU convolutions round to TF32.",
        )
    )
    if not on_gpu:
        result.notes.append("On small images a CPU spends much of a call on reading weights; the paper timed a GPU, at 256².")
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            result.notes.append("bfloat16 is left out: without instructions for it this processor takes twenty times as long.")
    if factors:
        many = f"{', '.join(factors)} as long as IDM"
        title = f"DDNM with {DDNM_CALLS} steps takes {many}, both in float32 (the paper: {PUBLISHED_FACTOR}×)"
        label = "seconds for one image, batch 1"
        result.plots.append(Plot(title, "image size", label, latencies, baseline=DDNM_NAME, log_y=True, bars=True))
    return result


def networks(context: Context) -> dict[str, nn.Module]:
    """IDM at the widths of Stable Diffusion 1.5 and DDNM's U-Net; on a CPU an IDM of one step, which is timed thrice over."""
    torch.manual_seed(0)
    made = {"IDM": IDM(steps=IDM_CALLS if context.device == "cuda" else 1).eval().to(context.device)}
    # On the meta device and drawn afterwards: initialising half a billion weights as for training takes a CPU minutes.
    with torch.device("meta"):
        unet = adm_unet()
    made["DDNM"] = unet.to_empty(device=context.device).eval()
    with torch.no_grad():
        for parameter in made["DDNM"].parameters():
            parameter.normal_(std=0.02)
    return made


def measure(
    result: Result, context: Context, models: dict[str, nn.Module], size: int, batch: int, label: str
) -> dict[str, tuple[Way, float]]:
    """Each way with its seconds for a reconstruction; ways that fail or compute something else are left out and said."""
    device = context.device
    physics = BlockCompressedSensing((size, size), RATIO).to(device)
    x = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    y = physics.A(x)
    exact = exact_idm(models["IDM"], y, physics)
    ready: dict[str, Way] = {}
    for who, make in ways(context, models, y, physics).items():

        def check(who: str = who, make: Callable[[], Way] = make) -> None:
            way = make()
            found = way.function()
            if who.startswith("DDNM"):
                error = (physics.A(found) - y).norm() / y.norm()
                context.check(f"A x̂ − y of {who}", float(error), 1e-2)
            else:
                error = (found - exact).norm() / exact.norm()
                context.check(who, float(error), 1e-3 if "float32" in who else 5e-2)
            ready[who] = way

        result.attempt(f"{who}, {label}", check)
    seconds = 2.0 if context.quick else 20.0
    least = 5 if device == "cuda" else 1 if context.quick or size > 128 else 3
    functions = {who: way.function for who, way in ready.items()}
    found = {}
    for who, samples in take_turns(functions, device, seconds, least=least, failed=result.failed_at(label)).items():
        way = ready[who]
        times = [way.times * t for t in samples]
        found[who] = (way, result.samples(f"{who}, {label}", "s", times).median)
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def exact_idm(model: nn.Module, y: Tensor, physics: BlockCompressedSensing) -> Tensor:
    """What the plain-PyTorch reference gives in float32."""
    with ops.use("reference"):
        return model(y, physics)


def ways(
    context: Context, models: dict[str, nn.Module], y: Tensor, physics: BlockCompressedSensing
) -> dict[str, Callable[[], Way]]:
    """What makes each way, by name."""
    device, idm, unet = context.device, models["IDM"], models["DDNM"]
    weights = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    on_gpu = device == "cuda"
    steps = DDNM_CALLS if on_gpu and not context.quick else 10 if on_gpu else 1

    @torch.no_grad()
    def reconstruct(dtype: torch.dtype | None = None, implementation: Choice = None, model: Any = idm) -> Tensor:
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None), ops.use(implementation):
            return model(y, physics)

    def by_idm(function: Callable[[], Tensor]) -> Way:
        return Way(IDM_CALLS, 1 if on_gpu else IDM_CALLS, weights["IDM"], function)

    def by_ddnm(dtype: torch.dtype | None = None, **options: Any) -> Way:
        def restore() -> Tensor:
            with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
                return ddnm(unet, y, physics, steps=steps, **options)

        return Way(DDNM_CALLS, DDNM_CALLS // steps, weights["DDNM"], restore)

    bf16 = torch.bfloat16

    @functools.cache
    def channels_last() -> nn.Module:
        return copy.deepcopy(idm).to(memory_format=torch.channels_last)

    found: dict[str, Callable[[], Way]] = {DDNM_NAME: by_ddnm}
    if on_gpu or (not context.quick and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        found["DDNM, bfloat16"] = lambda: by_ddnm(bf16)
    if on_gpu:
        found["DDNM, float32, through the CPU"] = lambda: by_ddnm(through_cpu=True)
    for name in choices(context):
        whose = "eager" if name == "reference" else f"{name} ops"
        found[f"{IN_FLOAT32}, {whose}"] = lambda name=name: by_idm(partial(reconstruct, None, name))
        if "DDNM, bfloat16" not in found:
            continue
        found[f"IDM, bfloat16, {whose}"] = lambda name=name: by_idm(partial(reconstruct, bf16, name))
        if not on_gpu:
            continue
        last = f"IDM, bfloat16, channels last, {whose}"
        found[last] = lambda name=name: by_idm(partial(reconstruct, bf16, name, channels_last()))
        found[f"{last}, CUDA graph"] = lambda name=name: by_idm(as_graph(partial(reconstruct, bf16, name, channels_last())))
        if not context.quick:
            found[f"{last}, torch.compile"] = lambda name=name: by_idm(
                partial(reconstruct, bf16, name, torch.compile(channels_last(), dynamic=False))
            )
    return found


def as_graph(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function` recorded as a CUDA graph and replayed, for inputs that stay where they are. RuntimeError if it cannot be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
