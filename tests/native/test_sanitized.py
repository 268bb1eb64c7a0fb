"""The CPU extension under AddressSanitizer and UBSan, for about a minute; `make sanitize` runs all of its tests so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized

from idm_fast.ops import native


@pytest.mark.slow
def test_sanitizers_find_nothing_while_arguments_are_fuzzed() -> None:
    if reason := native.load_cpu():
        pytest.skip(f"no C++ extension: {reason}")
    try:
        sanitized.runtime()
    except (OSError, subprocess.CalledProcessError) as reason:
        pytest.skip(f"no sanitizers: {reason}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "IDM_FAST_"))}
    command = [sys.executable, str(Path(sanitized.__file__)), "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "no C++ extension" not in done.stdout
