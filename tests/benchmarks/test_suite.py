"""The suite around the cases: what is measured is kept, one failure leaves the rest alone, the report holds everything."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as suite
from benchmarks import report
from benchmarks.__main__ import _run_here
from benchmarks.case import Case, Context, Measurement, Plot, Result, Table, WrongResult, load_cases
from benchmarks.cases import memory, quality, reversible_layers
from benchmarks.timing import take_turns
from idm_fast.evaluation.protocol import ImageResult

CONTEXT = Context("cpu", True)


def full_result() -> Result:
    result = Result(notes=["a note"], failures=["a part: RuntimeError: away"])
    result.count("peak", "bytes", 7)
    result.samples("step", "s", [3.0, 1.0, 2.0, 4.0, 5.0])
    result.count("PSNR", "dB", 30.0, "higher", exact=False)
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
    assert [entry["exact"] for entry in data["measurements"]] == [True, False, False]


def test_old_json_is_exact_where_it_counts() -> None:
    result = Result()
    for unit in ("bytes", "FLOP", "launches", "dB", "s"):
        result.count(unit, unit, 1.0)
    result.samples("several", "bytes", [1.0, 2.0])
    data = result.as_json()
    for entry in data["measurements"]:
        del entry["exact"]
    assert [m.exact for m in Result.from_json(data).measurements] == [True, True, True, False, False, False]


@pytest.mark.parametrize("counted", [True, False])
def test_peaks_of_libraries_are_exact_where_they_were_counted(counted: bool) -> None:
    result = Result()
    found = {"peak": 100, "error": 0.0, "seconds": [1.0, 1.0]}
    reversible_layers.add_figures(result, {"a library": found, "settings": {"text": "a network"}}, counted)
    assert [m.exact for m in result.measurements] == [False, counted]


def test_quality_is_not_exact() -> None:
    result = Result()
    image = ImageResult("a photograph", 32, 32, ratio=0.1, psnr_adjoint=20, ssim_adjoint=0.5, psnr=30, ssim=0.8, seconds=1)
    quality.row(result, "a set", "float32", [image])
    assert [m.exact for m in result.measurements] == [False, False, False]


def test_peaks_on_a_gpu_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(memory, "peak_on_gpu", lambda run: 110)
    result, run = Result(), memory.OnGpu("a schedule", memory.Setting(), "reference")
    memory._measured(result, {run: SimpleNamespace(peak_bytes=90, peak_with_gradients=100)})
    assert [(m.samples, m.exact) for m in result.measurements] == [([110], False)]


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

    assert _run_here(Case("memory", "Why?", run, ("cpu",), (1, 1)), Context("cpu", True), tmp_path) == 1
    data = json.loads((tmp_path / "memory.json").read_text())
    assert data["result"]["failures"] == ["ZeroDivisionError: by nothing"]
    assert {"device_name", "torch", "commit", "threads"} <= data["machine"].keys()


@pytest.mark.parametrize("ends", [False, True])
def test_what_was_measured_stands_when_the_time_is_over(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE", 0)
    file, seen = tmp_path / "memory.json", []

    def run(context: Context) -> Result:
        result = context.new_result()
        result.count("peak", "bytes", 7)
        until = time.monotonic() + 60
        while not ends and not file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        seen.append(file.exists() and json.loads(file.read_text())["result"])
        return result

    assert _run_here(Case("memory", "Why?", run, ("cpu",), (1, 1)), Context("cpu", True, 60 if ends else 0.2), tmp_path) == 0
    assert json.loads(file.read_text())["result"]["failures"] == []
    if ends:
        assert seen == [False]
    else:
        assert seen[0]["measurements"][0]["samples"] == [7] and seen[0]["failures"][0].startswith("stopped after 0 s")


def test_a_case_that_raises_keeps_what_it_had(tmp_path: Path) -> None:
    def run(context: Context) -> Result:
        context.new_result().count("peak", "bytes", 7)
        raise ZeroDivisionError("by nothing")

    assert _run_here(Case("memory", "Why?", run, ("cpu",), (1, 1)), Context("cpu", True), tmp_path) == 1
    result = json.loads((tmp_path / "memory.json").read_text())["result"]
    assert result["measurements"][0]["samples"] == [7] and result["failures"] == ["ZeroDivisionError: by nothing"]


def test_long_lists_of_bars_and_narrow_logarithmic_axes_are_drawn(tmp_path: Path) -> None:
    bars = {f"way {k}": [("a network", 1.0 + k)] for k in range(15)}
    lines = {"a": [(1, 0.3), (2, 0.5), (5, 0.9)]}
    plots = [Plot("Bars", "", "s", bars, "way 0", bars=True), Plot("Lines", "T", "s", lines, log_y=True)]
    sizes = []
    for k, plot in enumerate(plots):
        report.draw(plot, tmp_path / f"{k}.png")
        with Image.open(tmp_path / f"{k}.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][1] > 15 * 25


def test_contenders_take_turns() -> None:
    order: list[str] = []
    samples = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", seconds=0, least=3)
    assert order == list("ab" + "ababab")
    assert [len(s) for s in samples.values()] == [3, 3]


def test_a_contender_that_fails_leaves_and_the_others_go_on() -> None:
    calls: list[str] = []

    def falls(at: int) -> Callable[[], None]:
        def function() -> None:
            calls.append(f"falls at {at}")
            if calls.count(f"falls at {at}") == at:
                raise torch.OutOfMemoryError("CUDA out of memory\n…")

        return function

    contenders = {"at once": falls(1), "stays": lambda: calls.append("stays"), "later": falls(3)}
    result = Result()
    samples = take_turns(contenders, "cpu", seconds=0, least=4, failed=result.failed_at("64²"))
    assert {who: len(times) for who, times in samples.items()} == {"stays": 4}
    assert result.failures == [f"64², {who}: OutOfMemoryError: CUDA out of memory" for who in ("at once", "later")]
    assert (calls.count("falls at 1"), calls.count("falls at 3")) == (1, 3)
    with pytest.raises(torch.OutOfMemoryError):
        take_turns({"falls": falls(2)}, "cpu", seconds=0)


def test_samples_are_seconds() -> None:
    samples = take_turns({"sleep": lambda: time.sleep(0.02)}, "cpu", seconds=0, least=3)["sleep"]
    assert all(0.019 < sample < 1 for sample in samples)


def write(folder: Path, case: str = "memory", quick: bool = True, **machine: Any) -> dict[str, Any]:
    """What a run leaves of a case, also as a file."""
    here = {"device": "cpu", "device_name": "a <fast> processor", "threads": 1, "cores": 2, "torch": "2.13"}
    here |= {"triton": "3", "python": "3.11", "commit": "abc"}
    data = {"case": case, "question": "How much?", "quick": quick, "seconds": 1.0, "machine": here | machine}
    data["result"] = full_result().as_json()
    (folder / f"{case}.json").write_text(json.dumps(data))
    return data


def test_report_page_holds_tables_plots_machine_and_failures(tmp_path: Path) -> None:
    data = write(tmp_path)
    report.write_case(tmp_path, data)
    page = report.write_page(tmp_path).read_text()
    texts = ("How much?", "a &lt;fast&gt; processor", "abc", "12,345", "Did not work: a part", "data:image/png;base64")
    for text in (*texts, "a note"):
        assert text in page
    assert page.count("<img") == 2 and "http" not in page
    markdown = (tmp_path / "memory.md").read_text()
    assert "| ours | 1.50 |" in markdown and "![Ours is smaller](memory_0.png)" in markdown


def test_every_section_says_where_it_was_measured(tmp_path: Path) -> None:
    write(tmp_path, "memory")
    write(tmp_path, "quality")
    page = report.write_page(tmp_path).read_text()
    assert page.count("a &lt;fast&gt; processor, 1 of 2 cores") == 2 and page.count("commit abc") == 2
    assert "not measured alike" not in page and "<dt>commit</dt><dd>abc</dd>" in page


DIFFERENT = [({"commit": "def"}, "commits: abc, def"), ({"threads": 2}, "threads: 1, 2")]
DIFFERENT += [({"quick": False}, "runs: quick, full")]
DIFFERENT += [({"device_name": "a slow one"}, "machines: a <fast> processor, a slow one")]


@pytest.mark.parametrize(("other", "said"), DIFFERENT)
def test_a_report_of_several_runs_says_so_at_its_top(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    first, second = write(tmp_path, "memory"), write(tmp_path, "quality", **other)
    top, *sections = report.write_page(tmp_path).read_text().split("<h2")
    assert f"not measured alike ({html.escape(said)})" in top
    assert not any(f"<dt>{key}</dt>" in top for key in other)
    for data, section in zip((first, second), sections, strict=True):
        assert html.escape(report.machine_line(data["machine"])) in section
        assert ("1 s, quick" in section) == data["quick"]


NUMBERS = [(1234, "1,234"), (0.5, "0.5000"), (12.345, "12.35"), (1e-7, "1.00e-07"), ("x", "x")]


@pytest.mark.parametrize(("value", "shown"), NUMBERS)
def test_numbers_are_shown_with_the_digits_that_count(value: object, shown: str) -> None:
    assert report.show(value) == shown


def test_every_case_says_what_it_answers() -> None:
    for case in load_cases().values():
        assert case.question.endswith("?")
