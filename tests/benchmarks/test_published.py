"""The published network and its training, as modelled: right, and as dear as its rules make it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.case import Context, WrongResult
from benchmarks.contenders import (
    CONTENDERS,
    LEAN,
    PLAIN,
    PUBLISHED,
    Setting,
    Step,
    check_gradients,
    count,
    count_as_on_a_cpu,
    make,
    norms_as_on_cuda,
)
from benchmarks.published import PublishedNetwork
from idm_fast import IDM
from idm_fast.memory.count import GIB, StepCount, count_step

CONTEXT = Context("cpu", True)
NARROW = {"widths": (16, 32), "heads": 2, "norm_groups": 4}
ATTENTION_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward"


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_way_to_train_gives_the_gradients_of_plain_autograd(name: str) -> None:
    assert check_gradients(CONTEXT, name) <= 1e-9


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.published._attention", lambda layer, x: x)
    with pytest.raises(WrongResult, match="the gradient by plain autograd is off"):
        check_gradients(CONTEXT, PLAIN)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="'reversed' is unknown"):
        PublishedNetwork(IDM.tiny(steps=1), "reversed")


@pytest.fixture(scope="module")
def narrow() -> dict[tuple[str, int], StepCount]:
    """(name, T) → cost on a narrow network, counted while it runs."""
    wanted: list[tuple[str, int]] = [(PLAIN, 1), (PUBLISHED, 1), (PUBLISHED, 2), (PUBLISHED, 3)]
    return {(name, T): counted(name, Setting(T, 1, 32, NARROW)) for name, T in wanted}


def counted(name: str, setting: Setting) -> StepCount:
    step = Step(make(name, setting), setting, "cpu", None)
    physics = step.physics
    return count_step(
        lambda: (step.network(physics.A(step.x), physics) - step.x).abs().mean(),
        step.network.parameters(),
        [step.x, *physics.buffers()],
    )


def test_the_published_backward_walks_the_halves_of_the_down_path_4_3_2_and_1_times(narrow: dict[Any, StepCount]) -> None:
    resnet, shortcut, attention, injector = 2, 3, 2, 2  # convolutions each
    list_without_resnet = injector + attention + injector
    full_list = resnet + list_without_resnet
    # conv_in is reached from its own skip as well, the downsampler from three skips, the second block's first resnet from two.
    again = 3 * full_list + 2 * full_list + 1 * list_without_resnet + 4 * 1 + 2 * 1 + 1 * shortcut
    plain, published = (narrow[name, 1].calls for name in (PLAIN, PUBLISHED))
    assert published["aten.convolution_backward"] == plain["aten.convolution_backward"] + again
    assert published[ATTENTION_BACKWARD] == plain[ATTENTION_BACKWARD] + 3 + 2 + 1


def test_the_published_backward_costs_the_same_in_every_step(narrow: dict[Any, StepCount]) -> None:
    one, two = narrow[PUBLISHED, 1], narrow[PUBLISHED, 2]
    for name in ("aten.convolution", "aten.convolution_backward", ATTENTION_BACKWARD):
        assert two.calls[name] == 2 * one.calls[name]


def test_a_third_step_adds_nothing_to_the_published_peak_but_images(narrow: dict[Any, StepCount]) -> None:
    """The skips of the step before live on in their buffers from the second step on."""
    image = 32 * 32 * 4
    assert 0 <= narrow[PUBLISHED, 2].peak_bytes - narrow[PUBLISHED, 1].peak_bytes < 0.1 * narrow[PLAIN, 1].peak_bytes
    assert 0 <= narrow[PUBLISHED, 3].peak_bytes - narrow[PUBLISHED, 2].peak_bytes <= 2 * image


def test_ours_calls_no_norm_that_autocast_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(1, 1, 32, NARROW)
    for norm in (nn.GroupNorm, nn.LayerNorm):
        monkeypatch.setattr(norm, "forward", lambda *_: pytest.fail("as_on_cuda would have to count ours otherwise, too"))
    Step(make(LEAN, setting), setting, "cpu", torch.bfloat16)()


def test_counted_as_on_cuda_the_published_network_norms_in_float32() -> None:
    """What is stored more: a float32 input instead of a bfloat16 one, for each of the norms, and nothing else."""
    setting = Setting(1, 1, 32, NARROW)
    plain, as_on_cuda = count(PLAIN, setting), count(PLAIN, setting, as_on_cuda=True)
    assert as_on_cuda.peak_bytes > plain.peak_bytes
    more = as_on_cuda.calls["aten._to_copy"] - plain.calls["aten._to_copy"]
    assert 0 < as_on_cuda.launches - plain.launches == more and as_on_cuda.flop == plain.flop


def test_norms_as_on_cuda_are_float32_under_autocast_alone() -> None:
    norm = norms_as_on_cuda(nn.Sequential(nn.GroupNorm(2, 4)))
    x = torch.randn(2, 4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    assert norm.bfloat16()(x).dtype == torch.bfloat16


@pytest.mark.slow
def test_full_width_comes_to_the_figures_counted_from_the_published_code() -> None:
    """Plain: 35.2 GiB at T = 1, 277 TFLOP at T = 3. Reversible: 643 TFLOP at T = 3 and, on a CPU, 15.5 GiB at T = 1."""
    one = Setting(1, 8, 256)
    plain = count(PLAIN, one)
    assert plain.peak_bytes == pytest.approx(35.2 * GIB, rel=0.005)
    assert 3 * plain.flop == pytest.approx(277e12, rel=0.005)
    on_cpu = count_as_on_a_cpu(one)
    assert on_cpu.peak_bytes == pytest.approx(15.5 * GIB, rel=0.005)
    assert 3 * on_cpu.flop == pytest.approx(643e12, rel=0.005)
    kept = count(PUBLISHED, one)
    assert kept.flop == on_cpu.flop and kept.peak_bytes < on_cpu.peak_bytes
