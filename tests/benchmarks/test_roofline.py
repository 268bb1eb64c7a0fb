"""The least time of a step: bytes and FLOP of small graphs, counted by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import FLAT, PLAIN, Setting
from benchmarks.roofline import Roofline, addressed, expected
from idm_fast.memory.count import count_step

BANDWIDTH, RATE = 1000.0, 10.0


def test_a_product_takes_the_longer_of_its_two_times() -> None:
    a, w = torch.ones(4, 8), torch.ones(8, 2, requires_grad=True)
    counter = Roofline(BANDWIDTH, RATE)
    count_step(lambda: (a @ w).sum(), [w], [a], counter=counter)
    products = 4 * (4 * 8 + 8 * 2 + 4 * 2) + 4 * (8 * 4 + 4 * 2 + 8 * 2)  # a @ w, and aᵀ @ dout
    flop = 2 * 2 * 4 * 8 * 2
    others = 4 * (4 * 2 + 1) + 4 * (1 + 1)  # the sum, and ones_like of the loss; expand is a view
    assert counter.flop == flop and counter.bytes == products - 4 * (4 * 2 - 1) + others, "dout is one element, expanded"
    assert counter.matrix_seconds == pytest.approx(flop / RATE)
    assert counter.seconds == pytest.approx(flop / RATE + others / BANDWIDTH)


def test_an_expanded_dimension_is_read_once() -> None:
    assert addressed(torch.ones(3, 1).expand(3, 100)) == 12
    assert addressed(torch.ones(0, 3)) == 0 and addressed(torch.ones(5, dtype=torch.float64)[::2]) == 24


def test_a_lower_bandwidth_takes_longer_and_recomputing_more_flop() -> None:
    narrow = Setting(1, 1, 32, {"widths": (16, 32), "heads": 2, "norm_groups": 4})
    plain, flat = (expected(name, narrow, 1e12, 1e14) for name in (PLAIN, FLAT))
    slower = expected(PLAIN, narrow, 1e11, 1e14)
    assert flat[0] > plain[0] and slower[2] > plain[2] > plain[3] > 0
    assert slower[:2] == plain[:2]
