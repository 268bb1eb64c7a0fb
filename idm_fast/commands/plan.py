"""`idm-fast plan`: which schedules a training step has, what each costs, and which one fits a budget. Nothing is run."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from idm_fast.memory.count import GIB
from idm_fast.memory.planner import Choice, Plan, Planner, parse_bytes, written
from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError, write_atomically

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE_TENSORS = 4
"""A parameter, its gradient and Adam's two moments, all float32."""


def run(arguments: argparse.Namespace) -> None:
    """Counts, then prints (and plots). Raises InputError."""
    if arguments.size % 32:
        raise InputError(f"--size {arguments.size}: expected a multiple of 32, the side of a sensing block")
    make_model = IDM.tiny if arguments.model == "tiny" else IDM
    with FakeTensorMode():
        state = _state_bytes(make_model(steps=arguments.steps))
    budget = _budget(arguments, state)
    if arguments.plot is not None:
        _require_matplotlib(arguments.plot)
    with tqdm(total=Planner.counts, desc="count", unit="schedule", disable=None, leave=False) as progress:
        planner = Planner(
            lambda steps: make_model(steps=steps),
            arguments.batch,
            arguments.size,
            autocast=AUTOCAST[arguments.mixed_precision],
            on_count=progress.update,
        )
        if arguments.largest is not None:
            progress.total = None
            largest = planner.largest(arguments.largest, arguments.steps, budget)
            tqdm.write(f"{_budget_line(budget, state)}\nlargest {arguments.largest} that fits: {largest:,}")
            return
        plan = planner.plan(arguments.steps, budget)
    print(f"{_budget_line(budget, state)}\n")
    print("\n".join(_table(plan, budget)))
    print(
        f"\nchosen, counted as a whole: peak {written(plan.count.peak_bytes)}, after forward {written(plan.count.held_bytes)}, "
        f"{plan.count.flop / 1e12:.3f} TFLOP, {plan.count.launches:,} launches\n  first to last step: {plan.choice}"
    )
    if arguments.plot is not None:
        _plot(plan, budget, arguments.plot)
        print(f"written: {arguments.plot}")


def _state_bytes(model: torch.nn.Module) -> int:
    return STATE_TENSORS * sum(p.numel() * p.element_size() for p in model.parameters())


def _budget(arguments: argparse.Namespace, state: int) -> int:
    if arguments.budget is not None:
        return parse_bytes(arguments.budget)
    card = parse_bytes(arguments.card)
    if card <= state:
        raise InputError(f"--card {arguments.card}: parameters, gradients and Adam states alone take {written(state)}")
    return card - state


def _budget_line(budget: int, state: int) -> str:
    return (
        f"budget {written(budget)} for activations; parameters, gradients and Adam states take {written(state)} besides, "
        f"{written(budget + state)} together"
    )


def _table(plan: Plan, budget: int) -> list[str]:
    """The kinds of uniform schedules, and the front (*): no other choice has both less memory and fewer FLOP."""
    lines = [f"   {'memory':>11} {'TFLOP':>9}  schedule, first to last step (*: on the Pareto front)"]
    rows = {choice.schedule: (choice, "*") for choice in plan.candidates}
    rows = {choice.schedule: (choice, " ") for choice in plan.uniform} | rows
    for choice, mark in sorted(rows.values(), key=lambda row: row[0].peak_bytes):
        arrow = ">" if choice is plan.choice else " "
        over = "  (over budget)" if choice.peak_bytes > budget and choice is not plan.choice else ""
        lines.append(f"{arrow}{mark} {written(choice.peak_bytes):>11} {choice.flop / 1e12:9.3f}  {choice}{over}")
    return lines


def _require_matplotlib(path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from error
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: the folder {path.parent} does not exist")


def _plot(plan: Plan, budget: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()

    def points(choices: Sequence[Choice]) -> tuple[list[float], list[float]]:
        return [c.peak_bytes / GIB for c in choices], [c.flop / 1e12 for c in choices]

    axes.plot(*points(plan.uniform), "x", color="gray", label="the same for every step")
    axes.plot(*points(plan.candidates), "o-", markersize=4, drawstyle="steps-post", label="Pareto front")
    axes.plot(*points([plan.choice]), "*", markersize=15, label="chosen")
    axes.axvline(budget / GIB, linestyle="--", color="black", label="budget")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="peak activations (GiB)", ylabel="TFLOP a training step")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, lambda file: file.write(picture.getvalue()))
