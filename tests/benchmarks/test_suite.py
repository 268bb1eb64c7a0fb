"""The suite around the cases: what is measured is kept, one failure leaves the rest alone, the report holds everything."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import _run_here
from benchmarks.case import Case, Context, Measurement, Plot, Result, Table, WrongResult, load_cases
from benchmarks.timing import take_turns

CONTEXT = Context("cpu", True)


def full_result() -> Result:
    result = Result(notes=["a note"], failures=["a part: RuntimeError: away"])
    result.count("peak", "bytes", 7)
    result.samples("step", "s", [3.0, 1.0, 2.0, 4.0, 5.0])
    result.tables.append(Table("A table", ["who", "ms"], [["ours", 1.5], ["theirs", 12345]]))
    result.plots.append(Plot("Ours is smaller", "T", "GiB", {"ours": [(1, 2.0)], "plain": [(1, 4.0)]}, baseline="plain"))
    result.plots.append(Plot("Bars", "", "s", {"ours": [("a", 2.0), ("b", 1.0)]}, bars=True))
    return result


def test_median_and_quartiles() -> None:
    measurement = Measurement("step", "s", [3.0, 1.0, 2.0, 4.0, 5.0])
    assert measurement.median == 3.0
    assert measurement.quartiles == (2.0, 4.0)
    assert Measurement("one", "s", [3.0]).quartiles == (3.0, 3.0)


def test_json_holds_all_of_a_result() -> None:
    result = full_result()
    data = json.loads(json.dumps(result.as_json()))
    assert Result.from_json(data) == result
    assert data["measurements"][1]["median"] == 3.0


def test_a_wrong_result_is_refused_and_nan_is_wrong() -> None:
    CONTEXT.check("the output", 1e-6, 1e-5)
    for error in (1e-4, float("nan")):
        with pytest.raises(WrongResult, match="the output is off by .*: not timed"):
            CONTEXT.check("the output", error, 1e-5)


def test_one_part_that_fails_leaves_the_others() -> None:
    result = Result()

    def fail() -> None:
        raise RuntimeError("no memory\nand more lines")

    assert result.attempt("store", fail) is None
    assert result.attempt("flat", lambda: 7) == 7
    assert result.failures == ["store: RuntimeError: no memory"]


def test_an_error_without_a_message_is_named() -> None:
    result = Result()

    def fail() -> None:
        raise AssertionError

    assert result.attempt("compiled", fail) is None
    assert result.failures == ["compiled: AssertionError: no message"]


def test_a_case_that_raises_leaves_a_file_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(context: Context) -> Result:
        raise ZeroDivisionError("by nothing")

    assert _run_here(Case("memory", "Why?", run, ("cpu",), (1, 1)), CONTEXT, tmp_path) == 1
    data = json.loads((tmp_path / "memory.json").read_text())
    assert data["result"]["failures"] == ["ZeroDivisionError: by nothing"]
    assert {"device_name", "torch", "commit", "threads"} <= data["machine"].keys()


def test_contenders_take_turns() -> None:
    order: list[str] = []
    samples = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", seconds=0, least=3)
    assert order == list("ab" + "ababab")
    assert [len(s) for s in samples.values()] == [3, 3]


def test_samples_are_seconds() -> None:
    samples = take_turns({"sleep": lambda: time.sleep(0.02)}, "cpu", seconds=0, least=3)["sleep"]
    assert all(0.019 < sample < 1 for sample in samples)


def test_report_page_holds_tables_plots_machine_and_failures(tmp_path: Path) -> None:
    machine = {"device": "cpu", "device_name": "a <fast> processor", "threads": 1, "cores": 2, "torch": "2.13"}
    machine |= {"triton": "3", "python": "3.11", "commit": "abc"}
    data = {"case": "memory", "question": "How much?", "quick": True, "seconds": 1.0, "machine": machine}
    data["result"] = full_result().as_json()
    (tmp_path / "memory.json").write_text(json.dumps(data))
    report.write_case(tmp_path, data)
    page = report.write_page(tmp_path).read_text()
    texts = ("How much?", "a &lt;fast&gt; processor", "abc", "12,345", "Did not work: a part", "data:image/png;base64")
    for text in (*texts, "a note"):
        assert text in page
    assert page.count("<img") == 2 and "http" not in page
    markdown = (tmp_path / "memory.md").read_text()
    assert "| ours | 1.50 |" in markdown and "![Ours is smaller](memory_0.png)" in markdown


NUMBERS = [(1234, "1,234"), (0.5, "0.5000"), (12.345, "12.35"), (1e-7, "1.00e-07"), ("x", "x")]


@pytest.mark.parametrize(("value", "shown"), NUMBERS)
def test_numbers_are_shown_with_the_digits_that_count(value: object, shown: str) -> None:
    assert report.show(value) == shown


def test_every_case_says_what_it_answers() -> None:
    for case in load_cases().values():
        assert case.question.endswith("?")
