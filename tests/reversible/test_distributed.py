"""Two gloo processes: DDP and FSDP2 around reversible chains, against the same wrappers under plain autograd and against one
process on the joined batch. The processes are started once; each test reads what they wrote."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from idm_fast import WiredSequence

TIMEOUT = 180
"""Seconds that both processes may take together; they are killed after it."""
RECOVERIES = ("store", "invert")


class Net(nn.Module):
    """A chain with a body in two places and a side input that carries a graph, between plain layers."""

    def __init__(self, recovery: str, shared: bool = True, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, 8)
        bodies = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4)]
        if shared:
            bodies[2] = bodies[0]
        self.wired = WiredSequence([Shifted(body) for body in bodies], recovery=recovery)
        self.leave = nn.Linear(8, 3)
        if unused:
            self.wired.chain.bodies[1].spare = nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(self.wired(h, shift=h.tanh()))


class Shifted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.inner(x) + shift


def batch(step: int) -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    found = {}
    for name, parameter in net.named_parameters():
        g = parameter.grad
        found[name.removeprefix("module.")] = g.full_tensor() if isinstance(g, DTensor) else None if g is None else g.clone()
    return found


def train(net: nn.Module, rank: int | None, steps: int, accumulate: bool = False) -> dict[str, Tensor | None]:
    """Gradients of the last step (of all of them, when they accumulate); `rank` takes its half of each batch."""
    for step in range(steps):
        if not accumulate:
            net.zero_grad(set_to_none=True)
        x = batch(step) if rank is None else batch(step)[2 * rank : 2 * rank + 2]
        last = step == steps - 1
        with net.no_sync() if accumulate and rank is not None and not last else nullcontext():
            net(x).square().mean().backward()
    return gradients(net)


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda net: DistributedDataParallel(net, **options)


def shard_root(net: nn.Module) -> nn.Module:
    return fully_shard(net)


def shard_bodies(net: Net, **options: Any) -> nn.Module:
    for body in net.wired.chain.bodies:
        fully_shard(body, **options)
    return fully_shard(net)


def shard_bodies_in_bfloat16(net: Net) -> nn.Module:
    return shard_bodies(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float64))


LOWERED = "fsdp, each body in bfloat16"
CASES: dict[str, tuple[Callable[[Any], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "ddp, shared weights": (ddp(), {}, {}),
    "ddp, unused parameters": (ddp(find_unused_parameters=True), {"unused": True}, {}),
    "ddp, static graph": (ddp(static_graph=True), {}, {"steps": 3}),
    "ddp, static graph, unused parameters": (ddp(static_graph=True), {"unused": True}, {"steps": 3}),
    "ddp, no_sync, gradients as views": (ddp(gradient_as_bucket_view=True), {}, {"steps": 3, "accumulate": True}),
    "ddp, small buckets": (ddp(bucket_cap_mb=0.001), {}, {"steps": 2}),
    "fsdp, root": (shard_root, {}, {"steps": 2}),
    "fsdp, each body": (shard_bodies, {"shared": False}, {"steps": 2}),
    LOWERED: (shard_bodies_in_bfloat16, {"shared": False}, {"steps": 2}),
}
"""How a net is wrapped, how it is made, and how it is trained."""


def run_cases(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[tuple[str, str], Any] = {}
    for name, (wrap, made, trained) in CASES.items():
        for recovery in RECOVERIES:
            try:
                results[name, recovery] = train(wrap(Net(recovery, **made)), rank, **{"steps": 1} | trained)
            except Exception:
                results[name, recovery] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each rank computed, by (case, recovery)."""
    folder = tmp_path_factory.mktemp("ranks")
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = torch.multiprocessing.spawn(run_cases, args=(str(folder),), nprocs=2, join=False)
    try:
        end = time.monotonic() + TIMEOUT
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"two processes did not end within {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
        if interface is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [case for case in CASES if case != LOWERED])
def test_gradients_are_those_of_plain_autograd_and_of_one_process(case: str, results: list[dict[Any, Any]]) -> None:
    _, made, trained = CASES[case]
    alone = train(Net("store", **made), None, **{"steps": 1} | trained)
    for rank in results:
        for recovery in RECOVERIES:
            found = rank[case, recovery]
            assert not isinstance(found, str), f"{recovery}:\n{found}"
            torch.testing.assert_close(without_zeros(found), without_zeros(alone), rtol=1e-9, atol=1e-11)


def test_bodies_that_fsdp_casts_to_bfloat16_are_cast_again_when_they_run_again(results: list[dict[Any, Any]]) -> None:
    stored, inverted = (results[0][LOWERED, recovery] for recovery in RECOVERIES)
    assert not isinstance(inverted, str), inverted
    # float64 streams recover what a body was given to 1e-13, so it rounds as it did before.
    torch.testing.assert_close(inverted, stored, rtol=1e-9, atol=1e-11)


def without_zeros(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """DDP gives parameters that one process leaves without a gradient a zero one, in some modes."""
    return {name: g for name, g in gradients.items() if g is not None and g.any()}
