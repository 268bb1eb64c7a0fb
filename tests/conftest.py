"""Tests marked `gpu` are skipped, with the reason, on a machine without a CUDA device; those marked `slow` come first."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Or else one worker of pytest-xdist would begin a long test when the others have nothing left.
    items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
