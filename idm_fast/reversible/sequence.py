"""Reversible layers as modules: `ReversibleSequence` on two streams, `WiredSequence` from one tensor to one tensor.

Training memory of a chain is that of one body plus the last streams, whatever its length; each body runs once more in
backward. It pays when bodies store much more than their input (convolutions with norms, attention, feed-forwards) and there
are several of them; it costs one more forward pass of every body, a third more work. Measured on a CPU by
examples/when_it_pays.py: 64 transformer layers of width 256 keep 4.2 MiB where plain autograd keeps 195 and
torch.utils.checkpoint around each layer 21; 64 convolutional blocks 9 MiB where those keep 260 and 69. From two blocks on it
takes less memory than plain autograd, from two to five on less than checkpointing. A step takes 1.4 times as long with such
bodies, about as with checkpointing, and 2.5 times or more with bodies so small that what Python does around them counts. For
one layer, for small bodies, or when memory is not what limits you, use plain autograd (`recovery="store"`).

`torch.compile(fullgraph=True)` keeps all of this; see compiled.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from idm_fast.ops.fixed_point import check_fraction_bits
from idm_fast.reversible.backprop import Call, invert_chain, plain_chain, reversible_chain
from idm_fast.reversible.constant import Constant
from idm_fast.reversible.coupling import Coupling, check_stream_dtype, make_coupling
from idm_fast.reversible.drift import Drift
from idm_fast.reversible.segment import being_compiled
from idm_fast.reversible.streams import ExactOutputs, FixedStreams, bits_for

Recovery = Literal["invert", "keep", "store"]
"""How backward gets what the bodies need: `invert` recovers every input from the output, `keep` stores the two streams
before each layer and recomputes the bodies, `store` is plain autograd."""

SMALLEST_V = 1e-3
"""|v| below this is refused: inverting one layer would multiply rounding errors by more than a thousand."""


def invertible_chain(
    bodies: Constant,
    coupling: Constant,
    calls: Sequence[Call],
    streams: Coupling | FixedStreams,
    weights: Sequence[Tensor | None],
    x1: Tensor,
    x2: Tensor | None,
    *,
    preserve_rng_state: bool,
    drift: Drift | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`reversible_chain`, or what a graph has in its place while one is traced; arguments as in both."""
    if being_compiled(x1):
        from idm_fast.reversible.compiled import compiled_chain  # here, for it loads dynamo, which takes seconds

        return compiled_chain((bodies, coupling), calls, streams, weights, x1, x2, **options)
    options |= {"preserve_rng_state": preserve_rng_state, "drift": drift}
    return reversible_chain(calls, streams, weights, x1, x2, **options)


class ReversibleSequence(nn.Module):
    """Shape-preserving bodies wired as y1 = (1−v)·body(x1) + v·x2, y2 = x1 (DESIGN §1), layer after layer.

    Args:
        bodies: modules; each maps (x1, *side inputs) to a tensor of x1's shape. One module may stand in several places.
        coupling: "convex" (above, a learnable v a layer started at 0.5), or "additive" (RevNet: y1 = x2 + body(x1)).
        stream_dtype: what the two streams are kept in. Inverting multiplies rounding by 1/v a layer: torch.float32 serves
            about 11 layers at v = 0.5 with float32 bodies; torch.float64 is exact to 1e-13 there after 16 layers, and to
            1e-6 after 32 (`numerics` in benchmarks/cases). torch.int32 is fixed point and inverts to the bit whatever the
            number of layers, each of which keeps 1 or 2 bits an element for that (none with "additive"). Bodies must then
            compute the same twice: deterministic kernels. Gradients take the rounding for the identity.
            None: torch.float32 under autocast, whose bodies round more than that, and torch.float64 outside.
        recovery: see `Recovery`; may be changed at any time as an attribute.
        preserve_rng_state: put the random generators back when a body runs again (dropout). False saves time.
        check_v: in training, refuse a v that cannot be inverted. Costs a GPU one synchronisation a forward pass. With
            fixed-point streams, always: refuse a v outside [min_v, 1], and values that left the range, at one more.
            Unchecked, either turns the streams into NaN.
        fraction_bits: with torch.int32, streams hold values below 2^(31−fraction_bits) in steps of 2^−fraction_bits.
        min_v: with torch.int32, the smallest v that the chain has to serve: 0.25 … 1. From 0.5 on a layer keeps 1 bit an
            element, below it 2.
        check_inverse: measure how far recovered inputs are from the true ones. Keeps the input of every layer, which is the
            memory that inverting saves, and makes a GPU wait at every layer: for finding out, not for use. See `drift`;
            an error beyond 1e-3 is a RuntimeWarning that names the layer. Nothing is measured under tracing.

    Attributes:
        drift: with check_inverse, what the last backward pass found: largest error of each layer's recovered x2 over the
            largest value of the true one, by layer; NaN where nothing was recovered.

    Raises:
        ValueError: an unknown coupling or recovery, a half-precision stream, fraction_bits or min_v out of range.
    """

    def __init__(
        self,
        bodies: Iterable[nn.Module],
        coupling: str = "convex",
        stream_dtype: torch.dtype | None = torch.float32,
        recovery: Recovery = "invert",
        preserve_rng_state: bool = True,
        check_v: bool = True,
        fraction_bits: int = 20,
        min_v: float = 0.25,
        check_inverse: bool = False,
    ) -> None:
        super().__init__()
        if stream_dtype is not None:
            check_stream_dtype(stream_dtype)
        check_fraction_bits(fraction_bits)
        self.bodies = nn.ModuleList(bodies)
        self.coupling = coupling
        self._coupling = make_coupling(coupling)
        self._constants = Constant(self.bodies), Constant(self._coupling)
        self.stream_dtype = stream_dtype
        self.recovery: Recovery = recovery
        self.preserve_rng_state = preserve_rng_state
        self.check_v = check_v
        self.fraction_bits = fraction_bits
        self.min_v = min_v
        self._bits = bits_for(min_v)
        self.check_inverse = check_inverse
        self.drift: list[float] = []
        weighted = len(self.bodies) if self._coupling.weighted else 0
        self.v = nn.ParameterList(nn.Parameter(torch.full((1,), 0.5)) for _ in range(weighted))

    def forward(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        *shared: Any,
        input_scale: Tensor | None = None,
        extras: Mapping[int, tuple[Any, ...]] | None = None,
        merges: Mapping[int, Tensor] | None = None,
        recovery: Recovery | None = None,
        body_dtype: torch.dtype | None = None,
        **shared_kw: Any,
    ) -> tuple[Any, ...]:
        """Run the chain.

        Args:
            x1, x2: the streams, one shape and dtype; cast to `stream_dtype` when that is wider.
            input_scale: s, one element; with x2 = None the second stream starts as s·x1, and nothing is stored for s.
            shared, shared_kw: given to every body behind x1. Tensors may carry a graph; their gradients come back once.
            extras: layer index → further positional inputs of that body alone (a skip, say).
            merges: layer index → m, one element: y1 + m·y2 as it is after that layer is returned too (a skip to elsewhere).
                Nothing is stored for its gradient.
            recovery: for this call, instead of the attribute.
            body_dtype: what bodies are given x1 in, when the streams are wider; default: what x1 and x2 came in, at least
                float32.

        Returns:
            y1, y2 in the streams' dtype, or for fixed-point streams in that of x1, at least float32; behind them, when there
            are `merges`, the list of these, by layer.

        Raises:
            ValueError: shapes of x1 and x2 differ, an index in `extras` or `merges` is no layer, a v is too close to 0 to be
                inverted, an unknown recovery.
            OverflowError: fixed-point streams met a value that they cannot hold.
        """
        recovery = recovery or self.recovery
        if recovery not in ("invert", "keep", "store"):
            raise ValueError(f"recovery: {recovery!r} is unknown, expected 'invert', 'keep' or 'store'")
        calls = self._calls(shared, extras, shared_kw)
        self._check_layers("merges", merges or {})
        if (x2 is None) == (input_scale is None):
            raise ValueError("x2, input_scale: give one of the two, the second stream or what scales the first to make it")
        x1, second, body_dtype = self._streams(x1, x2, body_dtype)
        fixed = self.stream_dtype == torch.int32
        if fixed:
            self._check_min_v()
        options: dict[str, Any] = {"input_scale": input_scale, "merges": merges, "body_dtype": body_dtype}
        invertible = recovery != "store" and torch.is_grad_enabled() and len(calls) > 0
        run: Callable[..., tuple[Tensor, Tensor, list[Tensor]]] = plain_chain
        if invertible:
            options |= {"keep": recovery == "keep", "preserve_rng_state": self.preserve_rng_state}
            run = partial(invertible_chain, *self._constants)
            if recovery == "invert" and not being_compiled(x1):
                self._check_smallest_v()
                if self.check_inverse and values_can_be_read(x1):
                    options["drift"] = Drift(len(calls), partial(setattr, self, "drift"))
        coupling = self._streams_coupling(x1.dtype, invertible=invertible and recovery == "invert")
        y1, y2, merged = run(calls, coupling, self._weights(), x1, second, **options)
        if fixed:
            self._check_overflow(y1, y2)
        return (y1, y2, merged) if merges else (y1, y2)

    def _check_smallest_v(self) -> None:
        if self.check_v and self.training and len(self.v) and values_can_be_read(self.v[0]):
            name, value = smallest_v(self)
            if not value >= SMALLEST_V:
                raise ValueError(f"{name}: |v| = {value:.3g} is below {SMALLEST_V}, and inverting the layer divides by v")

    def inverse(
        self,
        y1: Tensor,
        y2: Tensor,
        *shared: Any,
        extras: Mapping[int, tuple[Any, ...]] | None = None,
        body_dtype: torch.dtype | None = None,
        **shared_kw: Any,
    ) -> tuple[Tensor, Tensor]:
        """(x1, x2) of `forward`, without a graph. Bodies must do what they did there: same mode, same side inputs.

        Raises:
            ValueError: the streams are fixed-point.
        """
        if self.stream_dtype == torch.int32:
            raise ValueError(
                "stream_dtype: inverting torch.int32 streams takes more than y1 and y2; run_exact returns all of it, and "
                "inverse_exact takes it"
            )
        calls = self._calls(shared, extras, shared_kw)
        y1, second, body_dtype = self._streams(y1, y2, body_dtype)
        assert second is not None
        return invert_chain(calls, self._coupling, self._weights(), y1, second, body_dtype=body_dtype)

    @torch.no_grad()
    def run_exact(
        self,
        x1: Tensor,
        x2: Tensor,
        *shared: Any,
        extras: Mapping[int, tuple[Any, ...]] | None = None,
        body_dtype: torch.dtype | None = None,
        **shared_kw: Any,
    ) -> ExactOutputs:
        """`forward` on fixed-point streams, without a graph, with all that `inverse_exact` needs. Arguments as there.

        Raises:
            ValueError: the streams are not fixed-point; further as in `forward`.
        """
        calls = self._calls(shared, extras, shared_kw)
        x1, second, body_dtype = self._streams(x1, x2, body_dtype)
        fixed = self._fixed_streams(x1.dtype)
        self._check_min_v()
        y1, y2, _ = plain_chain(calls, fixed, self._weights(), x1, second, body_dtype=body_dtype)
        self._check_overflow(y1, y2)
        Y1, Y2, *codes = fixed.end(y1, y2)
        return ExactOutputs(Y1, Y2, tuple(codes), self.fraction_bits, y1.dtype, body_dtype)

    @torch.no_grad()
    def inverse_exact(
        self,
        outputs: ExactOutputs,
        *shared: Any,
        extras: Mapping[int, tuple[Any, ...]] | None = None,
        **shared_kw: Any,
    ) -> tuple[Tensor, Tensor]:
        """(x1, x2) that the first layer of `run_exact` saw, to the bit: its inputs rounded to the grid of the streams.

        Raises:
            ValueError: the streams are not fixed-point, or `outputs` are of another chain.
        """
        fixed = self._fixed_streams(outputs.dtype)
        wanted = len(self.v), self.fraction_bits
        if (len(outputs.codes), outputs.fraction_bits) != wanted:
            raise ValueError(
                f"outputs: codes of {len(outputs.codes)} layers at fraction_bits = {outputs.fraction_bits}, "
                f"and this chain has {wanted[0]} at {wanted[1]}"
            )
        Y1, Y2 = fixed.begin_backward([outputs.y1, outputs.y2, *outputs.codes])
        calls = self._calls(shared, extras, shared_kw)
        X1, X2 = invert_chain(calls, fixed, self._weights(), Y1, Y2, body_dtype=outputs.body_dtype)
        return fixed.value(X1), fixed.value(X2)

    def _streams_coupling(self, dtype: torch.dtype, invertible: bool) -> Coupling | FixedStreams:
        if self.stream_dtype != torch.int32:
            return self._coupling
        return FixedStreams(self._coupling, self.fraction_bits, self._bits if invertible else 0, dtype)

    def _fixed_streams(self, dtype: torch.dtype) -> FixedStreams:
        streams = self._streams_coupling(dtype, invertible=True)
        if not isinstance(streams, FixedStreams):
            raise ValueError(f"stream_dtype: {self.stream_dtype} cannot be inverted to the bit, only torch.int32 can")
        return streams

    def _check_min_v(self) -> None:
        if not (self.check_v and len(self.v) and values_can_be_read(self.v[0])):
            return
        for index, v in enumerate(torch.cat([v.detach() for v in self.v]).tolist()):
            if not self.min_v <= v <= 1:
                raise ValueError(
                    f"v.{index}: v = {v:.6g}, expected {self.min_v} … 1 (min_v … 1), for which fixed-point streams keep "
                    f"{self._bits} bits an element a layer; lower min_v (0.25 at least), or use torch.float64 streams"
                )

    def _check_overflow(self, y1: Tensor, y2: Tensor) -> None:
        # A NaN once in a stream reaches the last ones, so that one look at the end sees every layer.
        if self.check_v and values_can_be_read(y1) and bool((y1.detach() + y2.detach()).isnan().any()):
            raise OverflowError(
                f"fraction_bits: with {self.fraction_bits}, fixed-point streams hold values below "
                f"2^{31 - self.fraction_bits}, and one was larger, infinite or NaN; lower fraction_bits, or scale the bodies' "
                "outputs down"
            )

    def _calls(
        self, shared: tuple[Any, ...], extras: Mapping[int, tuple[Any, ...]] | None, shared_kw: dict[str, Any]
    ) -> list[Call]:
        extras = extras or {}
        self._check_layers("extras", extras)
        return [Call(body, (*shared, *extras.get(i, ())), shared_kw) for i, body in enumerate(self.bodies)]

    def _check_layers(self, name: str, by_layer: Mapping[int, Any]) -> None:
        unknown = sorted(set(by_layer) - set(range(len(self.bodies))))
        if unknown:
            raise ValueError(f"{name}: {unknown} are no layers of this chain, which has 0 … {len(self.bodies) - 1}")

    def _streams(
        self, x1: Tensor, x2: Tensor | None, body_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None, torch.dtype]:
        if x2 is not None and x1.shape != x2.shape:
            raise ValueError(f"x1 is {tuple(x1.shape)} and x2 {tuple(x2.shape)}; the two streams must have one shape")
        given = x1.dtype if x2 is None else torch.promote_types(x1.dtype, x2.dtype)
        wanted = self.stream_dtype
        if wanted is None:
            wanted = torch.float32 if torch.is_autocast_enabled(x1.device.type) else torch.float64
        stream = torch.promote_types(given, torch.float32 if wanted == torch.int32 else wanted)
        return x1.to(stream), None if x2 is None else x2.to(stream), body_dtype or torch.promote_types(given, torch.float32)

    def _weights(self) -> list[Tensor | None]:
        return list(self.v) if self._coupling.weighted else [None] * len(self.bodies)

    def extra_repr(self) -> str:
        return f"coupling={self.coupling}, stream_dtype={self.stream_dtype}, recovery={self.recovery}"


class ChainEnd(NamedTuple):
    """The last streams of a chain and m, for y1 + m·y2 to be made where it is used: then it need not be stored itself."""

    y1: Tensor
    y2: Tensor
    merge_scale: Tensor

    def merged(self, dtype: torch.dtype) -> Tensor:
        """y1 + m·y2."""
        return torch.addcmul(self.y1, self.y2, self.merge_scale.to(self.y1.dtype)).to(dtype)


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

    @property
    def drift(self) -> list[float]:
        """As in `ReversibleSequence`."""
        return self.chain.drift

    def forward(self, x: Tensor, *shared: Any, **options: Any) -> Tensor:
        """(B, …) → the same shape and dtype (float32 for half). Side inputs as in `ReversibleSequence.forward`."""
        return self.unmerged(x, *shared, **options).merged(torch.promote_types(x.dtype, torch.float32))

    def unmerged(self, x: Tensor, *shared: Any, **options: Any) -> ChainEnd:
        """`forward` up to the last step, for one who merges later."""
        y1, y2 = self.chain(x, None, *shared, input_scale=self.input_scale, **options)
        return ChainEnd(y1, y2, self.merge_scale)


def values_can_be_read(tensor: Tensor) -> bool:
    """Reading a value is impossible under fake tensors and tracing, and breaks a CUDA graph's capture."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def smallest_v(module: nn.Module) -> tuple[str, float]:
    """Name and |value| of the v nearest to 0 among all reversible sequences in `module`, a NaN first; ("", inf) without any.

    All are read at once, as a GPU is waited for with every reading.
    """
    named = {
        f"{prefix}.v.{i}".lstrip("."): v.detach()
        for prefix, part in module.named_modules()
        if isinstance(part, ReversibleSequence)
        for i, v in enumerate(part.v)
    }
    if not named:
        return "", math.inf
    device = next(iter(named.values())).device
    values = dict(zip(named, torch.cat([v.to(device) for v in named.values()]).abs().tolist(), strict=True))
    return smallest(values)


def smallest(values: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the smallest, a NaN first."""
    name = min(values, key=lambda name: -math.inf if math.isnan(values[name]) else values[name])
    return name, values[name]
