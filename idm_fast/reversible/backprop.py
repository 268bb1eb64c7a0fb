"""A chain of couplings whose backward pass recovers what it needs instead of having stored it.

    y1, y2 = couple(body(x1), x2), x1          layer after layer

Autograd records the chain as usual, but every tensor that a body wants kept is dropped (`Segment.run`). Backward reaches the
layers from the last to the first. Each coupling node (`_Couple`) takes the layer's output streams, so x1 = y2; runs the body on
x1 once more, which refills what was dropped (`Segment.replay`); and recovers x2 from y1 and the body's output F while computing
the gradients of F, x2 and v. The recovered (x1, x2) are the output streams of the layer before; x2 is written over y1. Only the
chain's last streams are stored, by `_End`.

Because the bodies' own graph nodes run in backward, parameter gradients, hooks, shared weights and side inputs (skips,
conditioning) behave as in plain autograd, and everything that is stored goes through saved-tensor hooks, so chains nest: in
each other and in torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from idm_fast.reversible.coupling import Coupling
from idm_fast.reversible.deferred import Deferred, DeferringBody
from idm_fast.reversible.drift import Drift
from idm_fast.reversible.replay import norm_buffers_kept
from idm_fast.reversible.segment import Segment, being_compiled
from idm_fast.reversible.streams import FixedStreams, Streams, as_streams


@dataclass(frozen=True)
class Call:
    """One body with its side inputs: `body(x1, *args, **kwargs)`. Tensors in args and kwargs may carry a graph."""

    body: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def check_shape(index: int, body: object, x1: Tensor, F: Tensor | Deferred) -> None:
    """ValueError unless a body preserved the shape."""
    if F.shape != x1.shape:
        raise ValueError(
            f"body {index} ({type(body).__name__}) turned {tuple(x1.shape)} into {tuple(F.shape)}; "
            "a reversible chain needs bodies that preserve the shape"
        )


class _Body:
    """A body as a chain calls it: in the dtype that bodies get, with its shape checked; deferred where the chain takes that."""

    def __init__(self, index: int, body: Callable[..., Tensor], dtype: torch.dtype, takes_deferred: bool) -> None:
        self._index, self._body, self._dtype = index, body, dtype
        deferred = takes_deferred and isinstance(body, DeferringBody) and not body.is_watched()
        self._function: Callable[..., Tensor | Deferred] = cast(DeferringBody, body).deferred if deferred else body

    def __call__(self, x1: Tensor, *args: Any, **kwargs: Any) -> Tensor | Deferred:
        version = x1._version
        F = self._function(x1.to(self._dtype), *args, **kwargs)
        check_shape(self._index, self._body, x1, F)
        if x1._version != version:
            raise RuntimeError(
                f"body {self._index} ({type(self._body).__name__}) changed its input in place, and that input is the other "
                "stream of the next layer; make its first operation out of place (inplace=False)"
            )
        return F


class _Chain:
    """What the layers of one forward pass share: the kind of streams, and in backward the recovered ones and side inputs."""

    def __init__(self, kind: Streams, layers: list[Segment], drift: Drift | None) -> None:
        self.kind = kind
        self._drift = drift
        self.layers = layers
        self.starts_scaled = False
        """Whether `_Start` wants the first layer's input."""
        self._streams: dict[int, tuple[Tensor, Tensor]] = {}
        """(y1, y2) by layer as `kind` keeps them, present between their recovery and their use."""
        self._saved: list[Tensor | None] = []
        """Side inputs and what `kept` stores, by slot."""
        self._side_slots: list[dict[int, int]] = []
        self._stored_slots: list[range] = []
        self._first_reader: dict[int, int] = {}

    def end_forward(self) -> list[Tensor]:
        """Every tensor that backward needs besides the last streams, each once; to be given back to `begin_backward`."""
        saved: list[Tensor] = []
        slots: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            where = {}
            for position, tensor in layer.tensors.items():
                if position == 0:  # x1, which is recovered
                    continue
                slot = slots.setdefault(id(tensor), len(saved))
                if slot == len(saved):
                    saved.append(tensor)
                    self._first_reader[slot] = index
                where[position] = slot
            self._side_slots.append(where)
        for index, layer in enumerate(self.layers):
            self._stored_slots.append(range(len(saved), len(saved) + len(layer.stored)))
            self._first_reader |= dict.fromkeys(self._stored_slots[-1], index)
            saved += layer.stored
            layer.release()
        return saved

    def begin_backward(self, stored: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        self._streams[len(self.layers) - 1] = self.kind.begin_backward(stored)
        self._saved = list(saved)

    def output_streams(self, index: int) -> tuple[Tensor, Tensor]:
        """(y1, y2) of layer `index`, as `kind` keeps them. Autograd comes to every layer, from the last to the first."""
        if index not in self._streams:
            raise RuntimeError("this reversible chain was differentiated already; pass retain_graph=True to do so twice")
        return self._streams[index]

    def replay(self, index: int, x1: Tensor) -> Tensor | Deferred:
        """F of layer `index`."""
        side = {position: self._saved[slot] for position, slot in self._side_slots[index].items()}
        inputs = {0: x1} | {position: tensor for position, tensor in side.items() if tensor is not None}
        stored = [tensor for slot in self._stored_slots[index] if (tensor := self._saved[slot]) is not None]
        return self.layers[index].replay(inputs, stored)

    def leave(self, index: int, recovered: tuple[Tensor, Tensor] | None) -> None:
        """Layer `index` is done: its inputs are the output of the layer below, and what it alone reads may go."""
        self._streams.pop(index, None)
        if recovered is not None and self._drift is not None:
            self._drift.compare(index, self.kind.value(recovered[1]))
        if recovered is not None and (index > 0 or self.starts_scaled):
            self._streams[index - 1] = recovered
        for slot, first_reader in self._first_reader.items():
            if first_reader == index:
                self._saved[slot] = None


class _Couple(torch.autograd.Function):
    """y1 = coupling(F, x2; v); F is the one tensor that it is `made_of`, or `deferred`, made of several. Backward recovers the
    layer's input, refills its body's graph, and inverts the coupling."""

    @staticmethod
    def forward(
        ctx, chain: _Chain, index: int, keep: bool, deferred: Deferred | None, x1: Tensor, x2: Tensor, v: Tensor | None,
        *made_of: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.chain, ctx.index, ctx.keep, ctx.count = chain, index, keep, len(made_of)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, *((x1, x2) if keep else ()))
        return chain.kind.couple(made_of[0] if deferred is None else deferred, x2, v)

    @staticmethod
    def backward(ctx, d1: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible chain cannot be differentiated twice (create_graph=True): its tensors are recovered, not stored; "
                'use the schedule "store" for second derivatives'
            )
        chain, index, kind = ctx.chain, ctx.index, ctx.chain.kind
        v, *kept = ctx.saved_tensors
        y1, x1 = (None, kept[0]) if ctx.keep else chain.output_streams(index)
        # Even where no gradient arrives (d1 is None: only y2 was used), autograd enters the body's nodes and asks for tensors.
        F = chain.replay(index, x1 if ctx.keep else kind.value(x1))
        dF = dx2 = dv = recovered = None
        if ctx.keep:
            if d1 is not None:
                dF, dx2, dv = kind.backward(d1, F, kept[1], v)
        else:
            if d1 is None:
                x2 = kind.inverse(index, y1, F, v)
            else:
                # The last two streams are the caller's; the others were recovered here, and each is read last by its own layer.
                own = index < len(chain.layers) - 2
                x2, dF, dx2, dv = kind.uncouple(index, y1, F, d1, v, inplace=own)
            recovered = (x1, x2)
        chain.leave(index, recovered)
        return None, None, None, None, None, dx2, dv, *(dF if isinstance(dF, tuple) else (dF,) * ctx.count)


def _merge(y1: Tensor, y2: Tensor, m: Tensor) -> Tensor:
    return torch.addcmul(y1, y2, m.to(y1.dtype))


class _Start(torch.autograd.Function):
    """x2 = s·x1; x1 is not stored, the chain has recovered it when backward arrives."""

    @staticmethod
    def forward(ctx, chain: _Chain, x1: Tensor, s: Tensor) -> Tensor:
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s)
        return x1 * s.to(x1.dtype)

    @staticmethod
    def backward(ctx, d2: Tensor | None):
        (s,) = ctx.saved_tensors
        if d2 is None:
            ctx.chain.leave(-1, None)
            return None, None, None
        x1 = ctx.chain.kind.value(ctx.chain.output_streams(-1)[0])
        ctx.chain.leave(-1, None)
        return None, d2 * s.to(d2.dtype), (d2 * x1).sum().to(s.dtype).reshape(s.shape)


class _Merge(torch.autograd.Function):
    """y1 + m·y2 after a layer inside the chain; y2 is not stored, the chain has recovered it when backward arrives."""

    @staticmethod
    def forward(ctx, chain: _Chain, index: int, y1: Tensor, y2: Tensor, m: Tensor) -> Tensor:
        ctx.chain, ctx.index = chain, index
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(m)
        return _merge(y1, y2, m)

    @staticmethod
    def backward(ctx, d: Tensor | None):
        (m,) = ctx.saved_tensors
        if d is None:
            return None, None, None, None, None
        y2 = ctx.chain.kind.value(ctx.chain.output_streams(ctx.index)[1])
        return None, None, d, d * m, (d * y2).sum().to(m.dtype).reshape(m.shape)


class _End(torch.autograd.Function):
    """Identity on all that the chain returns. Stores what recovers the streams and what the bodies read besides, and hands it
    to the chain when backward begins."""

    @staticmethod
    def forward(ctx, chain: _Chain, y1: Tensor, y2: Tensor, *merged: Tensor) -> tuple[Tensor, ...]:
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        stored = chain.kind.end(y1, y2)
        ctx.stored = len(stored)
        ctx.save_for_backward(*stored, *chain.end_forward())
        return tuple(t.view_as(t) for t in (y1, y2, *merged))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        saved = ctx.saved_tensors
        ctx.chain.begin_backward(saved[: ctx.stored], saved[ctx.stored :])
        return None, *gradients


def reversible_chain(
    calls: Sequence[Call],
    coupling: Coupling | FixedStreams,
    weights: Sequence[Tensor | None],
    x1: Tensor,
    x2: Tensor | None,
    *,
    input_scale: Tensor | None = None,
    merges: Mapping[int, Tensor] | None = None,
    keep: bool = False,
    preserve_rng_state: bool = True,
    body_dtype: torch.dtype,
    drift: Drift | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the chain; its backward recomputes the bodies.

    Args:
        calls: the bodies with their side inputs.
        coupling: of the streams; `FixedStreams`, a new object for every call, makes one of fixed-point streams.
        weights: v of each layer, one element, or None for a coupling without one.
        x1, x2: streams, float32 or float64, one shape. input_scale: s, one element, for x2 = s·x1 in place of an x2.
        merges: layer → m: y1 + m·y2 after that layer is wanted too.
        keep: store each layer's input streams instead of recovering them by inversion. No drift, two tensors a layer.
        preserve_rng_state: put the generators back on replay; False saves time when no body draws random numbers.
        body_dtype: what a body is given x1 in.
        drift: is shown the streams before each layer, and in backward the recovered ones.

    Returns:
        y1, y2 of the last layer, and the merges in the order of their layers.

    Raises:
        RuntimeError: in backward, when asked for second derivatives, when a body does not do the same twice, or when a
            tensor from inside a body reached the loss past its return value.
    """
    if being_compiled(x1):
        raise RuntimeError(
            "reversible_chain cannot be compiled: saved-tensor hooks do nothing while a graph is traced; compile a "
            'ReversibleSequence, the parts of the model inside this chain, or the schedule "store"'
        )
    layers: list[Segment] = []
    chain = _Chain(as_streams(coupling), layers, drift)
    merged = []
    if x2 is None:
        assert input_scale is not None
        chain.starts_scaled = bool(calls) and not keep
        x2 = cast(Tensor, _Start.apply(chain, x1, input_scale)) if chain.starts_scaled else x1 * input_scale.to(x1.dtype)
    x1, x2 = chain.kind.begin(x1, x2)
    try:
        for index, (call, v) in enumerate(zip(calls, weights, strict=True)):
            body = _Body(index, call.body, body_dtype, chain.kind.takes_deferred)
            layer = Segment(body, call.body, (x1, *call.args), call.kwargs, preserve_rng_state, x1.device, index)
            layers.append(layer)
            F = layer.run()
            if drift is not None:
                drift.keep(x2)
            deferred, made_of = (F, F.tensors) if isinstance(F, Deferred) else (None, (F,))
            x1, x2 = _Couple.apply(chain, index, keep, deferred, x1, x2, v, *made_of), x1
            if merges and index in merges:
                m = merges[index]
                merged.append(_merge(x1, x2, m) if keep else _Merge.apply(chain, index, x1, x2, m))
            layer.tensors.pop(0)  # let go of x1
        y1, y2, *merged = _End.apply(chain, x1, x2, *merged)
    except BaseException:
        for layer in layers:
            layer.release()  # x1 leads to the chain, and the chain to its layers: a circle that Python cannot collect
        raise
    return y1, y2, merged


def plain_chain(
    calls: Sequence[Call],
    coupling: Coupling | FixedStreams,
    weights: Sequence[Tensor | None],
    x1: Tensor,
    x2: Tensor | None,
    *,
    input_scale: Tensor | None = None,
    merges: Mapping[int, Tensor] | None = None,
    body_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same function under plain autograd, which stores what it likes."""
    merged = []
    if x2 is None:
        assert input_scale is not None
        x2 = x1 * input_scale.to(x1.dtype)
    streams = as_streams(coupling)
    x1, x2 = streams.begin(x1, x2)
    for index, (call, v) in enumerate(zip(calls, weights, strict=True)):
        F = call.body(x1.to(body_dtype), *call.args, **call.kwargs)
        x1, x2 = streams.couple(F, x2, v), x1
        if merges and index in merges:
            merged.append(_merge(x1, x2, merges[index]))
    return x1, x2, merged


@torch.no_grad()
def invert_chain(
    calls: Sequence[Call],
    coupling: Coupling | FixedStreams,
    weights: Sequence[Tensor | None],
    y1: Tensor,
    y2: Tensor,
    *,
    body_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(x1, x2) from (y1, y2), all in the form that the streams are kept in, without a graph."""
    streams = as_streams(coupling)
    for index in reversed(range(len(calls))):
        call = calls[index]
        with norm_buffers_kept(call.body):
            F = call.body(streams.value(y2).to(body_dtype), *call.args, **call.kwargs)
        y1, y2 = y2, streams.inverse(index, y1, F, weights[index])
    return y1, y2
