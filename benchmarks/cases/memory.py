"""Memory: peak activations of a training step against T, batch and image size; the paper's "up to 93.8 %"."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import torch

from benchmarks.case import Cell, Context, Plot, Result, Table, case
from benchmarks.contenders import (
    CHECKPOINT,
    CONTENDERS,
    FLAT,
    LEAN,
    OURS,
    PLAIN,
    PLANNED,
    PUBLISHED,
    Setting,
    Step,
    check_gradients,
    check_in_use,
    count,
    count_as_on_a_cpu,
    counters,
    make,
    ours_on,
    plan_for,
    references,
)
from idm_fast.memory.count import GIB, StepCount, resident_threads
from idm_fast.ops import registry
from idm_fast.ops.choice import Choice

CLAIM = 0.938
"""What the paper says its training saves "by up to"."""
LAST_T = 10
SPARE = 3 * GIB
"""Of a GPU's memory, for parameters, gradients and the libraries' own buffers."""
QUESTION = "How much memory do activations take in training, and which setting saves the paper's 93.8 %?"
Points = list[tuple[Cell, float]]
Key = TypeVar("Key", bound=tuple)
Counts = dict[tuple[str, Setting], StepCount]


class OnGpu(NamedTuple):
    """What is measured on a GPU: a way to train, its setting, and what stands behind the ops where it is ours."""

    name: str
    setting: Setting
    choice: Choice

    @property
    def label(self) -> str:
        return self.name + (f" ({self.choice} ops)" if self.name in OURS else "")


@case(QUESTION, seconds=(240, 1800))
def memory(context: Context) -> Result:
    """The published setting; a quick run sweeps batch and size at T = 1."""
    base = Setting(steps=3, batch=8, size=256)
    if context.quick:
        return compare(context, base, (1, 2, 3), base.with_(steps=1), (1, 8), (256, 512), (PLAIN, PUBLISHED, LEAN))
    swept = (PLAIN, CHECKPOINT, PUBLISHED, LEAN, FLAT)
    return compare(context, base, (1, 2, 3, 5, 7, LAST_T), base, (1, 2, 4, 8, 16), (128, 256, 512, 1024), swept)


def compare(
    context: Context,
    base: Setting,
    steps: Sequence[int],
    sweep: Setting,
    batches: Sequence[int],
    sizes: Sequence[int],
    swept: Sequence[str],
) -> Result:
    """All ways to train at `base` with the T of `steps`; those of `swept` at `sweep` with these batches and sizes."""
    result = context.new_result()
    right = [name for name in CONTENDERS if result.attempt(name, lambda name=name: check_gradients(context, name)) is not None]
    swept = [name for name in swept if name in right]
    ours = [name for name in OURS if name in right]
    result.notes.append(
        f"The gradients of {len(right)} of {len(CONTENDERS)} ways to train equal those of plain autograd on a small network in "
        "float64 to 1e-9; the others are left out. Counted are activations (neither parameters nor their gradients) under "
        "bfloat16 autocast, each op of ours as one launch, the published network as eager PyTorch."
    )
    wanted = {(name, base.with_(steps=T)) for name in right for T in steps}
    wanted |= {(name, sweep.with_(batch=batch)) for name in swept for batch in batches}
    wanted |= {(name, sweep.with_(size=size)) for name in swept for size in sizes}
    on_gpu = _settings_on_gpu(context, base) if context.device == "cuda" else []
    with counters() as submit:
        # The longest first, so that no core waits for them at the end.
        pending = {key: submit(count, *key) for key in sorted(wanted, key=lambda key: -key[1].steps)}
        slow = [] if context.quick else [(name, base) for name in ours]
        eager_pending = {key: submit(count, *key, as_reference=references(context.device, "reference")) for key in slow}
        threads = resident_threads(torch.device(context.device))
        gpu_pending = {
            key: submit(
                count, *key[:2], as_reference=references(context.device, key.choice), as_on_cuda=True, threads=threads
            )
            for key in (_runs_on_gpu(context, result, right, on_gpu) if on_gpu else ())
        }
        lost = None if context.quick else submit(count_as_on_a_cpu, base)
        counts, eager, on_gpu_counts = (_collected(result, futures) for futures in (pending, eager_pending, gpu_pending))
        single = {name: counts[name, base] for name in right if (name, base) in counts}
        if not context.quick and PUBLISHED in single:
            budget = single[PUBLISHED].peak_bytes
            planned = result.attempt(PLANNED, lambda: submit(plan_for, base, budget).result()[1])
            single |= {} if planned is None else {PLANNED: planned}
        single |= {f"{name}, eager ops": eager[name, base] for name in ours if (name, base) in eager}
        if lost is not None and (found := result.attempt("on a CPU", lost.result)) is not None:
            single[f"{PUBLISHED}, on a CPU"] = found
    for name, setting in [(name, base.with_(steps=T)) for name in right for T in steps]:
        if (name, setting) in counts:
            result.count(f"peak: {name}, {setting}", "bytes", counts[name, setting].peak_bytes)
    _against_steps(result, base, steps, right, counts)
    _one_setting(result, base, single)
    _against(result, "batch", "images a step", sweep, batches, swept, counts)
    _against(result, "size", "side of an image in pixels", sweep, sizes, swept, counts)
    if on_gpu:
        _measured(result, on_gpu_counts)
    return result


def _collected(result: Result, pending: Mapping[Key, Future[StepCount]]) -> dict[Key, StepCount]:
    found = {key: result.attempt(f"{key[0]}, {key[1]}", future.result) for key, future in pending.items()}
    return {key: value for key, value in found.items() if value is not None}


def peak_gib(name: str, setting: Setting, counts: Counts) -> float | None:
    """None where it was not counted. Beyond the largest T that was, each further step adds what the last one added."""
    if (name, setting) in counts:
        return counts[name, setting].peak_bytes / GIB
    known = [T for T in range(1, setting.steps) if (name, setting.with_(steps=T)) in counts]
    if len(known) < 2:
        return None
    before, end = (counts[name, setting.with_(steps=T)].peak_bytes / GIB for T in known[-2:])
    return end + (setting.steps - known[-1]) * (end - before) / (known[-1] - known[-2])


def _against_steps(result: Result, base: Setting, steps: Sequence[int], names: list[str], counts: Counts) -> None:
    """Peaks from T = 1 to `LAST_T`, what they save, and where that is the paper's figure."""
    shown = [*steps, *([] if LAST_T in steps else [LAST_T])]
    lines: dict[str, Points] = {}
    for name in names:
        peaks = [(T, peak_gib(name, base.with_(steps=T), counts)) for T in shown]
        if all(peak is not None for _, peak in peaks):
            lines[name] = [(T, peak) for T, peak in peaks if peak is not None]
    where = f"batch {base.batch}, {base.size}²"
    note = "" if LAST_T in steps else f"T = {LAST_T} is extrapolated: each further step adds what the last counted one did."
    rows: list[list[Cell]] = [[name, *(peak for _, peak in points)] for name, points in lines.items()]
    result.tables.append(Table(f"Peak activations against T ({where}), GiB", ["T =", *map(str, shown)], rows, note))
    if PLAIN not in lines:
        return
    plain = [peak for _, peak in lines[PLAIN]]
    saved = {name: [1 - peak / p for (_, peak), p in zip(lines[name], plain, strict=True)] for name in lines if name != PLAIN}
    rows = [[name, *(f"{share:.1%}" for share in shares)] for name, shares in saved.items()]
    result.tables.append(Table(f"Saved of plain autograd's peak ({where})", ["T =", *map(str, shown)], rows))
    if LEAN in lines:
        ours = [peak for _, peak in lines[LEAN]]
        how = "takes" if LAST_T in steps else "would take"
        title = f"T = {shown[-1]} {how} {plain[-1]:.0f} GiB with plain autograd, {ours[-1]:.2g} GiB with two_level ({where})"
        result.plots.append(Plot(title, "sampling steps T", "peak activations (GiB)", lines, PLAIN, log_y=True))
    if LEAN in lines and PUBLISHED in lines:
        result.notes.append(_where_the_claim_holds(base, lines, where))


def _where_the_claim_holds(base: Setting, lines: dict[str, Points], where: str) -> str:
    """The smallest T at which the published schedule saves what the paper says, and what ours saves there."""
    # From one counted T to the next, peaks are straight lines.
    range_of_T = range(1, LAST_T + 1)
    saved = {name: {T: 1 - _on(lines[name], T) / _on(lines[PLAIN], T) for T in range_of_T} for name in (PUBLISHED, LEAN)}
    theirs, ours = saved[PUBLISHED], saved[LEAN]
    T = next((T for T in range_of_T if theirs[T] >= CLAIM), LAST_T)
    there = f"from T = {T} on ({theirs[T]:.1%} there)" if theirs[T] >= CLAIM else f"at no T up to {T} ({theirs[T]:.1%} there)"
    first = next((T for T in range_of_T if ours[T] >= CLAIM), None)
    also = f"saves that much from T = {first} on" if first else "never saves that much"
    return (
        f"Which setting saves {CLAIM:.1%}? At {where} the published schedule does so {there}. "
        f"Ours (two_level) saves {ours[T]:.1%} at that T, and {also}; at T = {base.steps} it saves {ours[base.steps]:.1%}, "
        f"where the published schedule saves {theirs[base.steps]:.1%}."
    )


def _on(points: Points, T: int) -> float:
    xs, ys = [float(x) for x, _ in points], [y for _, y in points]
    k = next(k for k, x in enumerate(xs) if x >= T)
    return ys[k] if xs[k] == T else ys[k - 1] + (T - xs[k - 1]) / (xs[k] - xs[k - 1]) * (ys[k] - ys[k - 1])


def _one_setting(result: Result, base: Setting, found: dict[str, StepCount]) -> None:
    rows: list[list[Cell]] = []
    for name, value in found.items():
        rows.append([name, value.peak_bytes / GIB, value.held_bytes / GIB, value.flop / 1e12, value.launches])
        result.count(f"FLOP: {name}, {base}", "FLOP", value.flop)
        result.count(f"launches: {name}, {base}", "launches", value.launches)
    columns = ["", "peak (GiB)", "held after forward (GiB)", "TFLOP", "launches"]
    notes = {
        PLANNED: f"{PLANNED}: the fewest FLOP within the peak of {PUBLISHED}.",
        f"{LEAN}, eager ops": "Eager ops: ours as plain PyTorch references, operation by operation.",
        f"{PUBLISHED}, on a CPU": "On a CPU the published code puts back CUDA's autocast alone: replays are float32.",
    }
    note = " ".join(text for name, text in notes.items() if name in found)
    result.tables.append(Table(f"One training step: {base}", columns, rows, note))


def _against(
    result: Result, what: str, label: str, base: Setting, values: Sequence[int], names: Sequence[str], counts: Counts
) -> None:
    """One table and plot of peaks against `what`, a field of `Setting`."""
    lines: dict[str, Points] = {}
    for name in names:
        found = [counts.get((name, base.with_(**{what: value}))) for value in values]
        if None not in found:
            lines[name] = [(value, count.peak_bytes / GIB) for value, count in zip(values, found, strict=True) if count]
    fixed = f"T = {base.steps}, " + (f"{base.size}²" if what == "batch" else f"batch {base.batch}")
    rows: list[list[Cell]] = [[name, *(peak for _, peak in points)] for name, points in lines.items()]
    result.tables.append(Table(f"Peak activations against {what} ({fixed}), GiB", [f"{what} =", *map(str, values)], rows))
    if PLAIN in lines and LEAN in lines:
        shares = [1 - ours / plain for (_, ours), (_, plain) in zip(lines[LEAN], lines[PLAIN], strict=True)]
        low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
        range_of = low if low == high else f"{low} to {high}"
        title = f"two_level saves {range_of} % of plain autograd's memory at every {what} ({fixed})"
        result.plots.append(Plot(title, label, "peak activations (GiB)", lines, PLAIN, log_x=True, log_y=True))


def _settings_on_gpu(context: Context, base: Setting) -> list[Setting]:
    """Where to measure beside counting: `base`, and the largest batch at which plain autograd fits (alone in a quick run)."""
    free = torch.cuda.mem_get_info()[0] - SPARE
    one = count(PLAIN, base.with_(steps=1, batch=1), as_on_cuda=True).peak_bytes * base.steps
    batch = base.batch
    while batch > 1 and batch * one > free:
        batch //= 2
    return [base.with_(batch=b) for b in sorted({batch} if context.quick else {batch, base.batch})]


def _runs_on_gpu(context: Context, result: Result, names: Sequence[str], settings: Sequence[Setting]) -> list[OnGpu]:
    """Ours with plain PyTorch and with this package's kernels, where those compute the same gradients."""
    choices = dict.fromkeys(["reference", ours_on(context)])
    pairs = [(name, choice) for name in names for choice in (choices if name in OURS else ["reference"])]

    def right(name: str, choice: Choice) -> bool:
        check_in_use(context, name, choice, torch.bfloat16)
        return True

    pairs = [pair for pair in pairs if result.attempt(f"{pair[0]} ({pair[1]} ops)", lambda pair=pair: right(*pair))]
    return [OnGpu(name, setting, choice) for setting in settings for name, choice in pairs]


def _measured(result: Result, counts: Mapping[OnGpu, StepCount]) -> None:
    """Peaks on this GPU beside the counted ones."""
    free = torch.cuda.mem_get_info()[0] - SPARE
    rows: list[list[Cell]] = []
    errors: list[float] = []
    for run, counted in counts.items():
        row: list[Cell] = [run.label, str(run.setting), counted.peak_bytes / GIB, counted.peak_with_gradients / GIB]
        if counted.peak_with_gradients > free:
            rows.append([*row, "does not fit", ""])
            continue
        what = f"measured peak with gradients: {run.label}, {run.setting}"
        found = result.attempt(what, lambda run=run: peak_on_gpu(run))
        if found is not None:
            errors.append((found - counted.peak_with_gradients) / counted.peak_bytes)
            rows.append([*row, found / GIB, f"{errors[-1]:+.1%}"])
            result.count(what, "bytes", found, exact=False)
    columns = ["", "setting", "activations (GiB)", "with gradients (GiB)", "measured (GiB)", "error"]
    note = "Measured: max_memory_allocated above parameters and data, so with the gradients that exist at the peak. "
    if errors:
        note += f"The largest error, relative to the activations, is {max(map(abs, errors)):.1%}. "
    note += "Norms of plain PyTorch are counted in float32 here, as CUDA's autocast runs them; in the other tables in bfloat16."
    result.tables.append(Table("Counted and measured peaks", columns, rows, note))


def peak_on_gpu(run: OnGpu) -> int:
    """Bytes at the peak of a training step above parameters and data."""
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        network = make(run.name, run.setting)
    step = Step(network, run.setting, "cuda", torch.bfloat16)
    with registry.use(run.choice):
        step()  # the libraries' workspaces are allocated once
        network.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
