"""Reversible libraries and torch.utils.checkpoint as one network, and what each of them does in training.

`python -m benchmarks.peers behaviours WHO` and `python -m benchmarks.peers measure DEVICE quick|full` print JSON. Each
behaviour runs in a forked process, because one library ends the process in one of them. The peers come from PYTHONPATH; the
case `reversible_layers` puts them there.

The network is RevNet's: on halves (x1, x2) of the channels, x1 += f(x2) and x2 += g(x1) in turn, the same function in every
library. momentumnet has another network (x += s, s = γ·s + (1−γ)·f(x)) and is held against its own plain twin.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.case import in_a_line
from benchmarks.timing import take_turns

PLAIN, OURS, CHECKPOINT = "plain autograd", "idm-fast", "torch checkpoint"
WHO = (OURS, CHECKPOINT, "memcnn", "revlib", "RevTorch", "momentumnet")
GAMMA = 0.9
BEHAVIOUR_SECONDS = 60
WRONG = 1e-3
"""Relative error beyond which a float32 gradient of four layers is wrong rather than rounded."""


class Body(nn.Module):
    """GroupNorm or BatchNorm, SiLU, convolution, and dropout where asked; it notes whether autocast was on at each call."""

    def __init__(self, channels: int, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.autocast: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.autocast.append(torch.is_autocast_enabled(x.device.type))
        return self.dropout(self.conv(F.silu(self.norm(x))))


class Plain(nn.Module):
    """The network in plain autograd; with `again`, each pair of bodies behind torch.utils.checkpoint."""

    def __init__(self, bodies: list[nn.Module], again: bool = False) -> None:
        super().__init__()
        self.bodies, self.again = nn.ModuleList(bodies), again

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        for k in range(0, len(self.bodies), 2):
            x1, x2 = checkpoint(self.pair, k, x1, x2, use_reentrant=False) if self.again else self.pair(k, x1, x2)
        return torch.cat([x1, x2], 1)

    def pair(self, k: int, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        x1 = x1 + self.bodies[k](x2)
        return x1, x2 + self.bodies[k + 1](x1)


class Ours(nn.Module):
    def __init__(self, bodies: list[nn.Module]) -> None:
        super().__init__()
        from idm_fast import ReversibleSequence

        self.chain = ReversibleSequence(bodies, coupling="additive")

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y2, y1 = self.chain(x2, x1)
        return torch.cat([y1, y2], 1)


class OnFirstHalf(nn.Module):
    """A network on the first half of the channels; momentumnet has its second stream inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        return torch.cat([self.network(x1.contiguous()), x2], 1)


def build(who: str, bodies: list[nn.Module]) -> nn.Module:
    """The network of `who`. ImportError when it is not there."""
    if who == OURS:
        return Ours(bodies)
    if who in (PLAIN, CHECKPOINT):
        return Plain(bodies, again=who == CHECKPOINT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if who == "memcnn":
            import memcnn

            pairs = [memcnn.AdditiveCoupling(f, g) for f, g in zip(bodies[::2], bodies[1::2], strict=True)]
            wrapped = [memcnn.InvertibleModuleWrapper(pair, keep_input=False, preserve_rng_state=True) for pair in pairs]
            return nn.Sequential(*wrapped)
        if who == "revlib":
            import revlib

            return revlib.ReversibleSequential(*bodies, split_dim=1)
        if who == "RevTorch":
            import revtorch

            blocks = zip(bodies[::2], bodies[1::2], strict=True)
            made = [revtorch.ReversibleBlock(f, g, split_along_dim=1, fix_random_seed=True) for f, g in blocks]
            return revtorch.ReversibleSequence(nn.ModuleList(made))
        import momentumnet

        return OnFirstHalf(momentumnet.MomentumNet(bodies, gamma=GAMMA, use_backprop=False))


def twin(who: str, bodies: list[nn.Module]) -> nn.Module:
    """The same function in plain autograd."""
    if who != "momentumnet":
        return build(PLAIN, bodies)
    import momentumnet

    return OnFirstHalf(momentumnet.MomentumNet(bodies, gamma=GAMMA, use_backprop=True))


def gradients(net: nn.Module, bodies: list[nn.Module], loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """All parameters' gradients of loss(net) by .backward(), in one vector."""
    parameters = list(dict.fromkeys(p for body in bodies for p in body.parameters()))
    torch.manual_seed(1)
    loss(net).backward()
    found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.detach().flatten().clone() for p in parameters])
    for p in parameters:
        p.grad = None
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compared(who: str, loss: Callable[[nn.Module], Tensor], **body: Any) -> str:
    """"yes" when the gradients are those of plain autograd."""
    bodies = make_bodies(**body)
    twins = copy.deepcopy(bodies)
    expected = gradients(twin(who, twins), twins, loss)
    return verdict(difference(gradients(build(who, bodies), bodies, loss), expected))


def verdict(error: float) -> str:
    return "yes" if error <= WRONG else f"wrong gradient (off by {100 * error:.2g} %)"


def make_bodies(channels: int = 8, depth: int = 4, **body: Any) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Body(channels, **body) for _ in range(depth)]


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def squared(net: nn.Module, seed: int = 0) -> Tensor:
    return net(images(seed)).square().mean()


def gradients_right(who: str) -> str:
    return compared(who, squared)


def dropout(who: str) -> str:
    return compared(who, squared, dropout=0.5)


def two_forwards(who: str) -> str:
    return compared(who, lambda net: net(images(0)).square().mean() + net(images(1)).square().mean(), dropout=0.5)


def input_without_grad(who: str) -> str:
    return compared(who, lambda net: net(images().detach()).square().mean())


def input_read_again(who: str) -> str:
    def loss(net: nn.Module) -> Tensor:
        x = images() * 1.0
        y = net(x)
        return (y * x.square().sum()).mean() + (x * x).mean()

    return compared(who, loss)


def autocast_put_back(who: str) -> str:
    bodies = make_bodies()
    with torch.autocast("cpu", torch.bfloat16):
        loss = squared(build(who, bodies))
    loss.float().backward()
    replayed = [on for body in bodies for on in body.autocast]
    return "yes" if all(replayed) else f"no: {replayed.count(False)} of {len(replayed)} calls ran without it"


def autograd_grad(who: str) -> str:
    bodies = make_bodies()
    twins = copy.deepcopy(bodies)
    expected = gradients(twin(who, twins), twins, squared)
    parameters = [p for body in bodies for p in body.parameters()]
    found = torch.autograd.grad(squared(build(who, bodies)), parameters)
    if any(p.grad is not None for p in parameters):
        return "no: it fills .grad"
    return verdict(difference(torch.cat([g.flatten() for g in found]), expected))


def ddp_shared_weights(who: str) -> str:
    """Two processes with an image each; the second is forked here and ends with the first."""
    with tempfile.TemporaryDirectory() as folder:
        second = os.fork()
        if second == 0:
            try:
                ddp_gradients(who, 1, folder)
            finally:
                os._exit(0)
        try:
            found = ddp_gradients(who, 0, folder)
        finally:
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)
    twins = [make_bodies(depth=1)[0]] * 4
    return verdict(difference(found, gradients(twin(who, twins), twins, lambda net: (squared(net, 0) + squared(net, 1)) / 2)))


def ddp_gradients(who: str, rank: int, folder: str) -> Tensor:
    """The gradients that the process `rank` of two ends up with, one body being four layers."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    limit = timedelta(seconds=BEHAVIOUR_SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    bodies = make_bodies(depth=1) * 4
    net = DistributedDataParallel(build(who, bodies))
    found = gradients(net, bodies, lambda net: squared(net, rank))
    dist.barrier()  # neither leaves while the other still reduces
    return found


def fullgraph(who: str) -> str:
    bodies = make_bodies()
    twins = copy.deepcopy(bodies)
    expected = gradients(twin(who, twins), twins, squared)
    compiled = torch.compile(build(who, bodies), backend="aot_eager", fullgraph=True)
    return verdict(difference(gradients(compiled, bodies, squared), expected))


def double_backward(who: str) -> str:
    def second(net: nn.Module, bodies: list[nn.Module]) -> Tensor:
        parameters = [p for body in bodies for p in body.parameters()]
        torch.manual_seed(1)
        first = torch.autograd.grad(squared(net), parameters, create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    bodies = make_bodies()
    twins = copy.deepcopy(bodies)
    return verdict(difference(second(build(who, bodies), bodies), second(twin(who, twins), twins)))


def batch_norm_once(who: str) -> str:
    bodies = make_bodies(batch_norm=True)
    squared(build(who, bodies)).backward()
    moved = sorted({int(body.norm.num_batches_tracked) for body in bodies})  # type: ignore[union-attr, arg-type]
    return "yes" if moved == [1] else f"no: {' or '.join(map(str, moved))} times"


BEHAVIOURS: dict[str, Callable[[str], str]] = {
    "gradients right": gradients_right,
    "dropout": dropout,
    "two forwards, then backward": two_forwards,
    "autocast put back": autocast_put_back,
    "torch.autograd.grad": autograd_grad,
    "input without grad": input_without_grad,
    "input read again": input_read_again,
    "DDP, shared weights": ddp_shared_weights,
    "compiles with fullgraph": fullgraph,
    "double backward": double_backward,
    "BatchNorm moves once": batch_norm_once,
}


def behaviours(who: str) -> dict[str, str]:
    """What each behaviour comes to: "yes", or what happens instead."""
    build(who, make_bodies())  # ImportError here, once
    return {name: forked(lambda function=function: function(who)) for name, function in BEHAVIOURS.items()}


def forked(function: Callable[[], str]) -> str:
    """function() of a forked process: what it returns, its exception, or the signal that ended it."""
    with tempfile.NamedTemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                warnings.simplefilter("ignore")
                torch.set_num_threads(1)  # OpenMP's threads stayed behind: to wait for them would be forever
                try:
                    text = function()
                except BaseException as error:
                    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                answer.write(text)
                answer.flush()
                os._exit(0)
        ended = waited(child)
        answer.seek(0)
        return answer.read() or ended


def waited(child: int) -> str:
    """How the process ended; one that takes too long is ended."""
    deadline = time.monotonic() + BEHAVIOUR_SECONDS
    while time.monotonic() < deadline:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return f"crashes ({signal.Signals(os.WTERMSIG(status)).name})" if os.WIFSIGNALED(status) else "no answer"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"stopped after {BEHAVIOUR_SECONDS} s"


@contextlib.contextmanager
def allocated(device: str) -> Iterator[list[int]]:
    """Appends the peak of bytes allocated within, at the end: from the profiler's allocator events, or CUDA's count."""
    peak: list[int] = []
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    peak.append(most)


def measure(device: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Peak bytes, seconds of each step, gradient error against float64 of each library, or why not, on one network."""
    # TF32, PyTorch's default for a GPU's convolutions, is off by more than what is allowed here.
    torch.backends.cudnn.allow_tf32 = False
    batch, channels, side, depth = (16, 128, 64, 16) if device == "cuda" else (2, 16, 32, 8) if quick else (4, 32, 48, 16)
    x = torch.randn(batch, 2 * channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    settings = f"{depth} bodies (GroupNorm, SiLU, 3×3 convolution) of {channels} channels, batch {batch}, {side}²"

    def failed(who: str, problem: Exception) -> None:
        found[who] = {"failure": in_a_line(problem)}

    for who in (PLAIN, *WHO):
        try:
            bodies = [body.to(device) for body in make_bodies(channels, depth)]
            net = build(who, bodies)
            exact = [body.double() for body in copy.deepcopy(bodies)]
            step = one_step(net, x)
            reference = one_step(twin(who, exact), x.double())
            error = difference(step_gradients(step, bodies), step_gradients(reference, exact))
            if not error <= WRONG:
                found[who] = {"failure": f"gradients are off by {error:.2g}: not timed"}
                continue
            for body in bodies:
                body.zero_grad()
            with allocated(device) as peak:
                step()
            parameters = sum(p.nbytes for body in bodies for p in body.parameters())
            found[who] = {"peak": peak[0] - parameters, "error": error}
            steps[who] = step
        except Exception as problem:
            failed(who, problem)
    for who, samples in take_turns(steps, device, 3 if quick else 30, least=5, failed=failed).items():
        found[who]["seconds"] = samples
    found["settings"] = {"text": settings}
    return found


def one_step(net: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        net(x.clone().requires_grad_()).square().mean().backward()

    return step


def step_gradients(step: Callable[[], None], bodies: list[nn.Module]) -> Tensor:
    for body in bodies:
        body.zero_grad()
    step()
    return torch.cat([p.grad.double().flatten() for body in bodies for p in body.parameters() if p.grad is not None])


def main(what: str, *arguments: str) -> None:
    warnings.simplefilter("ignore")
    if what == "behaviours":
        answer: Any = behaviours(arguments[0])
    else:
        answer = measure(arguments[0], arguments[1] == "quick")
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
