"""What the parity case makes of pytest's own report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.cases.parity import summarize

TESTS = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip
def test_left_out(): pass
"""


def test_failures_are_counted_and_quoted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    log = tmp_path / "log.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={log}", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    result = summarize(log)
    assert result.tables[0].rows == [["test_some", 1, 1, 1]]
    assert len(result.failures) == 1 and "test_wrong: AssertionError: one is not two" in result.failures[0]
    assert [(m.name, m.median) for m in result.measurements] == [("tests passed", 1), ("tests failed", 1)]
