"""Reversible layers as modules: `ReversibleSequence` on two streams, `WiredSequence` from one tensor to one tensor.

Training memory of a chain is that of one body plus the last streams, whatever its length; each body runs once more in
backward. It pays when bodies store much more than their input (convolutions with norms, attention, feed-forwards) and there
are several of them; it costs one more forward pass of every body, a third more work. Measured on a CPU by
examples/when_it_pays.py: 64 transformer layers of width 256 keep 4.2 MiB where plain autograd keeps 195 and
torch.utils.checkpoint around each layer 21; 64 convolutional blocks 9 MiB where those keep 260 and 69. From two blocks on it
takes less memory than plain autograd, from two to five on less than checkpointing. A step takes 1.4 times as long with such
bodies, about as with checkpointing, and 2.5 times or more with bodies so small that what Python does around them counts. For
one layer, for small bodies, or when memory is not what limits you, use plain autograd (`recovery="store"`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from idm_fast.reversible.backprop import Call, invert_chain, plain_chain, reversible_chain
from idm_fast.reversible.coupling import check_stream_dtype, make_coupling

Recovery = Literal["invert", "keep", "store"]
"""How backward gets what the bodies need: `invert` recovers every input from the output, `keep` stores the two streams
before each layer and recomputes the bodies, `store` is plain autograd."""

SMALLEST_V = 1e-3
"""|v| below this is refused: inverting one layer would multiply rounding errors by more than a thousand."""


class ReversibleSequence(nn.Module):
    """Shape-preserving bodies wired as y1 = (1−v)·body(x1) + v·x2, y2 = x1 (DESIGN §1), layer after layer.

    Args:
        bodies: modules; each maps (x1, *side inputs) to a tensor of x1's shape. One module may stand in several places.
        coupling: "convex" (above, a learnable v a layer started at 0.5), or "additive" (RevNet: y1 = x2 + body(x1)).
        stream_dtype: torch.float32 or torch.float64, what the two streams are kept in. Inverting multiplies rounding by
            1/v a layer: float32 serves about 11 layers at v = 0.5 with float32 bodies; float64 is exact to 1e-13.
        recovery: see `Recovery`; may be changed at any time as an attribute.
        preserve_rng_state: put the random generators back when a body runs again (dropout). False saves time.
        check_v: in training, refuse a v that cannot be inverted. Costs a GPU one synchronisation a forward pass.

    Raises:
        ValueError: an unknown coupling or recovery, a half-precision stream.
    """

    def __init__(
        self,
        bodies: Iterable[nn.Module],
        coupling: str = "convex",
        stream_dtype: torch.dtype = torch.float32,
        recovery: Recovery = "invert",
        preserve_rng_state: bool = True,
        check_v: bool = True,
    ) -> None:
        super().__init__()
        check_stream_dtype(stream_dtype)
        self.bodies = nn.ModuleList(bodies)
        self.coupling = coupling
        self._coupling = make_coupling(coupling)
        self.stream_dtype = stream_dtype
        self.recovery: Recovery = recovery
        self.preserve_rng_state = preserve_rng_state
        self.check_v = check_v
        weighted = len(self.bodies) if self._coupling.weighted else 0
        self.v = nn.ParameterList(nn.Parameter(torch.full((1,), 0.5)) for _ in range(weighted))

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *shared: Any,
        extras: Mapping[int, tuple[Any, ...]] | None = None,
        body_dtype: torch.dtype | None = None,
        **shared_kw: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run the chain.

        Args:
            x1, x2: the streams, one shape and dtype; cast to `stream_dtype` when that is wider.
            shared, shared_kw: given to every body behind x1. Tensors may carry a graph; their gradients come back once.
            extras: layer index → further positional inputs of that body alone (a skip, say).
            body_dtype: what bodies are given x1 in, when the streams are wider; default: what x1 and x2 came in, at least
                float32.

        Returns:
            y1, y2 in the streams' dtype.

        Raises:
            ValueError: shapes of x1 and x2 differ, an index in `extras` is no layer, a v is too close to 0 to be inverted.
        """
        calls = self._calls(shared, extras, shared_kw)
        x1, x2, body_dtype = self._streams(x1, x2, body_dtype)
        if self.recovery == "store" or not torch.is_grad_enabled():
            return plain_chain(calls, self._coupling, self._weights(), x1, x2, body_dtype=body_dtype)
        if self.recovery not in ("invert", "keep"):
            raise ValueError(f"recovery: {self.recovery!r} is unknown, expected 'invert', 'keep' or 'store'")
        if self.check_v and self.training and self.recovery == "invert" and len(self.v) and values_can_be_read(self.v[0]):
            name, value = smallest_v(self)
            if not value >= SMALLEST_V:
                raise ValueError(f"{name}: |v| = {value:.3g} is below {SMALLEST_V}, and inverting the layer divides by v")
        return reversible_chain(
            calls,
            self._coupling,
            self._weights(),
            x1,
            x2,
            keep=self.recovery == "keep",
            preserve_rng_state=self.preserve_rng_state,
            body_dtype=body_dtype,
        )

    def inverse(
        self,
        y1: Tensor,
        y2: Tensor,
        *shared: Any,
        extras: Mapping[int, tuple[Any, ...]] | None = None,
        body_dtype: torch.dtype | None = None,
        **shared_kw: Any,
    ) -> tuple[Tensor, Tensor]:
        """(x1, x2) of `forward`, without a graph. Bodies must do what they did there: same mode, same side inputs."""
        calls = self._calls(shared, extras, shared_kw)
        y1, y2, body_dtype = self._streams(y1, y2, body_dtype)
        return invert_chain(calls, self._coupling, self._weights(), y1, y2, body_dtype=body_dtype)

    def _calls(
        self, shared: tuple[Any, ...], extras: Mapping[int, tuple[Any, ...]] | None, shared_kw: dict[str, Any]
    ) -> list[Call]:
        extras = extras or {}
        unknown = sorted(set(extras) - set(range(len(self.bodies))))
        if unknown:
            raise ValueError(f"extras: {unknown} are no layers of this chain, which has 0 … {len(self.bodies) - 1}")
        return [Call(body, (*shared, *extras.get(i, ())), shared_kw) for i, body in enumerate(self.bodies)]

    def _streams(
        self, x1: Tensor, x2: Tensor, body_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        if x1.shape != x2.shape:
            raise ValueError(f"x1 is {tuple(x1.shape)} and x2 {tuple(x2.shape)}; the two streams must have one shape")
        given = torch.promote_types(x1.dtype, x2.dtype)
        stream = torch.promote_types(given, self.stream_dtype)
        return x1.to(stream), x2.to(stream), body_dtype or torch.promote_types(given, torch.float32)

    def _weights(self) -> list[Tensor | None]:
        return list(self.v) if self._coupling.weighted else [None] * len(self.bodies)

    def extra_repr(self) -> str:
        return f"coupling={self.coupling}, stream_dtype={self.stream_dtype}, recovery={self.recovery}"


class WiredSequence(nn.Module):
    """x → x: a drop-in for `nn.Sequential` of shape-preserving bodies.

    The chain of `ReversibleSequence` starts from (x, s·x) and ends in y1 + m·y2, s (started at 1) and m (started at 0)
    learnable. Arguments as there.
    """

    def __init__(self, bodies: Iterable[nn.Module], coupling: str = "convex", **options: Any) -> None:
        super().__init__()
        self.chain = ReversibleSequence(bodies, coupling, **options)
        self.input_scale = nn.Parameter(torch.ones(1))
        self.merge_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, *shared: Any, extras: Mapping[int, tuple[Any, ...]] | None = None, **shared_kw: Any
    ) -> Tensor:
        """(B, …) → the same shape and dtype (float32 for half). Side inputs as in `ReversibleSequence.forward`."""
        body_dtype = torch.promote_types(x.dtype, torch.float32)
        stream = torch.promote_types(x.dtype, self.chain.stream_dtype)
        x1, x2 = x.to(stream), (self.input_scale * x).to(stream)
        y1, y2 = self.chain(x1, x2, *shared, extras=extras, body_dtype=body_dtype, **shared_kw)
        return (y1 + self.merge_scale * y2).to(body_dtype)


def values_can_be_read(tensor: Tensor) -> bool:
    """Reading a value is impossible under fake tensors and tracing, and breaks a CUDA graph's capture."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def smallest_v(module: nn.Module) -> tuple[str, float]:
    """Name and |value| of the v nearest to 0 among all reversible sequences in `module`, a NaN first; ("", inf) without any."""
    name, value = "", math.inf
    for prefix, part in module.named_modules():
        if isinstance(part, ReversibleSequence) and len(part.v):
            values = torch.cat([v.detach() for v in part.v]).abs()
            index = int(values.argmin())  # of a NaN, if there is one
            if not float(values[index]) >= value:
                name, value = f"{prefix}.v.{index}".lstrip("."), float(values[index])
            if math.isnan(value):
                break
    return name, value
