"""Tests marked `gpu` are skipped, with the reason, on a machine without a CUDA device; slow ones come first in every worker."""

import os
from collections import defaultdict

import pytest
import torch


def dealt_out(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order of which pytest-xdist's worksteal gives each worker an equal part, which begins with slow tests.

    Or else one worker would have all of them, and begin long ones when the others have nothing left. Those of a file stay
    together, as they share what they have made.
    """
    slow_files = defaultdict(list)
    for item in items:
        if "slow" in item.keywords:
            slow_files[item.path].append(item)
    parts: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for tests in slow_files.values():
        min(parts, key=len).extend(tests)
    quick = [item for item in items if "slow" not in item.keywords]
    ordered: list[pytest.Item] = []
    for i, part in enumerate(parts):
        size = max((len(items) - len(ordered)) // (workers - i) - len(part), 0)
        ordered += part + quick[:size]
        del quick[:size]
    return ordered + quick


@pytest.hookimpl(trylast=True)  # when it is known which are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = dealt_out(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
