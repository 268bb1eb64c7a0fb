"""`check_inverse=True`: the errors it reports are those of the recovered streams, and it says where they pass the tolerance."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ReversibleSequence, WiredSequence
from idm_fast.memory.count import AllocationCounter
from idm_fast.reversible.drift import TOLERANCE


class Body(nn.Module):
    """Residual, on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def chain(layers: int, **options: object) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([Body() for _ in range(layers)], **{"check_inverse": True, **options})


def streams() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(32, 16, generator=generator) for _ in range(2))
    return x1, x2


def backward(net: nn.Module, *inputs: Tensor) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = net(*inputs)
        sum(y.square().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return caught


def test_drift_is_the_error_of_the_recovered_streams() -> None:
    net, (x1, x2) = chain(12), streams()
    backward(net, x1, x2)
    # The first layer's x2 is recovered by inverting all twelve.
    with torch.no_grad():
        z2 = net.inverse(*net(x1, x2))[1]
    torch.testing.assert_close(net.drift[0], float((z2 - x2).abs().max() / x2.abs().max()))
    assert len(net.drift) == 12
    assert net.drift[0] > 10 * net.drift[-1] > 0


def test_beyond_the_tolerance_the_first_layer_met_is_named_once_with_the_remedy() -> None:
    net = chain(40)
    caught = backward(net, *streams())
    beyond = [index for index, error in enumerate(net.drift) if error > TOLERANCE]
    assert beyond
    assert len(caught) == 1
    message = str(caught[0].message)
    assert re.search(rf"layer {max(beyond)} of 0 … 39", message)
    assert "torch.float64, torch.int32" in message


@pytest.mark.parametrize("options", [{"stream_dtype": torch.float64}, {"stream_dtype": torch.int32}, {"recovery": "keep"}])
def test_remedies_keep_quiet(options: dict[str, object]) -> None:
    net = chain(32, **options)
    assert not backward(net, *streams())
    if options.get("stream_dtype") == torch.int32:
        assert net.drift == [0.0] * 32
    elif options.get("stream_dtype") == torch.float64:
        assert max(net.drift) <= 1e-6  # from 1e-16 by at most 2 a layer
    else:
        assert net.drift == []  # nothing is recovered


def test_unchecked_chain_measures_nothing_and_a_recovered_nan_is_beyond_any_tolerance() -> None:
    quiet = chain(40, check_inverse=False)
    assert not backward(quiet, *streams())
    assert quiet.drift == []
    x1, x2 = streams()
    x2[0, 0] = torch.inf
    net = chain(3)
    assert backward(net, x1, x2)
    assert math.isnan(net.drift[0])


def test_nested_chains_report_the_pass_that_was_differentiated() -> None:
    torch.manual_seed(0)
    inner = WiredSequence([Body() for _ in range(4)], check_inverse=True)
    outer = ReversibleSequence([inner, Body()])
    assert not backward(outer, *streams())
    assert all(0 < error < TOLERANCE for error in inner.drift)


def test_caller_may_write_into_its_input_afterwards() -> None:
    net, (x1, x2) = chain(4), streams()
    loss = net(x1, x2)[0].square().sum()
    x1.zero_(), x2.zero_()
    loss.backward()
    assert max(net.drift) < TOLERANCE


def test_layers_that_no_gradient_reaches_are_measured_on_the_way() -> None:
    net = chain(5).requires_grad_(False)
    net.bodies[1].requires_grad_(True)
    net.bodies[2].register_forward_hook(lambda m, args, F: F.detach())
    backward(net, *streams())
    assert [math.isnan(error) for error in net.drift] == [True, False, False, False, False]


def test_checking_costs_the_input_of_every_layer() -> None:
    def held(**options: object) -> int:
        net, (x1, x2) = chain(10, preserve_rng_state=False, **options), streams()
        counter = AllocationCounter()
        counter.ignore([x1, x2, *net.parameters()])
        with counter:
            loss = net(x1, x2)[0].sum()
            moment = counter.mark()
        del loss
        return counter.summarize([], moment)[1]

    assert held() - held(check_inverse=False) == 10 * 32 * 16 * 4
