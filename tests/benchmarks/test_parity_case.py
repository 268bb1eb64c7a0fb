"""What the parity case makes of tests: counts, quotes, and what is there when time is up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cases.parity import run_tests

TESTS = """
import time
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise ValueError("no device")
def test_without_its_fixture(broken): pass
"""
ENDLESS = "def test_endless(): time.sleep(600)\n"
WITHOUT_CONFIGURATION = ["--rootdir=.", "-c", "/dev/null", "-p", "no:xdist"]


def test_failures_are_counted_and_quoted(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    result = run_tests([*WITHOUT_CONFIGURATION, str(file)], 60)
    assert [row[1:] for row in result.tables[0].rows] == [[1, 2, 1]]
    wrong, broken = result.failures
    assert "test_wrong: AssertionError: one is not two" in wrong
    assert "test_without_its_fixture: ValueError: no device" in broken
    assert [(m.name, m.median) for m in result.measurements] == [("tests passed", 1), ("tests failed", 2)]


def test_what_was_tested_when_time_is_up_counts(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS + ENDLESS)
    result = run_tests([*WITHOUT_CONFIGURATION, str(file)], 15)
    assert [row[1:] for row in result.tables[0].rows] == [[1, 2, 1]]
    assert result.failures[-1] == "stopped after 15 s: the tests that were still to come are missing"


def test_no_test_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("")
    with pytest.raises(RuntimeError, match="pytest ran no test"):
        run_tests([*WITHOUT_CONFIGURATION, str(tmp_path)], 60)
