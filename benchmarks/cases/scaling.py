"""Scaling: step time and memory against image size and T, and two processes against one."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from benchmarks.case import Cell, Context, NotHere, Plot, Result, Table, case
from benchmarks.contenders import (
    LEAN,
    PLAIN,
    PUBLISHED,
    SMALL,
    Setting,
    Step,
    check_gradients,
    check_in_use,
    count,
    counters,
    ours_on,
    train_by,
)
from benchmarks.timing import take_turns
from idm_fast import IDM
from idm_fast.memory.count import GIB, StepCount
from idm_fast.ops import registry
from idm_fast.ops.choice import Choice

NAMES = (PLAIN, PUBLISHED, LEAN)
AXES = {
    ("cuda", True): ((128, 256, 512), (1, 3, 5)),
    ("cuda", False): ((128, 256, 512, 1024), (1, 2, 3, 5, 7, 10)),
    ("cpu", True): ((64, 128), (1, 2)),
    ("cpu", False): ((64, 128, 256, 512, 1024), (1, 2, 3, 5)),
}
"""(device, quick) → the sides of an image and the T."""
LARGEST_TIMED_ON_CPU = 128
"""Side of an image; a step of twice the side takes four times as long and more. Memory is counted all the same."""
PROCESSES = 2
SPARE = 3 * GIB
"""Of a GPU's memory, for parameters, gradients and the libraries' own buffers."""


QUESTION = "How do time and memory grow with image size and T, and what do two processes bring?"


@case(QUESTION, seconds=(180, 1800), quick=("cuda",))
def scaling(context: Context) -> Result:
    """Full width at batch 1 on a GPU; on a CPU a narrow network."""
    result, full, choice = context.new_result(), not context.quick, ours_on(context)
    base, autocast = (Setting(3, 1, 256), torch.bfloat16) if context.device == "cuda" else (Setting(1, 1, 64, SMALL), None)
    sizes, steps = AXES[context.device, context.quick]
    seconds = 60.0 if full else 4.0

    def check(name: str) -> float:
        check_gradients(context, name)
        return check_in_use(context, name, choice if name == LEAN else "reference", autocast)

    names = [name for name in NAMES if result.attempt(name, lambda name=name: check(name)) is not None]
    if choice is not None:
        result.notes.append(f"Ops of {LEAN}: {choice}.")
    with counters() as submit:
        axes = {"size": {v: base.with_(size=v) for v in sizes}, "steps": {v: base.with_(steps=v) for v in steps}}
        wanted = dict.fromkeys((name, s) for settings in axes.values() for s in settings.values() for name in names)
        pending = {key: submit(count, *key, autocast) for key in wanted}
        counted = {key: result.attempt(f"{key[0]}, {key[1]}", future.result) for key, future in pending.items()}
        for what, settings in axes.items():
            counts = {(name, value): counted[name, setting] for value, setting in settings.items() for name in names}
            values = list(settings)
            times = step_times(context, result, settings, names, counts, autocast, seconds, choice)
            known = {key: found for key, found in counts.items() if found}
            report(result, what, context.device, base, values, names, times, known)
    result.attempt("two processes", lambda: processes(context, result, base, autocast, seconds, choice))
    return result


def with_ops(choice: Choice, step: Step) -> Callable[[], None]:
    def once() -> None:
        with registry.use(choice):
            step()

    return once


def is_timed(device: str, size: int) -> bool:
    return device != "cpu" or size <= LARGEST_TIMED_ON_CPU


def step_times(
    context: Context,
    result: Result,
    settings: Mapping[int, Setting],
    names: Sequence[str],
    counts: Mapping[tuple[str, int], StepCount | None],
    autocast: torch.dtype | None,
    seconds: float,
    choice: Choice = None,
) -> dict[tuple[str, int], float]:
    """Median seconds of a step, by name and key of `settings`, where memory suffices; `seconds` for all of them together."""
    free = torch.cuda.mem_get_info()[0] - SPARE if context.device == "cuda" else float("inf")
    times: dict[tuple[str, int], float] = {}
    for value, setting in settings.items():
        if not is_timed(context.device, setting.size):
            continue
        with torch.device(context.device):
            model = IDM(steps=setting.steps, **setting.options)
        steps = {}
        for name in names:
            counted = counts[name, value]
            if counted is not None and counted.peak_bytes <= free:
                step = with_ops(choice, Step(train_by(name, model), setting, context.device, autocast))
                if result.attempt(f"{name}, {setting}", lambda step=step: (step(), True)) is not None:
                    steps[name] = step
        failed = result.failed_at(f"{setting}, timing")
        for name, samples in take_turns(steps, context.device, seconds / len(settings), least=2, failed=failed).items():
            times[name, value] = result.samples(f"{name}, {setting}", "s", samples).median
    return times


def report(
    result: Result,
    what: str,
    device: str,
    base: Setting,
    values: Sequence[int],
    names: Sequence[str],
    times: Mapping[tuple[str, int], float],
    counts: Mapping[tuple[str, int], StepCount],
) -> None:
    """Tables and plots of time and memory against `what`, a field of `Setting`."""
    def missing(name: str, value: int) -> str:
        if (name, value) not in counts:
            return "not counted"
        return "does not fit" if what != "size" or is_timed(device, value) else "not timed"

    fixed = f"T = {base.steps}, batch {base.batch}" if what == "size" else f"batch {base.batch}, {base.size}²"
    fixed = f"{'narrow network' if base.options else 'full width'}, {fixed}"
    label = "side of an image in pixels" if what == "size" else "sampling steps T"
    unit, name_of_unit = (2**20, "MiB") if base.options else (GIB, "GiB")
    peaks = {key: found.peak_bytes / unit for key, found in counts.items()}
    for quantity, verb, axis, found in (
        ("Time", "takes", "seconds a step", times),
        ("Peak of activations", "needs", f"peak activations ({name_of_unit})", peaks),
    ):
        rows: list[list[Cell]] = [[name, *(found.get((name, v), missing(name, v)) for v in values)] for name in names]
        title = f"{quantity} of a training step against {what} ({fixed}), {axis}"
        result.tables.append(Table(title, [f"{what} =", *map(str, values)], rows))
        lines: dict[str, list[tuple[Cell, float]]] = {}
        for name in names:
            lines[name] = [(v, found[name, v]) for v in values if (name, v) in found]
        common = [v for v in values if all((name, v) in found for name in (LEAN, PUBLISHED))]
        if common:
            ratio = found[PUBLISHED, common[-1]] / found[LEAN, common[-1]]
            where = f"{common[-1]}²" if what == "size" else f"T = {common[-1]}"
            amount = f"{ratio:.2f} times the {'time' if quantity == 'Time' else 'memory'} of two_level"
            title = f"At {where} the published training {verb} {amount} ({fixed})"
            result.plots.append(Plot(title, label, axis, lines, PLAIN, log_x=what == "size", log_y=True))


def processes(
    context: Context,
    result: Result,
    base: Setting,
    autocast: torch.dtype | None,
    seconds: float,
    choice: Choice = None,
) -> None:
    """DistributedDataParallel around two_level: images a second with one process and with two, each with its own batch.

    Raises:
        NotHere: fewer GPUs than processes, or no such backend.
        RuntimeError: a process failed.
    """
    if context.device == "cuda" and torch.cuda.device_count() < PROCESSES:
        raise NotHere(f"nccl takes {PROCESSES} GPUs, and there is {torch.cuda.device_count()}")
    if not dist.is_available():
        raise NotHere("this PyTorch is built without torch.distributed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores // PROCESSES, 1)
    rates: dict[int, list[float]] = {}
    for number in (1, PROCESSES):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (number, _free_port(), context.device, base, autocast, choice, seconds / 4, threads, folder)
            torch.multiprocessing.spawn(_train_process, arguments, nprocs=number)
            samples = [float(line) for line in (Path(folder) / "seconds").read_text().split()]
        rates[number] = [number * base.batch / sample for sample in samples]
        result.samples(f"DDP, {number} processes, {base}", "images/s", rates[number], better="higher")
    one, two = (median(rates[number]) for number in (1, PROCESSES))
    hardware = "a GPU each" if context.device == "cuda" else f"{threads} core{'s' * (threads > 1)} each"
    rows: list[list[Cell]] = [[number, median(rates[number]), median(rates[number]) / one / number] for number in rates]
    columns = ["processes", "images a second", "efficiency"]
    note = f"two_level, {base}, {hardware}; gradients are averaged in every step."
    result.tables.append(Table("DistributedDataParallel", columns, rows, note))
    points: list[tuple[Cell, float]] = [(f"{n} process{'es' * (n > 1)}", median(found)) for n, found in rates.items()]
    title = f"Two processes train {two / one:.2f} times as many images a second as one ({hardware})"
    result.plots.append(Plot(title, "", "images a second", {LEAN: points}, bars=True))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _train_process(
    rank: int,
    number: int,
    port: int,
    device: str,
    setting: Setting,
    autocast: torch.dtype | None,
    choice: Choice,
    seconds: float,
    threads: int,
    folder: str,
) -> None:
    """One process. All take the same number of steps; the first one's times go to `folder`/seconds."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(threads)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=number)
    torch.manual_seed(0)
    registry.load(choice)
    step = Step(train_by(LEAN, IDM(steps=setting.steps, **setting.options)), setting, device, autocast)
    step.network = DistributedDataParallel(step.network)
    single = partial(take_turns, {"step": with_ops(choice, step)}, device)
    # How many steps that makes, the first process says, for all of them wait for each other.
    rounds = torch.tensor([max(3, int(seconds / median(single(0, least=2)["step"])))], device=device)
    dist.broadcast(rounds, 0)
    samples = single(0, least=int(rounds))["step"]
    if rank == 0:
        (Path(folder) / "seconds").write_text("\n".join(map(str, samples)))
    dist.barrier()
    # Without PyTorch's destructors: gloo's thread may wait for the GIL, which the one that waits for that thread holds.
    os._exit(0)
