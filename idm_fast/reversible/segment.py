"""A part of a network that backward runs again: what its first run drops, its second run refills.

`Segment.run` records the part with autograd as usual, but every tensor that autograd wants kept is dropped: a holder stands
in the graph for it. `Segment.replay` runs the part once more from the same inputs, and each tensor that is saved again
refills its holder. The graph that is differentiated is that of the first run, so hooks, shared weights and side inputs
behave as in plain autograd.

`recompute` is one such part by itself; a reversible chain (`backprop.py`) has one a layer; `kept` exempts a result inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from idm_fast.reversible.replay import ReplayContext

Result = TypeVar("Result")

_keeper: ContextVar[Callable[..., Any] | None] = ContextVar("what `kept` does in the segment that is being run", default=None)


def being_compiled(x: Tensor) -> bool:
    """Whether dynamo traces the caller, or AOTAutograd does, from inside a call that dynamo left to it."""
    return torch.compiler.is_dynamo_compiling() or isinstance(x, FunctionalTensor)


def kept(function: Callable[..., Result], *inputs: Tensor) -> Result:
    """function(*inputs), its results stored by the reversible layer around it instead of being computed again in backward.

    For what is dear to compute and small to keep, such as attention; the inputs are recomputed as ever. Outside of a
    reversible layer and of `recompute`, and in a compiled `recompute`, this is function(*inputs).

    Args:
        function: returns a tensor, or a tuple of them. It must reach nothing that carries a graph besides its inputs.
        inputs: tensors.
    """
    keeper = None if torch.compiler.is_dynamo_compiling() else _keeper.get()
    return function(*inputs) if keeper is None else cast(Result, keeper(function, inputs))


@contextmanager
def keeping(keeper: Callable[..., Any] | None) -> Iterator[None]:
    """Within, `kept(function, *inputs)` is keeper(function, inputs); None: function(*inputs)."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


def recompute(function: Callable[..., Tensor], *args: Any, preserve_rng_state: bool = True, **kwargs: Any) -> Tensor:
    """function(*args, **kwargs); backward runs it again instead of having stored what is inside.

    torch.utils.checkpoint without reentrance, which also puts back the choice of implementation and honours `kept`. Under
    torch.compile it is that function.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)
        return cast(Tensor, result)
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    if tensors and being_compiled(tensors[0]):
        return function(*args, **kwargs)  # inside of a compiled chain, which runs all of it again
    segment = Segment(function, function, args, kwargs, preserve_rng_state, _device_of(tensors))
    result = segment.run()
    return cast(Tensor, _Recompute.apply(segment, result))


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Whose random numbers and autocast a function of `tensors` depends on: the first accelerator's among theirs, with lengths
    or an index on the CPU beside them. Without any it may reach other tensors, on the current accelerator where there is one.
    """
    accelerated = [t.device for t in tensors if t.device.type not in ("cpu", "meta")]
    if accelerated or tensors:
        return (accelerated or [tensors[0].device])[0]
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class _Recompute(torch.autograd.Function):
    """Identity on a segment's result. Stores the segment's inputs, and runs it again when backward arrives."""

    @staticmethod
    def forward(ctx, segment: Segment, result: Tensor) -> Tensor:
        ctx.segment, ctx.positions = segment, list(segment.tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*segment.tensors.values(), *segment.stored)
        segment.release()
        return result.view_as(result)

    @staticmethod
    def backward(ctx, d: Tensor):
        saved = ctx.saved_tensors
        inputs = dict(zip(ctx.positions, saved, strict=False))
        ctx.segment.replay(inputs, saved[len(inputs) :], result_wanted=False)
        return None, d


class _Holder:
    """Stands in the graph for a tensor that was dropped."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True)
class _View:
    """A tensor that `kept` need not store, for it lies within one of its inputs.

    Attributes:
        number: of the input. strides: of the input.
        size, stride, offset: of the tensor; the offset is from the input's first element.
    """

    number: int
    strides: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @torch.no_grad()
    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        source = inputs[self.number]
        if source.stride() != self.strides:  # a recovered stream need not lie in memory as the first one did
            source = source.new_empty_strided(source.shape, self.strides).copy_(source)
        return source.as_strided(self.size, self.stride, source.storage_offset() + self.offset)


class _Place(NamedTuple):
    """Where a tensor lies in memory: its storage, and its first and last element there."""

    storage: int
    dtype: torch.dtype
    first: int
    last: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor) -> _Place:
        first = int(t.storage_offset())
        last = first + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        return cls(t.untyped_storage()._cdata, t.dtype, first, last, t.stride())


def _view_within(places: Sequence[_Place], tensor: Tensor) -> _View | None:
    """`tensor` as a view of one of the inputs that lie at `places`."""
    own = _Place.of(tensor)
    for number, place in enumerate(places):
        if own[:2] == place[:2] and place.first <= own.first and own.last <= place.last:
            return _View(number, place.strides, tuple(tensor.shape), own.strides, own.first - place.first)
    return None


@dataclass(frozen=True)
class _KeptCall:
    """One use of `kept`: where its graph finds the tensors that it wants, and what it returned."""

    sources: list[_View | int]
    """Views of inputs, and numbers of stored tensors."""
    results: list[tuple[int, bool]]
    """(number of a stored tensor, requires_grad)."""
    spec: TreeSpec


class _Filled(Exception):
    """Every holder is filled; the rest of the replay would be for nothing."""


class Segment:
    """function(*args, **kwargs), from its run to its replay.

    Args:
        function: what is run; it returns a tensor or a `Deferred`.
        module: whose norm buffers a replay must not move, and whose name errors give.
        preserve_rng_state: put the generators back on replay.
        device: whose generators and autocast are put back.
        index: of the layer, for errors.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        module: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        preserve_rng_state: bool,
        device: torch.device,
        index: int | None = None,
    ) -> None:
        self._function, self._module = function, module
        kind = "recomputed part" if index is None else f"body {index}"
        self.name = f"{kind} ({getattr(module, '__qualname__', type(module).__name__)})"
        leaves, self._spec = tree_flatten((args, kwargs))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = {position: leaf for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        """The tensors among args and kwargs, until `release`."""
        self._needs_grad = {position: leaf.requires_grad for position, leaf in self.tensors.items()}
        self._capture = lambda: ReplayContext.capture(device, preserve_rng_state)
        self._context: ReplayContext
        self._holders: list[weakref.ref[_Holder]] = []
        self._refilled: weakref.WeakKeyDictionary[_Holder, tuple[Tensor, int]] = weakref.WeakKeyDictionary()
        self._kept_calls: list[_KeptCall] = []
        self.stored: list[Tensor] = []
        """What `kept` asks to store; the owner saves it and gives it back to `replay`."""
        self._stored_versions: list[int] = []

    def release(self) -> None:
        """The owner has saved `tensors` and `stored`."""
        self.tensors, self.stored = {}, []

    def run(self) -> Any:
        """The result, recorded, with everything that autograd would store dropped."""
        self._context = self._capture()
        with keeping(self._keep), saved_tensors_hooks(self._drop, self._restore):
            result = self._call(self.tensors)
        if [tensor._version for tensor in self.stored] != self._stored_versions:
            raise RuntimeError(f"{self.name} changed in place what `kept` returned; use the operation that is not in place")
        return result

    def replay(self, tensors: dict[int, Tensor], stored: Sequence[Tensor], result_wanted: bool = True) -> Any:
        """The result again, without a graph; refills what `run` dropped. Without `result_wanted` it stops when that is done."""
        position, calls = 0, iter(self._kept_calls)
        different = RuntimeError(
            f"{self.name} kept {len(self._holders)} tensors in forward and not as many when it was run again; it must do the "
            "same twice, with the same requires_grad on its parameters"
        )

        def refill(tensor: Tensor) -> None:
            nonlocal position
            if position == len(self._holders):
                raise different
            holder = self._holders[position]()
            if holder is not None:
                self._refilled[holder] = tensor.detach(), tensor._version
            position += 1
            if position == len(self._holders) and not result_wanted:
                raise _Filled

        def keep(_: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
            call = next(calls, None)
            if call is None:
                raise different
            results = [stored[number].detach().requires_grad_(needs_grad) for number, needs_grad in call.results]
            for source in call.sources:
                refill(source.of(inputs) if isinstance(source, _View) else stored[source])
            return tree_unflatten(results, call.spec)

        leaves = {p: t.detach().requires_grad_(self._needs_grad[p]) for p, t in tensors.items()}
        try:
            with keeping(keep), self._context.put_back(self._module), torch.enable_grad(), saved_tensors_hooks(refill, _never):
                result = self._call(leaves).detach() if self._holders or result_wanted else torch.empty(0)
        except _Filled:
            return torch.empty(0)
        if position != len(self._holders):
            raise different
        return result

    def _call(self, tensors: dict[int, Tensor]) -> Any:
        leaves = [tensors.get(position, constant) for position, constant in enumerate(self._constants)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return self._function(*args, **kwargs)

    def _drop(self, tensor: Tensor) -> _Holder:
        holder = _Holder()
        self._holders.append(weakref.ref(holder))
        return holder

    def _restore(self, holder: _Holder) -> Tensor:
        if holder not in self._refilled:
            raise RuntimeError(
                f"backward entered {self.name} before its result; a part that is run again may pass tensors to the loss "
                "through its return value only, and with retain_graph=True read ctx.saved_tensors once a backward"
            )
        tensor, version = self._refilled[holder]
        if torch._C._autograd._get_current_graph_task_keep_graph():  # the holder stays, for a next time that refills it
            del self._refilled[holder]
        if tensor._version != version:
            raise RuntimeError(f"{self.name} changed in place a tensor that its backward needs, as plain autograd would say")
        return tensor

    def _keep(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """`kept` in the first run: what the function saves and returns is an input or is stored."""
        sources: list[_View | int] = []
        places = [_Place.of(tensor) for tensor in inputs]  # autograd holds on to `drop`, which must not hold on to the inputs

        def drop(tensor: Tensor) -> _Holder:
            sources.append(_view_within(places, tensor) or self._store(tensor))
            return self._drop(tensor)

        with keeping(None), saved_tensors_hooks(drop, self._restore):
            results, spec = tree_flatten(function(*inputs))
        returned = [(self._store(result), result.requires_grad) for result in results]
        self._kept_calls.append(_KeptCall(sources, returned, spec))
        return tree_unflatten(results, spec)

    def _store(self, tensor: Tensor) -> int:
        def place(t: Tensor) -> tuple[Any, ...]:
            return t.untyped_storage()._cdata, t.size(), t.stride(), t.storage_offset(), t.dtype

        for number, stored in enumerate(self.stored):
            if place(stored) == place(tensor):
                return number
        self.stored.append(tensor.detach())
        self._stored_versions.append(tensor._version)
        return len(self.stored) - 1


def _never(packed: object) -> Tensor:
    raise RuntimeError("the graph of a replay is thrown away and never differentiated")
