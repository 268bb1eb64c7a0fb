"""An output F of a body that is never in memory: the convex coupling makes it on the fly, in its own pass over the streams.

A chain that inverts (`recovery="invert"` or `"keep"`, floating-point streams, convex coupling, not compiled) asks a
`DeferringBody` for a `Deferred` in place of F, unless someone has hooked the body and so wants to see F. It pays for a body
that ends in something cheap, such as a residual: F need not be written and read again, in forward and in backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Deferred(ABC):
    """F as the tensors that it is made of."""

    tensors: tuple[Tensor, ...]
    """They may carry a graph; their gradients come back through the coupling."""
    shape: torch.Size
    """Of F."""

    @abstractmethod
    def detach(self) -> Deferred:
        """The same of tensors without a graph."""

    @abstractmethod
    def couple(self, x2: Tensor, v: Tensor) -> Tensor:
        """y1 = (1−v)·F + v·x2."""

    @abstractmethod
    def inverse(self, y1: Tensor, v: Tensor) -> Tensor:
        """x2 = (y1 − (1−v)·F)/v."""

    @abstractmethod
    def backward(self, d1: Tensor, x2: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Gradients of `tensors`, dx2, dv for d1, the gradient of y1."""

    @abstractmethod
    def uncouple(
        self, y1: Tensor, d1: Tensor, v: Tensor, inplace: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """x2, and what `backward` returns. With `inplace`, x2 may be written over y1."""


class DeferringBody(nn.Module, ABC):
    """A body whose `deferred` takes what its `forward` takes, and returns what that returns unmade."""

    @abstractmethod
    def deferred(self, *args: Any, **kwargs: Any) -> Deferred: ...

    def is_watched(self) -> bool:
        """Whether hooks wait for `forward` to be called."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)
