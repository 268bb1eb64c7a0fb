"""A step's predicted peak against a real one: on a CPU by the same counter, on a GPU by the allocator."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory_against_prediction import SCHEDULES, SETTINGS, compare
from idm_fast import ops
from idm_fast.ops import registry


def test_real_step_on_a_cpu_takes_what_was_predicted_to_the_byte() -> None:
    kept = {"flat, attention kept": SCHEDULES["flat, attention kept"]}
    (row,) = compare(SETTINGS["cpu"], torch.device("cpu"), kept)
    assert row.measured == row.predicted.peak_with_gradients > row.predicted.peak_bytes
    assert row.error == 0


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gpu_allocator_agrees_with_the_prediction_within_3_percent(schedule: str, implementation: str) -> None:
    if reason := registry.load(implementation):
        pytest.skip(reason)
    with ops.use(implementation):
        (row,) = compare(SETTINGS["cuda"], torch.device("cuda"), {schedule: SCHEDULES[schedule]})
    assert abs(row.error) <= 0.03, row
