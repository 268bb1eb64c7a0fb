"""The tests that need a GPU, run on it: every kernel against the float64 oracle, and what else is marked `gpu`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.case import Context, NotHere, Result, Table, case
from benchmarks.machine import ROOT

LONGEST_MESSAGE = 160


@case("Do the kernels compute on this GPU what they should?", devices=("cuda",), seconds=(200, 1200))
def run(context: Context) -> Result:
    """Passed, failed and skipped tests by file; each failure with its first line."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed; pip install 'idm-fast[test]'")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        selection = ["-m", "gpu and not slow" if context.quick else "gpu"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, f"--junitxml={log}", "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not log.is_file():
            raise RuntimeError(f"pytest wrote no result: {(done.stdout + done.stderr)[-500:]}")
        return summarize(log)


def summarize(log: Path) -> Result:
    """A Result from pytest's JUnit file."""
    result, outcomes = Result(), Counter[tuple[str, str]]()
    for test in xml.etree.ElementTree.parse(log).iter("testcase"):
        file = test.get("classname", "").removeprefix("tests.")
        problem = next((child for child in test if child.tag in ("failure", "error")), None)
        outcome = "failed" if problem is not None else "skipped" if test.find("skipped") is not None else "passed"
        outcomes[file, outcome] += 1
        if problem is not None:
            message = (problem.get("message") or "").splitlines() or [""]
            result.failures.append(f"{file}: {test.get('name')}: {message[0][:LONGEST_MESSAGE]}")
    columns = ["passed", "failed", "skipped"]
    files = sorted({file for file, _ in outcomes})
    rows: list[list[str | int | float]] = [[file, *(outcomes[file, column] for column in columns)] for file in files]
    result.tables.append(Table("Tests that ran on the GPU", ["file", *columns], rows))
    for column, better in (("passed", "higher"), ("failed", "lower")):
        result.count(f"tests {column}", "tests", sum(outcomes[file, column] for file in files), better)
    return result
