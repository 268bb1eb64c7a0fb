"""Half-precision copies of weights, made once a step: in forward, in every replay, in every sampling step they are the same.

Autocast keeps such copies too, but forgets them when its context ends, so each replay would make them again: a third of all
launches of a training step of IDM. A `replay` puts back what was in force here, as it does for autocast itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Casts = dict[int, Tensor]
"""id of a weight → its copy."""

_casts: ContextVar[Casts | None] = ContextVar("half-precision copies of weights", default=None)


class _CastTogether(torch.autograd.Function):
    """Copies of all tensors in `dtype`, in one call; gradients go back in the tensors' own dtypes, in one call."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, list(tensors))
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        given = [(i, d) for i, d in enumerate(gradients) if d is not None]
        results: list[Tensor | None] = [None] * len(gradients)
        copies = [torch.empty_like(d, dtype=ctx.dtypes[i]) for i, d in given]
        if given:
            torch._foreach_copy_(copies, [d for _, d in given])
        for (i, _), copy in zip(given, copies, strict=True):
            results[i] = copy
        return None, *results


@contextmanager
def cast_once(groups: Iterable[Iterable[Tensor]], dtype: torch.dtype) -> Iterator[None]:
    """Within, and in every replay of what runs within, `cast` finds copies of these weights in `dtype`.

    The gradients of a group arrive together, when the last of its weights has its own; a group is best a part of the network
    that is done at one time.
    """
    casts: Casts = {}
    for group in groups:
        weights = [weight for weight in group if weight.dtype != dtype]
        casts |= zip(map(id, weights), _CastTogether.apply(dtype, *weights), strict=True) if weights else ()
    with put_back(casts):
        yield


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`: the step's copy where there is one."""
    if weight.dtype == dtype:
        return weight
    copy = None if torch.compiler.is_dynamo_compiling() else (_casts.get() or {}).get(id(weight))
    return weight.to(dtype) if copy is None or copy.dtype != dtype else copy


def in_force() -> Casts | None:
    return _casts.get()


@contextmanager
def put_back(casts: Casts | None) -> Iterator[None]:
    token = _casts.set(casts)
    try:
        yield
    finally:
        _casts.reset(token)
