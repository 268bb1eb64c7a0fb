"""Training step: time, FLOP and launches of every way to train the same network."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.case import Cell, Context, Plot, Result, Table, case
from benchmarks.contenders import (
    CHECKPOINT,
    CONTENDERS,
    FLAT,
    FLAT_KEPT,
    LEAN,
    OURS,
    PLAIN,
    PLANNED,
    PUBLISHED,
    SINGLE,
    SMALL,
    Setting,
    Step,
    allowed_error,
    check_gradients,
    check_in_use,
    choices,
    count,
    counters,
    gradients_of,
    implementations,
    ours_on,
    plan_for,
    references,
    total_error,
    train_by,
)
from benchmarks.timing import take_turns
from idm_fast import IDM
from idm_fast.memory.count import GIB, StepCount
from idm_fast.memory.schedule import Schedule
from idm_fast.models.idm import TINY
from idm_fast.ops import registry
from idm_fast.ops.choice import Choice

COMPILED = (PLAIN, FLAT)
"""What torch.compile is tried on: the network as anyone would write it, and ours."""

NHWC = (PLAIN, FLAT_KEPT)
"""What is tried with weights, and so activations, in channels_last: there cuDNN's convolutions need no copies."""


@dataclass(frozen=True)
class Run:
    """One contender: the way to train, what stands behind its ops (None: the automatic choice), whether it is compiled, and
    whether its weights are in channels_last."""

    name: str
    implementation: Choice
    compiled: bool = False
    channels_last: bool = False

    @property
    def label(self) -> str:
        ops = "" if self.name not in (*OURS, PLANNED) else f" ({self.implementation or 'automatic'} ops)"
        return self.name + ops + (", channels_last" if self.channels_last else "") + (", compiled" if self.compiled else "")

    @property
    def is_checked(self) -> bool:
        """Whether gradients in just what is timed are held against the oracle by `_check`; the others are by `_fitting`."""
        return not (self.compiled or self.channels_last or self.name == PLANNED)


@case("How long does a training step take, and how much work is it?", seconds=(240, 2400))
def training_step(context: Context) -> Result:
    """On a GPU full width at 256²; on a CPU a narrow network, and full width at 32²."""
    result, full = context.new_result(), not context.quick
    if context.quick:
        result.notes.append("torch.compile, the planner and, on a CPU, the full width take minutes: they are in the full run.")
    with counters() as submit:
        part = partial(compare, context, result, submit)
        if context.device == "cuda":
            few = (PLAIN, CHECKPOINT, PUBLISHED, LEAN, FLAT_KEPT)
            part("full width", Setting(3, 8, 256), CONTENDERS if full else few, torch.bfloat16, 150 if full else 20, full)
            return result
        few = (PLAIN, PUBLISHED, LEAN, FLAT)
        part("narrow", Setting(2, 2, 64, SMALL), CONTENDERS if full else few, None, 120 if full else 6, full)
        if full:
            part("full width", Setting(3, 1, 32), CONTENDERS, None, 200, False)
    result.attempt("IDM.tiny", lambda: compare_ops(context, result, 60 if full else 6))
    return result


def compare_ops(context: Context, result: Result, seconds: float) -> None:
    """A step of `IDM.tiny` under its default schedule with each implementation behind the ops, in turns."""
    setting, what = Setting(3, 2, 96, TINY), "IDM.tiny"
    tried: list[str | None] = [*implementations(context.device), None]
    if len(tried) < 3:
        return
    step = Step(IDM(steps=setting.steps, **setting.options), setting, context.device, None)

    def under(choice: str | None) -> None:
        with registry.use(choice):
            step()

    under("reference")
    expected = gradients_of(step)
    for choice in tried:
        under(choice)
        context.check(f"{what}: the gradient, {choice or 'automatic'} ops", total_error(gradients_of(step), expected), SINGLE)
    times = take_turns({choice or "automatic": partial(under, choice) for choice in tried}, context.device, seconds, least=3)
    medians = {n: result.samples(f"{what}: {n} ops, {setting}", "s", times[n]).median for n in times}
    rows: list[list[Cell]] = [[n, value, medians["reference"] / value] for n, value in medians.items()]
    note = f"Medians of {len(times['reference'])} turns, {torch.get_num_threads()} threads."
    result.tables.append(Table(f"One training step of {what}: {setting}", ["ops", "s a step", "× eager"], rows, note))


def compare(
    context: Context,
    result: Result,
    submit: Callable[..., Future[Any]],
    what: str,
    setting: Setting,
    names: Sequence[str],
    autocast: torch.dtype | None,
    seconds: float,
    extras: bool,
) -> None:
    """Time the ways called `names` at `setting`, for about `seconds`.

    With `extras` a planned one and compiled ones too, and ours with every implementation of the ops; without, the references
    are left out where there are other implementations, and on a CPU all but the automatic choice.
    """
    ops: list[Choice] = [*choices(context)]
    chosen = ours_on(context)
    if len(ops) > 1:
        ops = [*(ops if extras else ops[1:] if context.device == "cuda" else []), None]
    runs = [Run(name, choice) for name in names for choice in (ops if name in OURS else ["reference"])]
    runs = [run for run in runs if result.attempt(f"{what}, {run.label}", lambda run=run: _check(context, run, autocast))]
    # One count serves all runs whose ops are the same to the counter.
    keys = {run: (run.name, references(context.device, run.implementation)) for run in runs}
    pending = {key: submit(count, key[0], setting, autocast, key[1]) for key in dict.fromkeys(keys.values())}
    found = {key: result.attempt(f"{what}, {key[0]}, counted", future.result) for key, future in pending.items()}
    counts: dict[Run, StepCount | None] = {run: found[key] for run, key in keys.items()}
    plan: Schedule | None = None
    published = counts.get(Run(PUBLISHED, "reference"))
    if extras and published is not None:
        planned = result.attempt(PLANNED, lambda: submit(plan_for, setting, published.peak_bytes, autocast).result())
        if planned is not None:
            runs.append(Run(PLANNED, chosen))
            plan, counts[runs[-1]] = planned

    def chosen_for(name: str) -> Choice:
        return chosen if name in OURS else "reference"

    if context.device == "cuda":
        runs += [Run(name, chosen_for(name), channels_last=True) for name in NHWC if name in names]
    if extras:
        runs += [Run(name, chosen_for(name), compiled=True) for name in COMPILED if name in names]
    steps = _steps(context, result, what, setting, runs, autocast, plan)
    functions = {run.label: step for run, (step, _) in steps.items()}
    times = take_turns(functions, context.device, seconds, least=3, failed=result.failed_at(f"{what}, timing"))
    batches = {run: batch for run, (_, batch) in steps.items() if run.label in times}
    for run, batch in batches.items():
        result.samples(f"{what}: {run.label}, {setting.with_(batch=batch)}", "s", times[run.label])
    _report(result, what, setting, {run: median(times[run.label]) for run in batches}, batches, counts)


def _check(context: Context, run: Run, autocast: torch.dtype | None) -> bool:
    check_gradients(context, run.name)
    check_in_use(context, run.name, run.implementation, autocast)
    return True


def _steps(
    context: Context,
    result: Result,
    what: str,
    setting: Setting,
    runs: Sequence[Run],
    autocast: torch.dtype | None,
    plan: Schedule | None,
) -> dict[Run, tuple[Callable[[], None], int]]:
    """What runs one step of every contender, and its batch: halved until it fits. All share one set of weights."""
    with torch.device(context.device):
        model = IDM(steps=setting.steps, **setting.options)
    found: dict[Run, tuple[Callable[[], None], int]] = {}
    for run in runs:
        ready = result.attempt(f"{what}, {run.label}", lambda run=run: _fitting(context, run, model, setting, autocast, plan))
        if ready is not None:
            found[run] = ready
            if ready[1] < setting.batch:
                result.notes.append(f"{run.label}: batch {ready[1]}; {setting.batch} take more memory than there is.")
    return found


def _fitting(
    context: Context, run: Run, model: IDM, setting: Setting, autocast: torch.dtype | None, plan: Schedule | None
) -> tuple[Callable[[], None], int]:
    own = run.compiled or run.channels_last
    network = _own_network(run, model, setting) if own else train_by(run.name, model, plan)
    batch = setting.batch
    while True:
        step = Step(network, setting.with_(batch=batch), context.device, autocast)

        def once(step: Step = step) -> None:
            with registry.use(run.implementation):
                step()

        if _has_memory_for(once, last=batch == 1):
            break
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()
    if not run.is_checked:
        twin = train_by(LEAN if run.name == PLANNED else run.name, model)
        plain = Step(twin, setting.with_(batch=batch), context.device, autocast)
        found = gradients_of(step)
        with registry.use(run.implementation):
            plain()
        error = total_error(found, gradients_of(plain))
        context.check(f"the gradient by {run.label}", error, allowed_error(context.device, autocast))
    return once, batch


def _has_memory_for(step: Callable[[], None], last: bool) -> bool:
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        if last:
            raise
        return False
    return True


def _own_network(run: Run, model: IDM, setting: Setting) -> nn.Module:
    """A network of its own with the weights of `model`; one to be compiled is so at its first call."""
    own = IDM(steps=setting.steps, **setting.options)
    own.load_state_dict(model.state_dict())
    if run.channels_last:
        own.to(memory_format=torch.channels_last)
    if run.name in OURS:
        own.set_schedule(*OURS[run.name])
    network = own if run.name in OURS else train_by(run.name, own)
    if run.compiled:
        network.compile()
    return network


def _report(
    result: Result,
    what: str,
    setting: Setting,
    seconds: dict[Run, float],
    batches: dict[Run, int],
    counts: dict[Run, StepCount | None],
) -> None:
    rows: list[list[Cell]] = []
    per_image = {run: value / batches[run] for run, value in seconds.items()}
    for run, value in seconds.items():
        row: list[Cell] = [run.label, batches[run], value, per_image[run]]
        found = counts.get(run)
        if found is None:
            rows.append([*row, "", "", ""])
            continue
        rows.append([*row, found.flop / 1e9, found.launches, found.peak_bytes / GIB])
        result.count(f"{what}: FLOP, {run.label}, {setting}", "FLOP", found.flop)
        result.count(f"{what}: launches, {run.label}, {setting}", "launches", found.launches)
    columns = ["", "batch", "s a step", "s an image", "GFLOP", "launches", "peak (GiB)"]
    note = f"Medians. GFLOP, launches and peak are counted at batch {setting.batch}."
    result.tables.append(Table(f"One training step, {what}: {setting}", columns, rows, note))
    theirs = per_image.get(Run(PUBLISHED, "reference"))
    ours = {run: value for run, value in per_image.items() if run.name in (*OURS, PLANNED)}
    if not (theirs and ours):
        return
    best = min(ours, key=lambda run: ours[run])
    plain = Run(PLAIN, "reference", channels_last=best.channels_last)  # what the format gives is not ours
    if plain not in per_image:
        return
    title = (
        f"{best.label}: {ours[best] / theirs:.2f} times the published training's time, "
        f"{ours[best] / per_image[plain]:.2f} times that of {plain.label} ({what}, {setting})"
    )
    bars: dict[str, list[tuple[Cell, float]]] = {run.label: [(what, value)] for run, value in per_image.items()}
    result.plots.append(Plot(title, "", "seconds per image, forward and backward", bars, PLAIN, bars=True))
