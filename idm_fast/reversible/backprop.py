"""A chain of couplings whose backward pass recovers what it needs instead of having stored it.

    y1, y2 = couple(body(x1), x2), x1          layer after layer

Autograd records the chain as usual, but every tensor that a body wants kept is dropped (`_Layer.run`). Backward reaches the
layers from the last to the first. Each coupling node (`_Couple`) takes the layer's output streams, so x1 = y2; runs the body on
x1 once more, which refills what was dropped; and recovers x2 from y1 and the body's output F while computing the gradients
of F, x2 and v. The recovered (x1, x2) are the output streams of the layer before. Only the chain's last streams are stored,
by `_End`.

Because the bodies' own graph nodes run in backward, parameter gradients, hooks, shared weights and side inputs (skips,
conditioning) behave as in plain autograd, and everything that is stored goes through saved-tensor hooks, so chains nest: in
each other and in torch.utils.checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from idm_fast.reversible.coupling import Coupling
from idm_fast.reversible.replay import ReplayContext


@dataclass(frozen=True)
class Call:
    """One body with its side inputs: `body(x1, *args, **kwargs)`. Tensors in args and kwargs may carry a graph."""

    body: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def check_shape(index: int, body: object, x1: Tensor, F: Tensor) -> None:
    """ValueError unless a body preserved the shape."""
    if F.shape != x1.shape:
        raise ValueError(
            f"body {index} ({type(body).__name__}) turned {tuple(x1.shape)} into {tuple(F.shape)}; "
            "a reversible chain needs bodies that preserve the shape"
        )


class _Holder:
    """Stands in the graph for a tensor that was dropped."""

    __slots__ = ("__weakref__",)


class _Layer:
    """One body of a chain, from its forward to its replay."""

    def __init__(self, index: int, call: Call, preserve_rng_state: bool, body_dtype: torch.dtype, device: torch.device):
        self.index = index
        self.body = call.body
        leaves, self._spec = tree_flatten((call.args, call.kwargs))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = {position: leaf for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._needs_grad = {position: leaf.requires_grad for position, leaf in self.tensors.items()}
        self._body_dtype = body_dtype
        self._capture = lambda: ReplayContext.capture(device, preserve_rng_state)
        self._context: ReplayContext
        self._holders: list[weakref.ref[_Holder]] = []
        self._refilled: weakref.WeakKeyDictionary[_Holder, Tensor] = weakref.WeakKeyDictionary()
        self.x1_needs_grad = False

    def _call(self, x1: Tensor, tensors: dict[int, Tensor]) -> Tensor:
        leaves = [tensors.get(position, constant) for position, constant in enumerate(self._constants)]
        args, kwargs = _unflatten(leaves, self._spec)
        F = self.body(x1.to(self._body_dtype), *args, **kwargs)
        check_shape(self.index, self.body, x1, F)
        return F

    def run(self, x1: Tensor) -> Tensor:
        """F = body(x1), recorded, with everything that autograd would store dropped."""
        self.x1_needs_grad = x1.requires_grad
        self._context = self._capture()
        version = x1._version
        with saved_tensors_hooks(self._drop, self._restore):
            F = self._call(x1, self.tensors)
        if x1._version != version:
            raise RuntimeError(
                f"body {self.index} ({type(self.body).__name__}) changed its input in place, and that input is the other "
                "stream of the next layer; make its first operation out of place (inplace=False)"
            )
        self.tensors = {}
        return F

    def replay(self, x1: Tensor, tensors: dict[int, Tensor]) -> Tensor:
        """F again, from the recovered x1; refills what `run` dropped."""
        position = 0

        def refill(tensor: Tensor) -> None:
            nonlocal position
            if position < len(self._holders):
                holder = self._holders[position]()
                if holder is not None:
                    self._refilled[holder] = tensor.detach()
            position += 1

        x1 = x1.detach().requires_grad_(self.x1_needs_grad)
        leaves = {p: t.detach().requires_grad_(self._needs_grad[p]) for p, t in tensors.items()}
        with self._context.put_back(self.body), torch.enable_grad(), saved_tensors_hooks(refill, _never):
            F = self._call(x1, leaves)
        if position != len(self._holders):
            raise RuntimeError(
                f"body {self.index} ({type(self.body).__name__}) kept {len(self._holders)} tensors in forward and {position} "
                "when it was run again; it must do the same twice, with the same requires_grad on its parameters"
            )
        return F.detach()

    def rerun(self, x1: Tensor, tensors: dict[int, Tensor]) -> Tensor:
        """F again without a graph, to invert a layer that takes no part in this backward pass."""
        with self._context.put_back(self.body), torch.no_grad():
            return self._call(x1, tensors)

    def _drop(self, tensor: Tensor) -> _Holder:
        holder = _Holder()
        self._holders.append(weakref.ref(holder))
        return holder

    def _restore(self, holder: _Holder) -> Tensor:
        if holder not in self._refilled:
            raise RuntimeError(
                f"backward entered body {self.index} ({type(self.body).__name__}) before its coupling; a body of a reversible "
                "chain may pass tensors to the loss through its return value only"
            )
        return self._refilled[holder]


def _unflatten(leaves: list[Any], spec: TreeSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


def _never(packed: object) -> Tensor:
    raise RuntimeError("the graph of a replay is thrown away and never differentiated")


class _Chain:
    """What the layers of one forward pass share: the coupling, and in backward the recovered streams and side inputs."""

    def __init__(self, coupling: Coupling, layers: list[_Layer], weights: Sequence[Tensor | None]) -> None:
        self.coupling = coupling
        self.layers = layers
        self._weights = [None if v is None else v.detach() for v in weights]
        self.streams: dict[int, tuple[Tensor, Tensor]] = {}
        """(y1, y2) by layer, present between their recovery and their use."""
        self._side: list[Tensor | None] = []
        self.side_inputs: list[Tensor] = []
        """Every tensor among the side inputs, once; emptied when `_End` has stored them."""
        self._where: list[dict[int, int]] = []
        self._first_reader: dict[int, int] = {}
        slots: dict[int, int] = {}
        for layer in layers:
            where = {}
            for position, tensor in layer.tensors.items():
                slot = slots.setdefault(id(tensor), len(self.side_inputs))
                if slot == len(self.side_inputs):
                    self.side_inputs.append(tensor)
                    self._first_reader[slot] = layer.index
                where[position] = slot
            self._where.append(where)

    def begin_backward(self, y1: Tensor, y2: Tensor, side: Sequence[Tensor]) -> None:
        self.streams[len(self.layers) - 1] = (y1, y2)
        self._side = list(side)

    def take_streams(self, index: int) -> tuple[Tensor, Tensor]:
        """Output streams of layer `index`; layers above that this backward pass skipped are inverted on the way."""
        if index not in self.streams:
            start = min((i for i in self.streams if i > index), default=None)
            if start is None:
                raise RuntimeError("this reversible chain was differentiated already; pass retain_graph=True to do so twice")
            for i in range(start, index, -1):
                y1, x1 = self.streams[i]
                F = self.layers[i].rerun(x1, self.side(i))
                self.streams[i - 1] = (x1, self.coupling.inverse(y1, F, self._weights[i]))
        return self.streams.pop(index)

    def side(self, index: int) -> dict[int, Tensor]:
        tensors = {position: self._side[slot] for position, slot in self._where[index].items()}
        return {position: tensor for position, tensor in tensors.items() if tensor is not None}

    def release_side(self, index: int) -> None:
        """Let go of side inputs that no layer below `index` reads."""
        for slot, first_reader in self._first_reader.items():
            if first_reader == index:
                self._side[slot] = None


class _Couple(torch.autograd.Function):
    """y1 = coupling(F, x2; v). Backward recovers the layer's input, refills its body's graph, and inverts the coupling."""

    @staticmethod
    def forward(ctx, chain: _Chain, index: int, keep: bool, F: Tensor, x1: Tensor, x2: Tensor, v: Tensor | None) -> Tensor:
        ctx.chain, ctx.index, ctx.keep = chain, index, keep
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, *((x1, x2) if keep else ()))
        return chain.coupling.forward(F, x2, v)

    @staticmethod
    def backward(ctx, d1: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible chain cannot be differentiated twice (create_graph=True): its tensors are recovered, not stored; "
                'use the schedule "store" for second derivatives'
            )
        chain, index, layer = ctx.chain, ctx.index, ctx.chain.layers[ctx.index]
        v, *kept = ctx.saved_tensors
        y1, x1 = (None, kept[0]) if ctx.keep else chain.take_streams(index)
        # Even where no gradient arrives (d1 is None: only y2 was used), autograd enters the body's nodes and asks for tensors.
        F = layer.replay(x1, chain.side(index))
        dF = dx2 = dv = None
        if ctx.keep:
            if d1 is not None:
                dF, dx2, dv = chain.coupling.backward(d1, F, kept[1], v)
        else:
            if d1 is None:
                x2 = chain.coupling.inverse(y1, F, v)
            else:
                x2, dF, dx2, dv = chain.coupling.uncouple(y1, F, d1, v)
            if index > 0:
                chain.streams[index - 1] = (x1, x2)
        chain.release_side(index)
        return None, None, None, dF, None, dx2, dv


class _End(torch.autograd.Function):
    """Identity on the last streams. Stores them and the side inputs, and hands them to the chain when backward begins."""

    @staticmethod
    def forward(ctx, chain: _Chain, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y1, y2, *chain.side_inputs)
        chain.side_inputs = []
        return y1.view_as(y1), y2.view_as(y2)

    @staticmethod
    def backward(ctx, d1: Tensor, d2: Tensor):
        y1, y2, *side = ctx.saved_tensors
        ctx.chain.begin_backward(y1, y2, side)
        return None, d1, d2


def being_compiled(x: Tensor) -> bool:
    """Whether dynamo traces the caller, or AOTAutograd does, from inside a call that dynamo left to it."""
    return torch.compiler.is_dynamo_compiling() or isinstance(x, FunctionalTensor)


def reversible_chain(
    calls: Sequence[Call],
    coupling: Coupling,
    weights: Sequence[Tensor | None],
    x1: Tensor,
    x2: Tensor,
    *,
    keep: bool = False,
    preserve_rng_state: bool = True,
    body_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the chain; its backward recomputes the bodies.

    Args:
        calls: the bodies with their side inputs.
        weights: v of each layer, one element, or None for a coupling without one.
        x1, x2: streams, float32 or float64, one shape.
        keep: store each layer's input streams instead of recovering them by inversion. No drift, two tensors a layer.
        preserve_rng_state: put the generators back on replay; False saves time when no body draws random numbers.
        body_dtype: what a body is given x1 in.

    Returns:
        y1, y2 of the last layer.

    Raises:
        RuntimeError: in backward, when asked for second derivatives, when a body does not do the same twice, or when a
            tensor from inside a body reached the loss past its return value.
    """
    if being_compiled(x1):
        raise RuntimeError(
            "reversible_chain cannot be compiled: saved-tensor hooks do nothing while a graph is traced; compile a "
            'ReversibleSequence, the parts of the model inside this chain, or the schedule "store"'
        )
    layers = [_Layer(i, call, preserve_rng_state, body_dtype, x1.device) for i, call in enumerate(calls)]
    chain = _Chain(coupling, layers, weights)
    for layer, v in zip(layers, weights, strict=True):
        F = layer.run(x1)
        x1, x2 = _Couple.apply(chain, layer.index, keep, F, x1, x2, v), x1
    return _End.apply(chain, x1, x2)


def plain_chain(
    calls: Sequence[Call],
    coupling: Coupling,
    weights: Sequence[Tensor | None],
    x1: Tensor,
    x2: Tensor,
    *,
    body_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same function under plain autograd, which stores what it likes."""
    for call, v in zip(calls, weights, strict=True):
        F = call.body(x1.to(body_dtype), *call.args, **call.kwargs)
        x1, x2 = coupling.forward(F, x2, v), x1
    return x1, x2


@torch.no_grad()
def invert_chain(
    calls: Sequence[Call],
    coupling: Coupling,
    weights: Sequence[Tensor | None],
    y1: Tensor,
    y2: Tensor,
    *,
    body_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(x1, x2) from (y1, y2), without a graph."""
    for call, v in zip(reversed(calls), reversed(weights), strict=True):
        F = call.body(y2.to(body_dtype), *call.args, **call.kwargs)
        y1, y2 = y2, coupling.inverse(y1, F, v)
    return y1, y2
