"""The arithmetic of the cases: what counts as wrong, what is timed, what peers are asked."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.case import Context, Measurement, NotHere, Result
from benchmarks.cases import kernels, numerics, reversible_layers
from idm_fast.kernels.cost import Cost
from idm_fast.ops.registry import OPS

QUICK = Context("cpu", True)
SMALL = kernels.Level(1, 32, 16, 4)


@pytest.fixture(scope="module")
def given() -> dict[str, tuple]:
    return kernels.arguments(SMALL, "cpu")


def test_the_kernels_case_calls_every_op(given: dict[str, tuple]) -> None:
    assert set(given) == set(OPS)


def test_references_pass_their_own_check(given: dict[str, tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPILED_QUICKLY", ())
    for name, arguments in given.items():
        result = Result()
        ready = kernels.checked(result, QUICK, name, name, arguments)
        assert "reference" in ready and not result.failures, result.failures


def test_an_implementation_that_is_wrong_is_not_timed(given: dict[str, tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["couple"].implementations["reference"][0]
    monkeypatch.setattr(kernels, "contenders", lambda *_: {"right": right, "wrong": lambda F, x2, v: right(F, x2, v) + 1e-3})
    result = Result()
    assert list(kernels.checked(result, QUICK, "couple", "couple", given["couple"])) == ["right"]
    assert result.failures[0].startswith("couple by wrong: WrongResult")


def test_checking_leaves_the_arguments_of_an_op_in_place_alone(given: dict[str, tuple]) -> None:
    before = given["uncouple_"][0].clone()
    outputs = kernels.run_once("uncouple_", OPS["uncouple_"].overload, given["uncouple_"])
    assert torch.equal(given["uncouple_"][0], before) and not torch.equal(outputs[0], before)


def test_cost_is_what_the_kernels_state_and_else_every_tensor_once() -> None:
    F, x2, v = torch.empty(10), torch.empty(10), torch.empty(1)
    assert kernels.cost_of("couple", (F, x2, v), [x2]) == Cost(80, 40, 30)
    codes = torch.empty(16, dtype=torch.uint8)
    assert kernels.cost_of("unknown", (codes, 1), [codes[:2]]) == Cost(16, 2, 0)


def test_fixed_point_chains_are_exact_and_float_chains_drift() -> None:
    exact, drifting = (numerics.measure(stream, "float32", 0.45, 4, seed=0) for stream in ("fixed", "float32"))
    assert exact.recovered == exact.gradients == 0
    assert 1e-8 < drifting.recovered < 1e-4


def test_every_network_of_additive_couplings_is_one_function() -> None:
    x = peers.images()
    bodies = peers.make_bodies()
    x1, x2 = x.chunk(2, 1)
    for f, g in ((bodies[0], bodies[1]), (bodies[2], bodies[3])):
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    for who in (peers.PLAIN, peers.OURS, peers.CHECKPOINT):
        torch.testing.assert_close(peers.build(who, bodies)(x), torch.cat([x1, x2], 1))


OURS_HAS = ["gradients right", "dropout", "autocast put back", "torch.autograd.grad", "input read again", "DDP, shared weights"]


@pytest.mark.parametrize("name", OURS_HAS)
def test_ours_trains_as_plain_autograd_does(name: str) -> None:
    assert peers.forked(lambda: peers.BEHAVIOURS[name](peers.OURS)) == "yes"


class RecomputedWithoutState(torch.nn.Module):
    """What careless reversible layers do: backward runs the bodies again, without their random numbers and autocast."""

    def __init__(self, bodies: list[torch.nn.Module]) -> None:
        super().__init__()
        self.bodies = torch.nn.ModuleList(bodies)
        self.plain = peers.Plain(bodies)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = self.plain

        class Again(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, *parameters):
                ctx.x = x.detach()
                return again(ctx.x)

            @staticmethod
            def backward(ctx, dy):
                with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                    y = again(ctx.x)
                return None, *torch.autograd.grad(y, list(again.parameters()), dy.to(y.dtype))

        return Again.apply(x, *again.parameters())


@pytest.mark.parametrize("name", ["dropout", "two forwards, then backward", "autocast put back", "BatchNorm moves once"])
def test_a_careless_recompute_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = peers.build
    careless = {"x": RecomputedWithoutState}
    monkeypatch.setattr(peers, "build", lambda who, bodies: careless.get(who, partial(build, who))(bodies))
    assert peers.BEHAVIOURS["gradients right"]("x") == "yes"
    assert peers.BEHAVIOURS[name]("x") != "yes"


def test_a_behaviour_that_ends_its_process_is_said_to_crash() -> None:
    assert peers.forked(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "crashes (SIGKILL)"
    assert peers.forked(lambda: str(1 // 0)).startswith("ZeroDivisionError")
    assert peers.forked(lambda: "yes") == "yes"


def test_a_forked_process_waits_for_no_thread_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BEHAVIOUR_SECONDS", 20)
    threads = torch.get_num_threads()

    def answer() -> str:
        return str(torch.ones(1 << 20).sum().item())

    try:
        torch.set_num_threads(2)
        assert peers.forked(answer) == answer() == peers.forked(answer)
    finally:
        torch.set_num_threads(threads)


def test_allocated_counts_the_peak_and_what_was_freed() -> None:
    with peers.allocated("cpu") as peak:
        a = torch.empty(1000)
        del a
        b, c = torch.empty(500), torch.empty(800)
        del b, c
    assert peak == [4 * 1300]


def test_without_a_network_the_peers_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(reversible_layers, "VERSIONS", {"memcnn": "1.5.2"})
    with pytest.raises(NotHere, match="left out: pip could not install memcnn"):
        reversible_layers.install(tmp_path)
    assert set(reversible_layers.here(tmp_path)) >= {peers.OURS, peers.CHECKPOINT}
    assert "memcnn" not in reversible_layers.here(tmp_path)


def test_a_plot_claims_what_was_measured() -> None:
    seconds = {peers.PLAIN: [2.0, 2.0], peers.OURS: [3.0, 3.0]}
    measured = {who: {"peak": 400 if who == peers.PLAIN else 100, "error": 0.0, "seconds": s} for who, s in seconds.items()}
    result = Result()
    reversible_layers.add_figures(result, measured | {"settings": {"text": "a network"}})
    memory, time = (plot.title for plot in result.plots)
    assert all(plot.baseline in {x for points in plot.lines.values() for x, _ in points} for plot in result.plots)
    assert "75 % less memory" in memory and "1.50 times as long" in time
    assert Measurement(f"peak {peers.OURS}", "bytes", [100]) in result.measurements
