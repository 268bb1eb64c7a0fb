"""Make the residual stacks of an existing network reversible: `make_reversible(model, example)`.

A run of residual blocks x → x + f(x) becomes RevNet's additive coupling on two streams, as in Reformer and reversible ViTs:

    x1 = x2 = x
    x1, x2 = x2 + scale·f(x1), x1     for every residual branch f
    x = (x1 + x2) / 2

This is another function of the same weights: a branch reads the stream that the branch before it wrote. Trained in this form
from the first step, with scale 1, a network learns as well as the plain one. Pre-trained weights load unchanged, but were
trained for another network, which gets worse until it is fine-tuned; scale 2, with which the output is x + Σ f as it was
(scale 1: half of that sum), makes it lose less. examples/README.md has the figures for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from idm_fast.reversible.residual import ScaledBranch, block_spans, calls_of, is_pre_norm_layer, members_of, residual_branches
from idm_fast.reversible.sequence import ReversibleSequence


class ReversibleRun(nn.Module):
    """Branches of consecutive blocks as one reversible chain: x → the same shape and dtype. Side inputs go to each."""

    def __init__(self, branches: Sequence[nn.Module], scale: float, **options: Any) -> None:
        super().__init__()
        bodies = branches if scale == 1 else [ScaledBranch(branch, scale) for branch in branches]
        self.chain = ReversibleSequence(bodies, "additive", **options)

    def forward(self, x: Tensor, *shared: Any, **shared_kw: Any) -> Tensor:
        y1, y2 = self.chain(x, x, *shared, body_dtype=x.dtype, **shared_kw)
        return ((y1 + y2) / 2).to(x.dtype)


class _Passed(nn.Module):
    """Stands, when a stack is looped over, for a block that its run has computed already."""

    def forward(self, x: Tensor, *shared: Any, **shared_kw: Any) -> Tensor:
        return x


class ReversibleStack(nn.Module):
    """What `make_reversible` turns a stack into. Its blocks stay where they were: indices and parameter names are unchanged.

    A loop over the stack meets as many modules as before: a `ReversibleRun` in the place of a run's first block, modules that
    return their input in the places of the others. `stack[i]` is the block itself, which called alone is what it always was.

    Attributes:
        runs: each reversible run by the positions of its blocks; its `run.chain.recovery` may be changed. Empty in a slice.
    """

    runs: dict[range, ReversibleRun] = {}
    _converted: tuple[nn.Module, ...] = ()
    _looped: tuple[nn.Module, ...] = ()

    def _set_runs(self, runs: dict[range, ReversibleRun]) -> None:
        self._converted = tuple(members_of(self))
        looped = list(self._converted)
        for span, run in runs.items():
            looped[span.start : span.stop] = [run, *(_Passed() for _ in span[1:])]
        self._looped = tuple(looped)
        self.runs = runs

    def __iter__(self) -> Iterator[nn.Module]:
        members = tuple(members_of(self))
        if self.runs and members != self._converted:
            raise RuntimeError("a block of this stack was replaced, added or removed after make_reversible; do that before")
        return iter(self._looped or members)

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return "\n".join(
            f"blocks {span[0]} to {span[-1]} reversible: {len(run.chain.bodies)} branches, recovery={run.chain.recovery}"
            for span, run in self.runs.items()
        )


class ReversibleSequential(ReversibleStack, nn.Sequential):
    """An `nn.Sequential` with reversible runs."""


class ReversibleModuleList(ReversibleStack, nn.ModuleList):
    """An `nn.ModuleList` with reversible runs, for a model that loops over it: `for block in self.blocks: x = block(x)`."""


_FORMS: dict[type, type[ReversibleStack]] = {nn.Sequential: ReversibleSequential, nn.ModuleList: ReversibleModuleList}


def make_reversible(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | None = None,
    *,
    blocks: type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool] | None = None,
    branches: Callable[[nn.Module], Sequence[nn.Module]] = residual_branches,
    scale: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Run every two or more consecutive residual blocks of an `nn.Sequential` or `nn.ModuleList` as one reversible chain.

    The model is changed in place and returned; its repr shows the runs. Parameters, their names and the state dict stay as
    they are; what it computes changes, see the head of this file. Outputs between the blocks of a run no longer exist, so a
    model that collects them, or that indexes its list instead of looping over it, is not served. Hooks of a block fire where
    it is one branch. Convert before compiling or sharding. In training a run keeps one branch's activations at a time and
    its two streams, whatever its length, for one forward pass of it more.

    Args:
        example: an input of the model (a tuple: positional arguments), used once in eval mode without gradients. A block is
            then a member whose output has its input's shape and which, with all its parameters at zero, returns its input;
            blocks of a run must follow each other in that pass and get the same side inputs.
        blocks: the blocks' class or classes, or a predicate, in place of the zero test. Without an example it decides alone,
            and a block that changes its shape raises at first use. Default without an example: pre-norm
            `nn.TransformerEncoderLayer`.
        branches: block → its residual branches, modules without their skip; default `residual_branches`. For a
            ViT block of another library: `lambda b: [nn.Sequential(b.norm1, b.attn), nn.Sequential(b.norm2, b.mlp)]`.
        scale: of every branch, see the head of this file: 1 to train from scratch, 2 for pre-trained weights.
        options: stream_dtype, recovery, preserve_rng_state of `ReversibleSequence`.

    Raises:
        ValueError: no two consecutive blocks were found.
    """
    chosen = _predicate(blocks, example)
    found: list[tuple[Any, dict[range, ReversibleRun]]] = []
    inside: set[nn.Module] = set()
    stacks = [stack for stack in model.modules() if type(stack) in _FORMS]
    with calls_of(model, stacks, example) as calls:
        for stack in stacks:
            members = members_of(stack)
            spans = [] if stack in inside else block_spans(members, chosen, calls)
            inside.update(part for span in spans for i in span for part in members[i].modules())
            runs = {span: ReversibleRun([f for i in span for f in branches(members[i])], scale, **options) for span in spans}
            found += [(stack, runs)] if runs else []
    if not found:
        seen = sorted({type(member).__name__ for stack in stacks for member in members_of(stack)})
        raise ValueError(
            f"no two consecutive residual blocks in the {len(stacks)} nn.Sequential and nn.ModuleList of "
            f"{type(model).__name__}, which hold {seen or 'nothing'}; looked for {_described(blocks, example)}. "
            "Name the blocks' class: make_reversible(model, blocks=Block)"
        )
    for stack, runs in found:
        stack.__class__ = _FORMS[type(stack)]
        stack._set_runs(runs)
    return model


def _predicate(blocks: Any, example: Any) -> Callable[[nn.Module], bool] | None:
    """Which members are blocks; None: those that the example shows to be."""
    if blocks is None:
        return is_pre_norm_layer if example is None else None
    return (lambda module: isinstance(module, blocks)) if isinstance(blocks, type | tuple) else blocks


def _described(blocks: Any, example: Any) -> str:
    if blocks is None and example is None:
        return "nn.TransformerEncoderLayer(norm_first=True), the default without an example"
    kind = "modules that return their input when their parameters are zero" if blocks is None else f"blocks={blocks!r}"
    return kind if example is None else f"{kind}, called one after another on the example, each keeping its input's shape"
