"""`torch.compile(fullgraph=True)` of a reversible chain: the compiled backward inverts and recomputes, it does not store.

Dynamo puts the chain into its graph as one call (`nonstrict_trace`), and AOTAutograd traces what `_CompiledChain` computes,
forward and backward. The saved-tensor hooks of the eager engine (backprop.py) are inert while a graph is traced, so here
backward is written out: run a body, invert its coupling, differentiate the body, go on with the layer below. A partitioner
would rather share a replay with the forward pass, which means storing; `_after` makes each replay wait for the gradient.

A graph has no generator to put back either: what random operations drew is stored, of a dropout its mask; so is what
operations inside `kept` gave.

Modules among the side inputs enter the graph as their tensors and their address: dynamo takes them as they are from torch 2.13
on alone.

What dynamo does not see it does not guard. A chain is compiled again when a `training` flag, a tensor's metadata or an option
of the chain changes; any other attribute of a body (a dropout's p, say) is read once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import nonstrict_trace
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import is_constant_class, tree_flatten, tree_map, tree_unflatten

from idm_fast.reversible.backprop import Call, check_shape
from idm_fast.reversible.constant import Constant
from idm_fast.reversible.coupling import Coupling
from idm_fast.reversible.replay import AutocastState
from idm_fast.reversible.segment import keeping
from idm_fast.reversible.streams import FixedStreams

_NONE = Constant(None)
"""Stands for None on the way into a traced call, which takes no None."""
_MODULE = Constant("module")
"""Begins the pair (_MODULE, k), which stands for module k among the side inputs on that way."""


@torch.library.custom_op("idm_fast::after", mutates_args=())
def _after(x: Tensor, gradient: Tensor) -> Tensor:
    """A copy of x, which no graph can make before `gradient` is there."""
    return x.clone()


@_after.register_fake
def _after_fake(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Notes(TorchDispatchMode):
    """Notes what random operations gave in a first run, and all operations inside `kept`; its `replay` gives it again."""

    def __init__(self, noted: list[Any] | None = None) -> None:
        super().__init__()
        self._noted: list[Any] = []
        self._given = None if noted is None else iter(noted)
        self._keeping = False

    def replay(self) -> _Notes:
        return _Notes(self._noted)

    def keep(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """`kept`: function(*inputs), noted."""
        before, self._keeping = self._keeping, True
        try:
            return function(*inputs)
        finally:
            self._keeping = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        random = torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs)
        if func.is_view or not (random or self._keeping):
            return func(*args, **kwargs)
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written not in ([], ["self"]):
            raise NotImplementedError(
                f'{func} in a body of a reversible chain cannot be compiled: it writes {written}; set recovery="store"'
            )
        dropout = func is torch.ops.aten.native_dropout.default
        if self._given is None:
            out = func(*args, **kwargs)
            # What is returned gets a graph; what is noted must have none.
            self._noted.append(out[1] if dropout else out.clone() if written else _detached(out))
            return out
        given = next(self._given)
        if dropout:  # of which the mask alone was noted
            return args[0] * given * (0.0 if args[1] == 1 else 1 / (1 - args[1])), given
        return args[0].copy_(given) if written else _detached(given)


def _detached(out: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, out)


def _draws_nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Attention counts as random for the sake of its dropout, which is usually 0."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return not (args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value))
    return False


class _Caller(nn.Module):
    """A body and the modules among its side inputs, whose tensors `functional_call` can put in place together."""

    def __init__(self, body: nn.Module, others: list[nn.Module]) -> None:
        super().__init__()
        self.body = body
        self.others = nn.ModuleList(others)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.body(*args, **kwargs)
        return out


@dataclass
class _SideModule:
    """A module among the side inputs, and what stands in the graph for its parameters and buffers."""

    module: nn.Module
    tensors: dict[str, Tensor]


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 2 and leaf[0] is _MODULE


class _Layer:
    """One body as a function of x1 and of `inputs`: its parameters and side inputs. Buffers get no gradient."""

    def __init__(
        self, index: int, call: Call, tensors: dict[str, Tensor], body_dtype: torch.dtype, modules: Sequence[_SideModule]
    ) -> None:
        assert isinstance(call.body, nn.Module)
        self.index = index
        self._body_dtype = body_dtype
        leaves, self._spec = tree_flatten((call.args, call.kwargs), is_leaf=lambda leaf: leaf is _NONE or _is_module(leaf))
        others = [modules[leaf[1]] for leaf in leaves if _is_module(leaf)]
        self._leaves = [None if leaf is _NONE else modules[leaf[1]].module if _is_module(leaf) else leaf for leaf in leaves]
        self._caller = _Caller(call.body, [other.module for other in others])
        named = {f"body.{name}": tensor for name, tensor in tensors.items()}
        for i, other in enumerate(others):
            named |= {f"others.{i}.{name}": tensor for name, tensor in other.tensors.items()}
        buffers = {f"body.{name}" for name, _ in call.body.named_buffers(remove_duplicate=False)}
        self._buffers = {name: tensor for name, tensor in named.items() if name in buffers}
        self._names = [name for name in named if name not in buffers]
        self._positions = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.inputs: list[Any] = [named[name] for name in self._names] + [self._leaves[i] for i in self._positions]
        self._autocast: AutocastState
        self._notes: _Notes

    def run(self, x1: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """F = body(x1)."""
        self._autocast, self._notes = AutocastState.capture(x1.device), _Notes()
        with self._notes, keeping(self._notes.keep):
            return self._call(x1, inputs, self._buffers)

    def replay(self, x1: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """F again, with a graph: the same draws, and buffers left as `run` left them."""
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        notes = self._notes.replay()
        with torch.enable_grad(), self._autocast.put_back(), notes, keeping(notes.keep):
            return self._call(x1, inputs, buffers)

    def _call(self, x1: Tensor, inputs: Sequence[Tensor], buffers: dict[str, Tensor]) -> Tensor:
        count = len(self._names)
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, inputs[count:], strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        state = dict(zip(self._names, inputs[:count], strict=True)) | buffers
        F: Tensor = functional_call(self._caller, state, (x1.to(self._body_dtype), *args), kwargs)
        check_shape(self.index, self._caller.body, x1, F)
        return F


@dataclass
class _Chain:
    """What forward and backward share. A tensor that several layers read stands once among the inputs of `_CompiledChain`,
    at its slot, so that its gradients are summed one by one."""

    layers: list[_Layer]
    coupling: Coupling
    keep: bool
    weight_slots: list[int | None]
    slots: list[list[int]]
    merge_slots: dict[int, int]

    def inputs(self, layer: _Layer, tensors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """v and the inputs of a layer."""
        slot = self.weight_slots[layer.index]
        return None if slot is None else tensors[slot], [tensors[slot] for slot in self.slots[layer.index]]


class _CompiledChain(torch.autograd.Function):
    """(x1, x2, every tensor that a layer reads) → (y1, y2, merges by layer)."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, x1: Tensor, x2: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        streams, merged = [x2, x1], []
        for layer in chain.layers:
            v, inputs = chain.inputs(layer, tensors)
            # With a graph as in the replay, for some functions go another way without; it also keeps bodies from changing x1.
            with torch.enable_grad():
                F = layer.run(x1.detach().requires_grad_(), inputs)
            x1, x2 = chain.coupling.forward(F.detach(), x2, v), x1
            streams.append(x1)
            if layer.index in chain.merge_slots:
                merged.append(torch.addcmul(x1, x2, tensors[chain.merge_slots[layer.index]].to(x1.dtype)))
        ctx.chain, ctx.count = chain, len(streams) if chain.keep else 2
        ctx.save_for_backward(*streams[-ctx.count :], *tensors)
        return x1, x2.view_as(x2), *merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor, *merged: Tensor) -> tuple[Tensor | None, ...]:
        chain, streams, tensors = ctx.chain, ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        sums: list[Tensor | None] = [None] * len(tensors)
        x1, y1 = streams[-2:]
        d_merged = dict(zip(sorted(chain.merge_slots), merged, strict=True))

        def add(slot: int | None, gradient: Tensor | None) -> None:
            if slot is not None and gradient is not None:
                so_far = sums[slot]
                sums[slot] = gradient if so_far is None else so_far + gradient

        for layer in reversed(chain.layers):
            v, inputs = chain.inputs(layer, tensors)
            if layer.index in d_merged:  # y1 + m·y2, and y2 is x1
                d, slot = d_merged[layer.index], chain.merge_slots[layer.index]
                m = tensors[slot]
                add(slot, (d * x1).sum().to(m.dtype).reshape(m.shape))
                d1, d2 = d1 + d, d2 + d * m.to(d.dtype)
            # Recovered by `uncouple`, x1 depends on the gradient already.
            if chain.keep or not chain.coupling.weighted or layer is chain.layers[-1]:
                x1 = _after(x1, d1)
            x = x1.detach().requires_grad_()
            slots = chain.slots[layer.index]
            leaves = {s: tensor.detach().requires_grad_(tensor.requires_grad) for s, tensor in zip(slots, inputs, strict=True)}
            F = layer.replay(x, [leaves[s] for s in slots])
            if chain.keep:
                x2 = streams[layer.index]
                dF, dx2, dv = chain.coupling.backward(d1, F.detach(), x2, v)
            else:
                x2, dF, dx2, dv = chain.coupling.uncouple(y1, F.detach(), d1, v)
            wanted = {s: leaf for s, leaf in leaves.items() if leaf.requires_grad}
            found: Sequence[Tensor | None] = [None] * (1 + len(wanted))
            if F.requires_grad:
                found = torch.autograd.grad(F, [x, *wanted.values()], dF, allow_unused=True)
            dx1 = found[0]
            for s, gradient in zip((*wanted, chain.weight_slots[layer.index]), (*found[1:], dv), strict=True):
                add(s, gradient)
            d1, d2 = (d2 if dx1 is None else dx1 + d2), dx2
            y1, x1 = x1, x2
        return None, d1, d2, *sums


@nonstrict_trace
def _traced_chain(
    bodies: Constant,
    coupling: Constant,
    weights: list[Tensor],
    state: dict[str, Tensor],
    training: str,
    side: list[tuple[Any, Any]],
    side_modules: list[tuple[int, dict[str, Tensor]]],
    x1: Tensor,
    x2: Tensor,
    merges: dict[int, Tensor],
    keep: bool,
    body_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    # The caller holds these modules while it is traced, which is when this function runs.
    modules = [_SideModule(ctypes.cast(address, ctypes.py_object).value, own) for address, own in side_modules]
    try:
        chain, tensors = _make_chain(bodies.value, coupling.value, weights, state, side, modules, merges, keep, body_dtype)
        return _CompiledChain.apply(chain, x1, x2, *tensors)
    except Exception:
        # Dynamo, which looks for the shapes here, would hide the error behind one of its own. AOTAutograd will meet it again.
        if not isinstance(x1, FakeTensor):
            raise
        return tuple(x1.clone() for _ in range(2 + len(merges)))


def _make_chain(
    bodies: nn.ModuleList,
    coupling: Coupling,
    weights: list[Tensor],
    state: dict[str, Tensor],
    side: list[tuple[Any, Any]],
    modules: list[_SideModule],
    merges: dict[int, Tensor],
    keep: bool,
    body_dtype: torch.dtype,
) -> tuple[_Chain, list[Tensor]]:
    own: list[dict[str, Tensor]] = [{} for _ in side]
    for name, tensor in state.items():
        index, _, rest = name.partition(".")
        own[int(index)][rest] = tensor
    layers = [
        _Layer(i, Call(body, *given), tensors, body_dtype, modules)
        for i, (body, given, tensors) in enumerate(zip(bodies, side, own, strict=True))
    ]
    read = (tensor for layer in layers for tensor in layer.inputs)
    unique = {id(tensor): tensor for tensor in (*weights, *merges.values(), *read)}
    slot = {key: i for i, key in enumerate(unique)}
    weight_slots: list[int | None] = [slot[id(v)] for v in weights] if weights else [None] * len(layers)
    slots = [[slot[id(tensor)] for tensor in layer.inputs] for layer in layers]
    merge_slots = {layer: slot[id(m)] for layer, m in merges.items()}
    return _Chain(layers, coupling, keep, weight_slots, slots, merge_slots), list(unique.values())


def _traceable(modules: list[nn.Module], leaf: Any) -> Any:
    """A side input as a traced call takes it; a module is put into `modules`, once."""
    if leaf is None:
        return _NONE
    if isinstance(leaf, nn.Module):
        for k, module in enumerate(modules):
            if module is leaf:
                return _MODULE, k
        modules.append(leaf)
        return _MODULE, len(modules) - 1
    if not isinstance(leaf, (Tensor, int, float, str)) and not is_constant_class(type(leaf)):
        raise TypeError(
            f"side inputs: a {type(leaf).__name__} cannot be an input of a graph; make its class an nn.Module with its tensors "
            "as buffers, or compile without it"
        )
    return leaf


def compiled_chain(
    constants: tuple[Constant, Constant],
    calls: Sequence[Call],
    streams: Coupling | FixedStreams,
    weights: Sequence[Tensor | None],
    x1: Tensor,
    x2: Tensor | None,
    *,
    input_scale: Tensor | None = None,
    merges: Mapping[int, Tensor] | None = None,
    keep: bool,
    body_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`reversible_chain` for dynamo, which traces this function.

    Args:
        constants: the chain's ModuleList and its coupling, carried by objects that were made before compilation.
        calls: the bodies with their side inputs: tensors, numbers, strings, None, modules, and containers of these.
        streams: the coupling once more; fixed-point streams are refused.
        Others, and what is returned, as in `reversible_chain`.

    Raises:
        RuntimeError: `calls` are not for the ModuleList. NotImplementedError: fixed-point streams. TypeError: a side input is
            an object that a graph cannot take.
    """
    bodies, coupling = constants
    if isinstance(streams, FixedStreams):
        raise NotImplementedError(
            "stream_dtype: chains of torch.int32 streams cannot be compiled: a compiled replay may round otherwise than its "
            "forward pass did, and then the inverse is exact no longer; use torch.float64"
        )
    if x2 is None:
        assert input_scale is not None
        x2 = x1 * input_scale.to(x1.dtype)
    if any(call.body is not body for call, body in zip(calls, bodies.value, strict=True)):
        raise RuntimeError("bodies: the list was replaced by another; compile a ReversibleSequence that was made from that one")
    modules = bodies.value
    # One walk, and few leaves: dynamo interprets it, and the flattening of what it gives, instruction by instruction.
    state: dict[str, Tensor] = {}
    training = ""
    for path, module in modules.named_modules(remove_duplicate=False):
        training += "1" if module.training else "0"
        for tensors in (module._parameters, module._buffers):
            state |= {f"{path}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}
    found: list[nn.Module] = []
    side = tree_map(partial(_traceable, found), [(call.args, call.kwargs) for call in calls])
    side_modules = [(id(module), {**dict(module.named_parameters()), **dict(module.named_buffers())}) for module in found]
    weighted = [v for v in weights if v is not None]
    wanted = {layer: merges[layer] for layer in sorted(merges)} if merges else {}
    y1, y2, *merged = _traced_chain(
        bodies, coupling, weighted, state, training, side, side_modules, x1, x2, wanted, keep, body_dtype
    )
    return y1, y2, merged
