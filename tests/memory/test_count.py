"""The counter against graphs small enough to count by hand, and IDM's cost at setting S (DESIGN §5)."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from idm_fast import IDM
from idm_fast.memory.count import (
    GIB,
    AllocationCounter,
    StepCount,
    column_sum_scratch,
    count_step,
    count_training_step,
    resident_threads,
)

KIB = 1024
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def test_two_temporaries_of_a_chain_of_four_are_alive_at_most() -> None:
    x = torch.zeros(256)  # 1 KiB
    counter = AllocationCounter()
    counter.ignore([x])
    with counter:
        y = x
        for _ in range(4):
            y = y.exp()
        moment = counter.mark()
    peak, held = counter.summarize([], moment)
    assert (peak, held) == (2 * KIB, KIB)
    assert counter.launches == 4


def test_views_and_writes_in_place_cost_nothing() -> None:
    x = torch.zeros(256)
    counter = AllocationCounter()
    counter.ignore([x])
    with counter:
        x.view(16, 16).t().mul_(2)
    assert counter.summarize([], 0) == (0, 0)
    assert counter.launches == 1


def test_saved_activations_are_counted_and_gradients_are_not() -> None:
    w = torch.zeros(256, 256, requires_grad=True)  # 256 KiB
    x = torch.zeros(256, 256)

    def forward() -> Tensor:
        h = (x @ w).exp() @ w  # kept: exp's output; freed in forward: x @ w
        return h.sum()

    count = count_step(forward, [w], [x])
    # After forward: the output of exp, and the loss. The two products' gradients of w add up to w.grad.
    assert count.held_bytes == 256 * KIB + 4
    # Backward: exp's output and its gradient (h is 0-dim by then), then the gradient of x @ w.
    assert count.peak_bytes <= 3 * 256 * KIB + 64
    assert count.flop == 5 * 2 * 256**3  # two products forward, two for the second backward, one for the first


def test_checkpointing_holds_inputs_of_parts_and_one_part_at_a_time() -> None:
    w = torch.zeros(256, requires_grad=True)  # 1 KiB, as every tensor here
    x = torch.zeros(256)

    def part(h: Tensor) -> Tensor:
        return h.tanh().tanh().tanh()

    def forward(again: bool) -> Tensor:
        h = x + w
        for _ in range(4):
            h = checkpoint(part, h, use_reentrant=False) if again else part(h)
        return h.sum()

    plain, checkpointed = (count_step(lambda again=again: forward(again), [w], [x]) for again in (False, True))
    # Each tanh keeps its output. With checkpoints there are the inputs of four parts; the last output is not kept.
    assert plain.held_bytes == 12 * KIB + 4
    assert checkpointed.held_bytes == 4 * KIB + 4
    # Backward of the last part: four inputs, three outputs again, the gradients before and after a tanh.
    assert checkpointed.peak_bytes <= (4 + 3 + 2) * KIB + 16
    assert checkpointed.calls["aten.tanh"] == 2 * plain.calls["aten.tanh"] == 24


@pytest.mark.parametrize("stride", [1, 2])
def test_flop_of_a_convolution(stride: int) -> None:
    B, C_in, C_out, side, k = 2, 4, 6, 8, 3
    w = torch.zeros(C_out, C_in, k, k, requires_grad=True)
    x = torch.zeros(B, C_in, side, side, requires_grad=True)
    count = count_step(lambda: F.conv2d(x, w, stride=stride, padding=1).sum(), [w, x])
    multiply_adds = B * C_out * (side // stride) ** 2 * C_in * k * k
    assert count.flop == 3 * 2 * multiply_adds  # forward, and one each for the gradients of x and w


def test_flop_of_attention() -> None:
    B, heads, N, d = 2, 3, 32, 8
    q, k, v = (torch.zeros(B, heads, N, d, requires_grad=True) for _ in range(3))
    count = count_step(lambda: F.scaled_dot_product_attention(q, k, v).sum(), [q, k, v])
    product = 2 * B * heads * N * N * d
    assert count.flop == 2 * product + 5 * product  # backward forms the scores again, then four gradients


H100 = 132 * 2048


@pytest.mark.parametrize(
    ("rows", "columns", "element_size", "allocated"),
    [
        (16_384, 2560, 2, 132.5),
        (4_096, 5120, 2, 132.5),
        (131_072, 5120, 2, 320.0),
        (131_072, 5120, 4, 160.0),  # in two halves of 2^31 bytes at most
        (131_072, 2560, 8, 265.0),
        (1_000_000, 322, 8, 38.52),
        (1_000_000, 1280, 2, 305.63),
        (8, 2560, 2, 0.0),
        (16_384, 300_000, 2, 0.0),
    ],
)
def test_scratch_of_row_sums_is_what_an_h100_allocates(rows: int, columns: int, element_size: int, allocated: float) -> None:
    """MiB that PyTorch 2.11's allocator hands out on a GPU of that many threads whose kernels do nothing (tests/hollow_gpu)."""
    assert column_sum_scratch(rows, columns, element_size, H100) / 2**20 == pytest.approx(allocated, abs=0.01)
    assert column_sum_scratch(rows, columns, element_size, threads=0) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(16_384, 2560), (4_096, 5120), (4_097, 322), (131_072, 5120), (8, 320)])
def test_scratch_of_row_sums_is_what_this_gpu_allocates(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.zeros(rows, columns, device="cuda", dtype=dtype)
    x.sum(0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x.sum(0)
    found = torch.cuda.max_memory_allocated() - before
    expected = column_sum_scratch(rows, columns, x.element_size(), resident_threads(x.device))
    assert abs(found - expected) <= 1.01 * 2**20  # the output, and what a block of the allocator may be too large by


def test_scratch_of_a_bias_gradient_is_counted_where_a_gpu_is_named() -> None:
    x, w, c = torch.zeros(4096, 64), torch.zeros(320, 64), torch.ones(4096, 320)

    def on(threads: int) -> StepCount:
        b = torch.zeros(320, requires_grad=True)
        return count_step(lambda: (F.linear(x, w, b) * c).sum(), [b], [x, w, c], threads=threads)

    none, some = on(0), on(H100)
    scratch, h = column_sum_scratch(4096, 320, 4, H100), c.nbytes
    assert scratch == 2 * h
    # In forward two tensors like c. Where the rows of the output's gradient are summed, that, the scratch and b's gradient.
    assert 2 * h <= none.peak_bytes <= 2 * h + 2 * KIB
    assert scratch + h <= some.peak_bytes <= scratch + h + 2 * KIB
    assert some.held_bytes == none.held_bytes and some.launches == none.launches


def test_fake_tensors_count_what_a_real_run_counts() -> None:
    options = {"steps": 2, "widths": (16, 32), "heads": 2, "norm_groups": 4}
    fake = count_training_step(lambda: IDM(**options), batch=2, size=32, autocast=None)
    from idm_fast import BlockCompressedSensing

    model, physics = IDM(**options), BlockCompressedSensing((32, 32), 0.1)
    x = torch.rand(2, 1, 32, 32)
    real = count_step(
        lambda: (model(physics.A(x), physics) - x).abs().mean(),
        model.parameters(),
        [x, *physics.buffers()],
    )
    assert (fake.peak_bytes, fake.held_bytes, fake.flop) == (real.peak_bytes, real.held_bytes, real.flop)


SCHEDULES = {
    "store": ("store", None),
    "two_level": ("two_level", None),
    "flat": ("flat", None),
    "flat + attention": ("flat", ["attention"]),
}


@cache  # not a fixture, of which each worker of pytest-xdist would count all
def setting_s(name: str) -> StepCount:
    """The cost of one of SCHEDULES at batch 8, 256², T = 3, bfloat16 autocast."""
    schedule, keep = SCHEDULES[name]
    return count_training_step(lambda: IDM(schedule=schedule, keep=keep), 8, 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "gib", "tflop", "launches"),
    [("two_level", 3.5, 450, 10_000), ("flat", 8.5, 365, 10_000), ("flat + attention", 10, 320, 5_000)],
)
def test_schedules_cost_at_most_what_design_says(schedule: str, gib: float, tflop: float, launches: int) -> None:
    count = setting_s(schedule)
    assert count.peak_bytes <= gib * GIB
    assert count.flop <= tflop * 1e12
    assert count.launches <= launches


@pytest.mark.slow
def test_plain_autograd_on_the_ops_launches_less_than_half_of_what_the_published_network_launches() -> None:
    assert setting_s("store").launches < 9359 / 2


@pytest.mark.slow
def test_no_part_of_the_unet_is_walked_twice_in_backward() -> None:
    """Every convolution and attention is differentiated once a step, and run at most twice, or thrice where steps are."""
    calls = {name: Counter(setting_s(name).calls) for name in SCHEDULES}
    for schedule, times in (("two_level", 3), ("flat", 2)):
        for name in ("aten.convolution_backward", f"{ATTENTION}_backward"):
            assert calls[schedule][name] == calls["store"][name] > 0
        for name in ("aten.convolution", ATTENTION):
            assert calls["store"][name] < calls[schedule][name] <= times * calls["store"][name]


@pytest.mark.slow
def test_kept_attention_runs_once_a_step() -> None:
    assert setting_s("flat + attention").calls[ATTENTION] == setting_s("store").calls[ATTENTION]
    assert setting_s("flat").calls[ATTENTION] == 2 * setting_s("store").calls[ATTENTION]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["store", "flat"])
def test_weights_are_cast_once_a_step(schedule: str) -> None:
    """Six parts of the network, forward and backward; what _to_copy is left casts features and gradients."""
    assert setting_s(schedule).calls["aten._foreach_copy_"] == 12


@pytest.mark.slow
def test_plain_autograd_spends_the_277_tflop_of_the_published_network() -> None:
    assert setting_s("store").flop == pytest.approx(277e12, rel=0.005)


@pytest.mark.slow
def test_network_leaves_norms_gates_couplings_and_sensing_to_the_ops() -> None:
    calls = setting_s("two_level").calls
    for name in ("couple", "uncouple", "project_step", "gram", "measure", "adjoint", "inject_read", "inject_couple"):
        assert calls[f"idm_fast.{name}"] > 0
    assert calls["idm_fast.group_norm_silu"] > 0 and calls["idm_fast.layer_norm"] > 0
    for name in ("native_group_norm", "native_layer_norm", "silu", "silu_", "gelu", "lerp", "index_select", "index_copy"):
        assert f"aten.{name}" not in calls
