"""The planner's arithmetic against exact counts and against real training steps, and what its user sees."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from idm_fast import IDM, BlockCompressedSensing
from idm_fast.cli import main
from idm_fast.memory.count import GIB, count_step
from idm_fast.memory.planner import KINDS, LEANEST, Plan, Planner, compose, parse_bytes
from idm_fast.memory.schedule import STORED_STEP
from idm_fast.outputs import InputError

OPTIONS = {"widths": (16, 32), "heads": 2, "norm_groups": 4, "attention": (False, True)}
BATCH, SIZE, STEPS = 4, 64, 2


def narrow(steps: int = STEPS, **options) -> IDM:
    return IDM(steps=steps, **OPTIONS, **options)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(narrow, BATCH, SIZE, autocast=None)


@pytest.fixture(scope="module")
def middle(planner: Planner) -> Plan:
    """A plan for a budget between the leanest and the most generous."""
    front = planner.candidates(STEPS)
    return planner.plan(STEPS, (front[0].peak_bytes + front[-1].peak_bytes) // 3)


def loss_of(model: IDM, x: torch.Tensor, physics: BlockCompressedSensing) -> torch.Tensor:
    return (model(physics.A(x), physics) - x).abs().mean()


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_bytes("12GiB") == parse_bytes(" 12 gib ") == 12 * GIB
    assert parse_bytes("1.5MiB") == 3 * 2**19 and parse_bytes("24GB") == 24 * 10**9 and parse_bytes(7) == 7
    for wrong in ("12 parsecs", "", "-1GiB", "0GiB"):
        with pytest.raises(InputError, match="12GiB"):
            parse_bytes(wrong)


def test_composed_peaks_and_flop_are_those_of_the_whole_within_2_percent(planner: Planner) -> None:
    """What is left is a few images, single numbers, and whatever a step's gradients overlap with."""
    costs, shared = planner.costs()
    kinds = {cost.name: cost for cost in costs}
    choice = compose([kinds[name] for name in ("run again, then inverted, attention kept", "low resolution stored")], shared)
    exact = planner.exactly(choice.schedule)
    assert choice.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.02)
    assert choice.flop == pytest.approx(exact.flop, rel=0.002)


def test_front_trades_memory_for_flop(planner: Planner) -> None:
    front = planner.candidates(STEPS)
    assert all(a.peak_bytes < b.peak_bytes and a.flop > b.flop for a, b in pairwise(front))
    assert front[-1].schedule == (STORED_STEP,) * STEPS
    assert any(len(set(choice.schedule)) > 1 for choice in front)


def test_plan_fits_and_nothing_cheaper_on_the_front_is_predicted_to(planner: Planner, middle: Plan) -> None:
    front = planner.candidates(STEPS)
    budget = (front[0].peak_bytes + front[-1].peak_bytes) // 3
    assert middle.count.peak_bytes <= budget
    assert all(choice.peak_bytes > 0.98 * budget for choice in front if choice.flop < middle.choice.flop)


def test_budget_that_cannot_be_met_names_the_smallest_that_can(planner: Planner) -> None:
    with pytest.raises(InputError, match="lower the batch") as error:
        planner.plan(STEPS, 2**16)
    smallest = re.search(r"at least (\S+) for", str(error.value))
    assert smallest is not None
    assert planner.plan(STEPS, parse_bytes(smallest[1])).count.peak_bytes > 0.999 * parse_bytes(smallest[1])


def test_real_step_costs_what_the_plan_predicts(middle: Plan) -> None:
    model, physics = narrow(), BlockCompressedSensing((SIZE, SIZE), 0.1)
    model.plan = middle.schedule
    x = torch.rand(BATCH, 1, SIZE, SIZE)
    real = count_step(lambda: loss_of(model, x, physics), model.parameters(), [x, *physics.buffers()])
    predicted = middle.count
    assert (real.peak_bytes, real.held_bytes, real.flop) == (predicted.peak_bytes, predicted.held_bytes, predicted.flop)


def test_model_with_a_budget_plans_once_in_training_and_draws_no_random_numbers(caplog) -> None:
    model, physics = IDM.tiny(1, memory_budget="1GiB"), BlockCompressedSensing((32, 32), 0.1)
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        loss_of(model, x, physics)
    assert model.schedule == "two_level"
    random_state = torch.get_rng_state()
    with caplog.at_level("INFO"):
        for _ in range(2):
            loss_of(model, x, physics).backward()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.plan == (STORED_STEP,)
    assert len([record for record in caplog.records if "stored" in record.getMessage()]) == 1


def test_mixed_plan_gives_the_gradients_of_plain_autograd() -> None:
    torch.manual_seed(0)
    model, physics = narrow(2).double(), BlockCompressedSensing((32, 32), 0.1).double()
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    gradients = []
    for kinds in (("stored", "stored"), (LEANEST, "low resolution stored")):
        model.plan = tuple(KINDS[name] for name in kinds)
        gradients.append(torch.autograd.grad(loss_of(model, x, physics), list(model.parameters()), allow_unused=True))
    for stored, mixed in zip(*gradients, strict=True):
        if stored is not None:
            torch.testing.assert_close(mixed, stored, rtol=1e-9, atol=1e-9)


def test_largest_batch_fits_and_one_more_does_not() -> None:
    def peak(batch: int) -> int:
        planner = Planner(IDM.tiny, batch, 32, autocast=None)
        return planner.exactly(planner.leanest(1)).peak_bytes

    budget = peak(5) + 1
    assert Planner(IDM.tiny, 1, 32, autocast=None).largest("batch", 1, budget) == 5
    assert peak(6) > budget


def test_command_prints_the_choices_and_draws_them(tmp_path, capsys) -> None:
    picture = tmp_path / "plan.png"
    tiny = ["plan", "--model", "tiny", "--batch", "1", "--size", "32", "--steps", "1"]
    assert main([*tiny, "--budget", "1GiB", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^>\* .* 1× \(stored\)$", printed, re.MULTILINE) and "Adam" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*tiny, "--budget", "12 parsecs"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_full_size_is_planned_with_nine_counts_and_as_design_says() -> None:
    """A count takes one to three seconds; time itself is no test on a machine that does other work."""
    counts: list[None] = []
    planner = Planner(lambda steps: IDM(steps=steps), 8, 256, on_count=lambda: counts.append(None))
    plan = planner.plan(3, 12 * GIB)
    assert len(counts) == Planner.counts == 9
    assert plan.count.flop <= 320e12 and plan.count.peak_bytes <= 12 * GIB
    lean = planner.plan(3, int(3.5 * GIB))
    assert lean.schedule == planner.leanest(3)
