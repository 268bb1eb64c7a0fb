"""The regression check on synthetic samples, with and without a regression."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.__main__ import main
from benchmarks.case import Measurement, Result

FLOP = Measurement("flop", "FLOP", [1000], exact=True)


def times(median: float, spread: float, seed: int, better: str = "lower", number: int = 40) -> Measurement:
    """Samples whose quartiles lie about 0.67·spread from the median."""
    noise = random.Random(seed)
    return Measurement("step", "s", [noise.gauss(median, spread) for _ in range(number)], better)


def once(value: float, unit: str = "s", better: str = "lower") -> Measurement:
    return Measurement("figure", unit, [value], better)


def write(
    folder: Path,
    result: Result,
    device_name: str = "a processor",
    threads: int = 2,
    quick: bool = True,
    case: str = "training_step",
) -> Path:
    folder.mkdir(exist_ok=True)
    data = {"case": case, "quick": quick, "machine": {"device_name": device_name, "threads": threads}}
    (folder / f"{case}.json").write_text(json.dumps(data | {"result": result.as_json()}))
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_two_runs_of_the_same_are_the_same(seed: int) -> None:
    assert compare.judge(times(1.0, 0.05, seed), times(1.0, 0.05, 100 + seed)) == "same"


@pytest.mark.parametrize("number", [compare.ENOUGH, 40])
@pytest.mark.parametrize("seed", range(20))
def test_a_slower_run_outside_of_both_spreads_is_worse(seed: int, number: int) -> None:
    fast, slow = times(1.0, 0.05, seed, number=number), times(1.3, 0.05, 100 + seed, number=number)
    assert compare.judge(fast, slow) == "worse"
    assert compare.judge(slow, fast) == "better"


def test_a_slower_run_inside_of_the_spread_is_the_same() -> None:
    assert compare.judge(times(1.0, 0.5, 1), times(1.2, 0.5, 2)) == "same"


def test_less_is_worse_where_more_is_better() -> None:
    assert compare.judge(times(30.0, 0.1, 1, "higher"), times(25.0, 0.1, 2, "higher")) == "worse"
    assert compare.judge(times(30.0, 0.1, 1, "higher"), times(35.0, 0.1, 2, "higher")) == "better"


@pytest.mark.parametrize(("number", "most"), [(2, 0.09), (3, 0.02), (5, 0.01)])
def test_few_samples_of_the_same_rarely_differ(number: int, most: float) -> None:
    # Quartiles alone are disjoint in 2/6 of all runs with two samples, in 2/20 and more with three
    runs = [compare.judge(times(1.0, 0.1, k, number=number), times(1.0, 0.1, 10**6 + k, number=number)) for k in range(2000)]
    assert 1 - runs.count("same") / len(runs) < most


@pytest.mark.parametrize("number", [2, 3, 7])
def test_few_samples_that_are_far_slower_are_worse(number: int) -> None:
    fast, slow = times(1.0, 0.01, 1, number=number), times(1.2, 0.01, 2, number=number)
    assert compare.judge(fast, slow) == "worse"
    assert compare.judge(slow, fast) == "better"


def test_few_samples_must_leave_the_ranges_5_percent_and_the_wider_range_behind() -> None:
    before = Measurement("step", "s", [1.0, 1.01, 1.02])
    for samples, verdict in {
        (1.04, 1.05, 1.06): "same",  # disjoint, 4 %
        (1.02, 1.09, 1.10): "same",  # 8 %, ranges touch
        (1.05, 1.10, 1.20): "same",  # disjoint, 9 %, within a range of 15 %
        (1.07, 1.08, 1.09): "worse",
    }.items():
        assert compare.judge(before, Measurement("step", "s", list(samples))) == verdict


def test_an_exact_figure_is_worse_as_soon_as_it_grows() -> None:
    assert compare.judge(FLOP, Measurement("flop", "FLOP", [1001], exact=True)) == "worse"
    assert compare.judge(FLOP, Measurement("flop", "FLOP", [999], exact=True)) == "better"
    assert compare.judge(FLOP, FLOP) == "same"


ONCE = [("s", 1.0, 1.09, 1.12), ("bytes", 1e9, 1.04e9, 1.06e9), ("dB", 30.0, 29.985, 29.975), ("dB", 0.005, -0.01, -0.02)]
ONCE += [("1", 0.8, 0.7995, 0.7985)]


@pytest.mark.parametrize(("unit", "before", "near", "far"), ONCE)
def test_what_was_measured_once_may_move_a_little(unit: str, before: float, near: float, far: float) -> None:
    better = "higher" if far < before else "lower"
    assert compare.judge(once(before, unit, better), once(near, unit, better)) == "same"
    assert compare.judge(once(before, unit, better), once(far, unit, better)) == "worse"
    assert compare.judge(once(far, unit, better), once(before, unit, better)) == "better"


def test_one_sample_against_several_is_judged_as_one() -> None:
    assert compare.judge(once(1.0), Measurement("figure", "s", [1.08, 1.09, 1.09])) == "same"
    assert compare.judge(once(1.0), Measurement("figure", "s", [1.18, 1.19, 1.19])) == "worse"


def test_what_is_no_longer_a_number_is_worse() -> None:
    assert compare.judge(once(30.0, "dB", "higher"), once(float("nan"), "dB", "higher")) == "worse"


def test_a_figure_without_a_better_side_never_regresses() -> None:
    assert compare.judge(Measurement("threads", "1", [2], ""), Measurement("threads", "1", [9], "")) == "same"


def test_compare_exits_with_1_on_one_regression_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1)]))
    same = write(tmp_path / "b", Result([times(1.0, 0.01, 2)]))
    slower = write(tmp_path / "c", Result([times(1.5, 0.01, 3)]))
    assert main(["compare", str(before), str(same)]) == 0
    assert main(["compare", str(before), str(slower)]) == 1
    assert "worse   training_step: step: 1" in capsys.readouterr().out


UNLIKE = [({"device_name": "another processor"}, "a processor and another processor")]
UNLIKE += [({"threads": 1}, "threads: 2 and 1"), ({"quick": False}, "a quick and a full run")]


@pytest.mark.parametrize(("other", "said"), UNLIKE)
def test_unlike_runs_are_compared_in_exact_figures_alone(tmp_path: Path, other: dict, said: str) -> None:
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1), once(1e9, "bytes"), FLOP]))
    result = Result([times(9.0, 0.01, 1), once(9e9, "bytes"), Measurement("flop", "FLOP", [1001], exact=True)])
    changes, _, remarks = compare.compare(before, write(tmp_path / "b", result, **other))
    assert [(change.name, change.verdict) for change in changes] == [("flop", "worse")]
    assert remarks == [f"training_step: {said}: only counts are compared"]
    changes, _, remarks = compare.compare(before, write(tmp_path / "c", result))
    assert [change.verdict for change in changes] == ["worse"] * 3 and not remarks


def test_a_figure_that_vanished_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1), FLOP]))
    assert main(["compare", str(before), str(write(tmp_path / "b", Result([FLOP])))]) == 1
    assert "missing training_step: step" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "b"), str(before)]) == 0


def test_a_case_that_failed_fails_and_one_that_was_not_run_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1)]))
    write(before, Result([FLOP]), case="memory")
    only = write(tmp_path / "only", Result([FLOP]), case="memory")
    assert main(["compare", str(before), str(only)]) == 0
    assert "note    training_step: only in" in capsys.readouterr().out
    write(only, Result(failures=["left out: time was over"]))
    assert main(["compare", str(before), str(only)]) == 1
    said = capsys.readouterr().out
    assert "missing training_step: step" in said and "left out: time was over" in said


@pytest.mark.parametrize("other", [{"quick": False}, {"device_name": "another processor"}])
def test_a_run_of_other_sizes_lacks_figures_only_if_something_failed(tmp_path: Path, other: dict) -> None:
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1), FLOP]))
    after = write(tmp_path / "b", Result([FLOP]), **other)
    assert main(["compare", str(before), str(after)]) == 0
    write(after, Result([FLOP], failures=["step: RuntimeError: away"]), **other)
    assert main(["compare", str(before), str(after)]) == 1


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no results"):
        compare.compare(tmp_path, tmp_path)
