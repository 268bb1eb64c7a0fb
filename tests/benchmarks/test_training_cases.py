"""The cases memory, training_step and scaling: what they make of counts that are known, and one run of each in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from benchmarks.case import Context, NotHere, Result, Table
from benchmarks.cases import memory, scaling, training_step
from benchmarks.cases.memory import OnGpu
from benchmarks.contenders import CHECKPOINT, FLAT, FLAT_KEPT, LEAN, PLAIN, PUBLISHED, Setting, Step
from idm_fast.memory.count import GIB, StepCount

CONTEXT = Context("cpu", True)
NARROW = {"widths": (16, 32), "heads": 2, "norm_groups": 4, "attention": (False, False)}
PER_STEP = {PLAIN: 10, CHECKPOINT: 4, PUBLISHED: 0, LEAN: 0, FLAT: 1, FLAT_KEPT: 2}
ALWAYS = {PLAIN: 0, CHECKPOINT: 1, PUBLISHED: 2, LEAN: 1, FLAT: 1, FLAT_KEPT: 1}


def known_count(name: str, setting: Setting, *how: Any, **more: Any) -> StepCount:
    """GiB: `PER_STEP` a step and `ALWAYS`, at batch 8 and 256²."""
    gib = (PER_STEP[name] * setting.steps + ALWAYS[name]) * setting.batch / 8 * (setting.size / 256) ** 2
    peak = int(gib * GIB)
    return StepCount(peak, held_bytes=0, peak_with_gradients=peak, flop=10**12, launches=100, calls={})


@contextmanager
def in_this_process() -> Iterator[Callable[..., Future[Any]]]:
    """What `counters` is, without other processes."""

    def submit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future

    yield submit


@pytest.fixture(autouse=True)
def known_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (memory, training_step, scaling):
        monkeypatch.setattr(case, "count", known_count)
    monkeypatch.setattr(memory, "counters", in_this_process)


def table(result: Result, title: str) -> Table:
    return next(table for table in result.tables if table.title.startswith(title))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr(memory, "check_gradients", lambda context, name: 0.0)
    base = Setting(3, 8, 256)
    return memory.compare(CONTEXT, base, (1, 2, 3), base.with_(steps=2), (1, 8), (128, 256), (PLAIN, PUBLISHED, LEAN))


def test_memory_extends_a_straight_line_to_ten_steps(report: Result) -> None:
    peaks = {row[0]: row[1:] for row in table(report, "Peak activations against T").rows}
    assert peaks[PLAIN] == [10, 20, 30, 100]
    assert peaks[FLAT] == [2, 3, 4, 11]
    assert "T = 10 is extrapolated" in table(report, "Peak activations against T").note


def test_memory_says_where_the_published_schedule_saves_what_the_paper_says(report: Result) -> None:
    # 1 − 2/(10·T) reaches 0.938 at T = 4 (95.0 %), 1 − 1/(10·T) at T = 2 (95.0 %).
    (answer,) = (note for note in report.notes if note.startswith("Which setting"))
    assert "published schedule does so from T = 4 on (95.0% there)" in answer
    assert "saves 97.5% at that T, and saves that much from T = 2 on" in answer


def test_memory_titles_are_computed(report: Result) -> None:
    titles = [plot.title for plot in report.plots]
    assert titles[0] == "T = 10 would take 100 GiB with plain autograd, 1 GiB with two_level (batch 8, 256²)"
    assert titles[1].startswith("two_level saves 95 % of plain autograd's memory at every batch")
    assert all(plot.baseline == PLAIN for plot in report.plots)


def test_a_way_to_train_with_wrong_gradients_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(context: Context, name: str) -> float:
        context.check(name, float(name == LEAN), 0.5)
        return 0.0

    monkeypatch.setattr(memory, "check_gradients", check)
    result = memory.compare(CONTEXT, Setting(), (1, 2, 3), Setting(), (1, 8), (128, 256), (PLAIN, LEAN))
    assert result.failures == [f"{LEAN}: WrongResult: {LEAN} is off by 1, allowed are 0.5: not timed"]
    assert not any(LEAN in str(row) for table in result.tables for row in table.rows)


def test_training_steps_are_timed_and_the_fastest_of_ours_is_compared() -> None:
    result = Result()
    setting = Setting(1, 1, 32, NARROW)
    with in_this_process() as submit:
        training_step.compare(CONTEXT, result, submit, "narrow", setting, (PLAIN, PUBLISHED, LEAN), None, 0.0, extras=False)
    assert not result.failures
    times = {m.name: m for m in result.measurements if m.unit == "s"}
    assert f"narrow: {LEAN} (automatic ops), {setting}" in times or f"narrow: {LEAN} (reference ops), {setting}" in times
    assert all(len(m.samples) == 3 and m.median > 0 for m in times.values())
    labels = [row[0] for row in result.tables[0].rows]
    assert labels[:2] == [PLAIN, PUBLISHED] and all(str(label).startswith(LEAN) for label in labels[2:])
    assert result.plots[0].title.startswith(LEAN) and result.plots[0].baseline == PLAIN


def test_scaling_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    result, base = Result(), Setting(1, 1, 32, NARROW)
    settings = {size: base.with_(size=size) for size in (32, 64)}
    names = (PLAIN, PUBLISHED, LEAN)
    counts: dict[tuple[str, int], StepCount | None] = {(n, v): known_count(n, s) for v, s in settings.items() for n in names}
    counts[PLAIN, 64] = None
    times = scaling.step_times(CONTEXT, result, settings, names, counts, None, 0.0)
    assert set(times) == set(counts) - {(PLAIN, 64)}
    scaling.report(result, "size", "cpu", base, (32, 64), names, times, {key: found for key, found in counts.items() if found})
    assert table(result, "Time").rows[0][1:] == [times[PLAIN, 32], "not counted"]
    assert result.plots[1].title.startswith("At 64² the published training needs 2.00 times the memory of two_level")


def test_a_timing_that_fails_leaves_the_rest_of_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    result, base = Result(), Setting(1, 1, 32, NARROW)
    settings = {size: base.with_(size=size) for size in (32, 64)}
    counts = {(LEAN, size): known_count(LEAN, setting) for size, setting in settings.items()}

    def with_ops(choice: str | None, step: Step) -> Callable[[], None]:
        calls = count()

        def once() -> None:
            if next(calls) == 2 and step.x.shape[-1] == 32:
                raise torch.OutOfMemoryError("out of memory")
            step()

        return once

    monkeypatch.setattr(scaling, "with_ops", with_ops)
    assert set(scaling.step_times(CONTEXT, result, settings, (LEAN,), counts, None, 0.0)) == {(LEAN, 64)}
    assert result.failures == [f"{settings[32]}, timing, {LEAN}: OutOfMemoryError: out of memory"]


def test_what_channels_last_gives_is_not_said_to_be_ours() -> None:
    result, Run = Result(), training_step.Run
    plain, ours = Run(PLAIN, "reference"), Run(FLAT_KEPT, "cuda")
    seconds = {plain: 4.0, replace(plain, channels_last=True): 2.0, Run(PUBLISHED, "reference"): 8.0, ours: 3.0}
    seconds[replace(ours, channels_last=True)] = 1.0
    training_step._report(result, "full width", Setting(), seconds, dict.fromkeys(seconds, 8), {})
    title = result.plots[0].title
    assert "0.12 times the published" in title and f"0.50 times that of {PLAIN}, channels_last" in title


def test_scaling_says_which_sizes_a_cpu_does_not_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LARGEST_TIMED_ON_CPU", 32)
    result, base = Result(), Setting(1, 1, 32, NARROW)
    settings = {size: base.with_(size=size) for size in (32, 64)}
    counts = {(LEAN, size): known_count(LEAN, setting) for size, setting in settings.items()}
    times = scaling.step_times(CONTEXT, result, settings, (LEAN,), counts, None, 0.0)
    assert set(times) == {(LEAN, 32)}
    scaling.report(result, "size", "cpu", base, (32, 64), (LEAN,), times, counts)
    assert table(result, "Time").rows[0][1:] == [times[LEAN, 32], "not timed"]
    assert table(result, "Peak").rows[0][-1] > 0


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are enough GPUs")
def test_one_gpu_is_too_few_for_two_processes() -> None:
    with pytest.raises(NotHere, match="2 GPUs"):
        scaling.processes(Context("cuda", True), Result(), Setting(), None, 1.0)


@pytest.mark.slow
def test_two_processes_train_one_network() -> None:
    result = Result()
    scaling.processes(CONTEXT, result, Setting(1, 1, 32, NARROW), None, 0.2)
    assert [row[0] for row in table(result, "DistributedDataParallel").rows] == [1, 2]
    assert all(sample > 0 for m in result.measurements for sample in m.samples)


def test_memory_on_a_gpu_is_measured_where_plain_autograd_fits_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Setting(3, 8, 256)
    # Plain autograd takes 30 GiB at batch 8 by `known_count`, 15 at 4.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (25 * GIB, 25 * GIB))
    assert memory._settings_on_gpu(Context("cuda", True), base) == [base.with_(batch=4)]
    assert memory._settings_on_gpu(Context("cuda", False), base) == [base.with_(batch=4), base]
    monkeypatch.setattr(memory, "peak_on_gpu", lambda run: int(1.02 * known_count(run.name, run.setting).peak_bytes))
    result, runs = Result(), [OnGpu(PLAIN, base, "reference"), OnGpu(LEAN, base, "triton")]
    memory._measured(result, {run: known_count(run.name, run.setting) for run in runs})
    plain, lean = result.tables[0].rows
    assert (plain[0], lean[0]) == (PLAIN, f"{LEAN} (triton ops)")
    assert plain[-2:] == ["does not fit", ""] and lean[-1] == "+2.0%"
    assert "is 2.0%" in result.tables[0].note
