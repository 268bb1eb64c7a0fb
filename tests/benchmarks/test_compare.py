"""The regression check on synthetic samples, with and without a regression."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.__main__ import main
from benchmarks.case import Measurement, Result


def times(median: float, spread: float, seed: int, better: str = "lower") -> Measurement:
    """Forty samples whose quartiles lie about 0.67·spread from the median."""
    noise = random.Random(seed)
    return Measurement("step", "s", [noise.gauss(median, spread) for _ in range(40)], better)


def write(folder: Path, result: Result, device_name: str = "a processor") -> Path:
    folder.mkdir()
    data = {"case": "training_step", "machine": {"device_name": device_name}, "result": result.as_json()}
    (folder / "training_step.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_two_runs_of_the_same_are_the_same(seed: int) -> None:
    assert compare.judge(times(1.0, 0.05, seed), times(1.0, 0.05, 100 + seed)) == "same"


@pytest.mark.parametrize("seed", range(20))
def test_a_slower_run_outside_of_both_spreads_is_worse(seed: int) -> None:
    assert compare.judge(times(1.0, 0.05, seed), times(1.2, 0.05, 100 + seed)) == "worse"
    assert compare.judge(times(1.2, 0.05, seed), times(1.0, 0.05, 100 + seed)) == "better"


def test_a_slower_run_inside_of_the_spread_is_the_same() -> None:
    assert compare.judge(times(1.0, 0.5, 1), times(1.2, 0.5, 2)) == "same"


def test_less_is_worse_where_more_is_better() -> None:
    assert compare.judge(times(30.0, 0.1, 1, "higher"), times(25.0, 0.1, 2, "higher")) == "worse"
    assert compare.judge(times(30.0, 0.1, 1, "higher"), times(35.0, 0.1, 2, "higher")) == "better"


def test_a_count_is_worse_as_soon_as_it_grows() -> None:
    assert compare.judge(Measurement("flop", "FLOP", [1000]), Measurement("flop", "FLOP", [1001])) == "worse"
    assert compare.judge(Measurement("flop", "FLOP", [1000]), Measurement("flop", "FLOP", [1000])) == "same"


def test_a_figure_without_a_better_side_never_regresses() -> None:
    assert compare.judge(Measurement("threads", "1", [2], ""), Measurement("threads", "1", [9], "")) == "same"


def test_compare_exits_with_1_on_one_regression_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1)]))
    same = write(tmp_path / "b", Result([times(1.0, 0.01, 2)]))
    slower = write(tmp_path / "c", Result([times(1.5, 0.01, 3)]))
    assert main(["compare", str(before), str(same)]) == 0
    assert main(["compare", str(before), str(slower)]) == 1
    assert "worse  training_step: step: 1" in capsys.readouterr().out


def test_times_of_different_devices_are_not_compared_but_counts_are(tmp_path: Path) -> None:
    count = Measurement("flop", "FLOP", [1000])
    before = write(tmp_path / "a", Result([times(1.0, 0.01, 1), count]))
    after = write(tmp_path / "b", Result([times(9.0, 0.01, 1), count]), "another processor")
    changes, remarks = compare.compare(before, after)
    assert [change.name for change in changes] == ["flop"]
    assert "only counts are compared" in remarks[0]


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no results"):
        compare.compare(tmp_path, tmp_path)
