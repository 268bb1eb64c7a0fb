"""The planner's arithmetic against exact counts and against real training steps, and what its user sees."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from idm_fast import IDM, BlockCompressedSensing
from idm_fast.cli import main
from idm_fast.memory import planner as planner_module
from idm_fast.memory.count import GIB, StepCount, count_step, count_training_step
from idm_fast.memory.planner import AGAIN, KINDS, LEANEST, Choice, Plan, Planner, compose, options_of, parse_bytes, written
from idm_fast.memory.schedule import STORED_STEP
from idm_fast.models import idm
from idm_fast.ops import registry
from idm_fast.outputs import InputError

OPTIONS = {"widths": (16, 32), "heads": 2, "norm_groups": 4, "attention": (False, True)}
BATCH, SIZE, STEPS = 4, 64, 2
TINY = ["plan", "--model", "tiny", "--batch", "1", "--size", "32", "--steps", "1", "--mixed_precision", "no"]


@pytest.fixture(scope="module", autouse=True)
def _each_step_counted_once() -> Iterator[None]:
    """A count takes about a second, and these tests want many of them twice."""
    counts: dict[Any, StepCount] = {}

    def count(make_model: Callable[[], IDM], batch: int, size: int | tuple[int, int], *setting: Any, threads: int) -> StepCount:
        with torch.device("meta"):
            model = make_model()
        sides = size if isinstance(size, tuple) else (size, size)
        key = (str(options_of(model)), model.plan, batch, sides, setting, threads)
        if key not in counts:
            counts[key] = count_training_step(make_model, batch, size, *setting, threads=threads)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "count_training_step", count)
        yield


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


def composed(planner: Planner, *names: str) -> tuple[Choice, StepCount]:
    """A choice of kinds of steps by their names, and its exact count."""
    costs, shared = planner.costs()
    kinds = {cost.name: cost for cost in costs}
    choice = compose([kinds[name] for name in names], shared)
    return choice, planner.exactly(choice.schedule)


@pytest.mark.slow
def test_composed_peaks_and_flop_are_those_of_the_whole_within_2_percent(planner: Planner) -> None:
    """What is left is a few images, single numbers, and whatever a step's gradients overlap with."""
    choice, exact = composed(planner, AGAIN + "inverted, attention kept", "low resolution stored")
    assert choice.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.02)
    assert choice.flop == pytest.approx(exact.flop, rel=0.002)


def test_composed_launches_are_off_by_the_same_number_for_every_schedule(planner: Planner, middle: Plan) -> None:
    """So that they order schedules of as many steps rightly, which is all that they are for."""
    choice, exact = composed(planner, AGAIN + "inverted, attention kept", "low resolution stored")
    assert choice.schedule != middle.schedule
    assert exact.launches - choice.launches == middle.count.launches - middle.choice.launches != 0


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


def test_a_budget_is_planned_for_the_implementations_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch holds more than kernels, which allocate what they return."""
    asked: list[tuple[str, ...]] = []

    class Stored:
        """In the place of a planner."""

        def __init__(self, *args: Any, as_reference: tuple[str, ...], **options: Any) -> None:
            asked.append(as_reference)

        def plan(self, steps: int, budget: int) -> SimpleNamespace:
            return SimpleNamespace(schedule=(STORED_STEP,) * steps, choice="stored", count=0)

    monkeypatch.setattr(idm, "Planner", Stored)
    model, physics = IDM.tiny(1, memory_budget="1GiB"), BlockCompressedSensing((32, 32), 0.1)
    for choice in (None, "reference"):
        with registry.use(choice):
            loss_of(model, torch.rand(1, 1, 32, 32), physics)
    automatic = tuple(name for name, op in registry.OPS.items() if op.choose_by(None, "cpu") == "reference")
    assert asked == [automatic, tuple(registry.OPS)]
    kernels, plain = (Planner(narrow, BATCH, SIZE, autocast=None, as_reference=names) for names in ((), registry.OPS))
    assert kernels.exactly(kernels.leanest(1)).peak_bytes < plain.exactly(plain.leanest(1)).peak_bytes


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


def leanest_peak(batch: int = 1, size: int = 32, steps: int = 1) -> int:
    planner = Planner(IDM.tiny, batch, size, autocast=None)
    return planner.exactly(planner.leanest(steps)).peak_bytes


@pytest.mark.parametrize(("what", "largest", "before"), [("batch", 3, 2), ("size", 96, 64), ("steps", 5, 4)])
def test_command_names_the_largest_that_fits(what: str, largest: int, before: int, capsys) -> None:
    """To the byte; for T, which is extrapolated from 2 and 3, too."""
    budget = leanest_peak(**{what: largest})
    for amount, answer in ((budget, largest), (budget - 1, before)):
        assert main([*TINY, "--budget", f"{amount}B", "--largest", what]) == 0
        assert f"largest {what} that fits: {answer}\n" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["batch", "size", "steps"])
def test_nothing_is_the_largest_where_one_does_not_fit(what: str, capsys) -> None:
    assert main([*TINY, "--budget", f"{leanest_peak() - 1}B", "--largest", what]) == 2
    assert f"at least {written(leanest_peak())}" in capsys.readouterr().err


def test_command_prints_the_choices_and_draws_them(tmp_path, capsys) -> None:
    picture = tmp_path / "plan.png"
    assert main([*TINY, "--budget", "1GiB", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^>\* .* 1× \(stored\)$", printed, re.MULTILINE) and "Adam" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*TINY, "--budget", "12 parsecs"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_card_is_a_budget_and_four_float32_numbers_a_parameter(capsys) -> None:
    state = 4 * 4 * sum(p.numel() for p in IDM.tiny(1).parameters())
    printed = []
    for amount in (["--budget", "1MiB"], ["--card", f"{state + 2**20}B"]):
        assert main([*TINY, *amount]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "budget 1.000MiB" in printed[0]
    assert main([*TINY, "--card", f"{state}B"]) == 2
    assert f"Adam states alone take {written(state)}" in capsys.readouterr().err


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
