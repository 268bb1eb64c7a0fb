"""The tests that need a GPU, run on it: every kernel against the float64 oracle, and what else is marked `gpu`.

pytest runs in a process of its own, with as many workers as make sense on one GPU, and writes down each test as it ends: when
time is up, what was tested until then still counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.case import Context, NotHere, Result, Table, case
from benchmarks.machine import ROOT
from benchmarks.outcomes import LOG

LONGEST_MESSAGE = 160
MOST_WORKERS = 8
"""Compiling the kernels is what takes the time; each worker takes half a GiB of the GPU's memory."""
ENDING = 25
"""Seconds of the case's time that are kept for its start and for putting the answer together."""


@case("Do the kernels compute on this GPU what they should?", devices=("cuda",), seconds=(200, 1200))
def run(context: Context) -> Result:
    """Passed, failed and skipped tests by file; each failure with its first line."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed; pip install 'idm-fast[test]'")
    command = ["-m", "gpu and not slow" if context.quick else "gpu", "tests"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal"]
    return run_tests(command, context.seconds - ENDING)


def run_tests(arguments: list[str], seconds: float) -> Result:
    """pytest with these arguments, ended after so long."""
    with tempfile.TemporaryDirectory() as name:
        log, output = Path(name) / "tests.jsonl", Path(name) / "output"
        log.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.outcomes"]
        # A file that cannot be imported, for want of hypothesis say, is a failure among others.
        command += ["--continue-on-collection-errors", *arguments]
        environment = os.environ | {LOG: str(log), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        with output.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            reason = None
            try:
                process.wait(None if seconds == float("inf") else seconds)
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s: the tests that were still to come are missing"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        result = summarize(log)
        if reason:
            result.failures.append(reason)
        elif not result.tables[0].rows:
            raise RuntimeError(f"pytest ran no test: {output.read_text()[-500:]}")
    return result


def summarize(log: Path) -> Result:
    """A Result from what `benchmarks.outcomes` wrote."""
    result, outcomes = Result(), Counter[tuple[str, str]]()
    for line in log.read_text(encoding="utf-8").splitlines():
        test = json.loads(line)
        file, _, name = test["test"].partition("::")
        outcomes[file, test["outcome"]] += 1
        if test["outcome"] == "failed":
            result.failures.append(f"{file}: {name}: {test['message'][:LONGEST_MESSAGE]}")
    columns = ["passed", "failed", "skipped"]
    files = sorted({file for file, _ in outcomes})
    rows: list[list[str | int | float]] = [[file, *(outcomes[file, column] for column in columns)] for file in files]
    result.tables.append(Table("Tests that ran on the GPU", ["file", *columns], rows))
    for column, better in (("passed", "higher"), ("failed", "lower")):
        result.count(f"tests {column}", "tests", sum(outcomes[file, column] for file in files), better)
    return result
