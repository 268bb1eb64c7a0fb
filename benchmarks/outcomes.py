"""A pytest plugin (`-p benchmarks.outcomes`) that writes a line of JSON a test into a file as soon as the test has ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

LOG = "IDM_BENCH_OUTCOMES"
"""The environment variable that names the file."""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with workers, the process that they report to writes
        config.pluginmanager.register(Outcomes(Path(os.environ[LOG])))


class Outcomes:
    """Each line: the test, "passed", "failed" or "skipped", and the first line of what went wrong."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Of the three parts of a test the call counts, and what went wrong around it.
        if report.when == "call" or not report.passed:
            self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr or "")).splitlines() or [""]
        # Of a file that could not be imported, the last line says why.
        message = lines[0] if isinstance(report, pytest.TestReport) else lines[-1]
        line = {"test": report.nodeid, "outcome": report.outcome, "message": message}
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
