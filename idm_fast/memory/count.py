"""Count what a training step costs without running it: activation bytes, FLOP and launches, exactly, on any machine.

The step runs under fake tensors, which have shapes and lifetimes but no data, so a full-size step takes seconds on a CPU.
Counted are storages that the step allocates; parameters and inputs exist before it, and what ends as a parameter's gradient
(partial sums included) is left out, so that the figure is the activations' alone.

A launch is a dispatched ATen or idm_fast op that is not a view, a prim, detach or empty (FINDINGS' definition).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from idm_fast.ops import registry

GIB = 2**30
# The CPU's attention is missing in torch's registry of FLOP formulas; the CUDA kernels of the same function are there.
_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
if _FLASH_CPU not in flop_registry:

    @register_flop_formula(_FLASH_CPU)
    def _flop_flash_cpu(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    @register_flop_formula(_FLASH_CPU_BACKWARD)
    def _flop_flash_cpu_backward(
        grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
    ) -> int:
        return sdpa_backward_flop_count(grad_out, query, key, value)


_FREE_OF_CHARGE = (
    "prim.",
    "aten.detach",
    "aten.empty",
    "aten.new_empty",
    "aten.lift_fresh",
    "aten._unsafe_view",
    "aten.alias",
    "aten.promote_types",  # asks about dtypes, touches no tensor
)


@dataclass(frozen=True)
class StepCount:
    """What one training step costs.

    Attributes:
        peak_bytes: largest sum of live activation bytes.
        held_bytes: activation bytes alive when the forward pass has returned.
        peak_with_gradients: the same with the parameters' gradients, as far as there are any by then: what an allocator sees.
        flop: floating-point operations, a multiply-add being two.
        launches: kernels asked for.
        calls: how often each op ran, by name.
    """

    peak_bytes: int
    held_bytes: int
    peak_with_gradients: int
    flop: int
    launches: int
    calls: dict[str, int]

    def __str__(self) -> str:
        return (
            f"peak {self.peak_bytes / GIB:.2f} GiB, after forward {self.held_bytes / GIB:.2f} GiB, "
            f"{self.flop / 1e12:.1f} TFLOP, {self.launches:,} launches"
        )


def resident_threads(device: torch.device) -> int:
    """How many threads a GPU runs at a time; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    gpu = torch.cuda.get_device_properties(device)
    return int(gpu.multi_processor_count * gpu.max_threads_per_multi_processor)


def column_sum_scratch(rows: int, columns: int, element_size: int, threads: int) -> int:
    """Bytes that PyTorch's CUDA kernel allocates to sum the rows of a dense (rows, columns) matrix, as a bias' gradient does.

    Where the columns alone don't fill the GPU, several blocks share a column and hand partial sums on through memory. For each
    column the kernel takes as much of it as for all the columns of a block together, up to 128: on an H100 132 MiB for 16,384
    rows of 2,560 bfloat16 numbers, which are 80 (ReduceConfig in PyTorch's Reduce.cuh).

    Args:
        element_size: in bytes; partial sums have 4, of float64 8.
        threads: of `resident_threads`; 0 for none of this.
    """
    while rows * columns * element_size >= 2**31:  # summed in halves, whose indices have 32 bits
        rows = (rows + 1) // 2
    vector = next(n for n in (4, 2, 1) if columns % n == 0)
    lanes = min(1 << max(columns // vector, 1).bit_length() - 1, 32)
    most = 512 // vector
    height = min(1 << max(rows, 1).bit_length() - 1, most // lanes)
    values = -(-rows // height)
    at_once = threads // (lanes * height)
    blocks = -(-columns // vector // lanes)
    if values < 256 or not 0 < blocks <= at_once:
        return 0
    shared_by = max(min(-(-at_once // blocks), -(-values // 16)), -(-values // 256))
    return max(4, element_size) * columns * shared_by * lanes * vector if shared_by > 1 else 0


class AllocationCounter(TorchDispatchMode):
    """Record every storage that ops allocate, from birth to death, and every op.

    Args:
        as_reference: ops of idm_fast to run as their plain-PyTorch references, op by op with their temporaries; any other is
            one launch that allocates its outputs, which is what a fused kernel does.
        threads: that the GPU runs at a time whose library's scratch memory is counted too (`column_sum_scratch`); 0 for none.
    """

    def __init__(self, as_reference: Collection[str] = (), threads: int = 0) -> None:
        super().__init__()
        self._as_reference, self._threads = as_reference, threads
        self._events: list[tuple[int, int]] = []
        """(storage number, signed bytes), in order."""
        self._sizes: list[int] = []
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._parts: dict[int, set[int]] = {}
        """Sums: number of the storage that an addition wrote → numbers of the storages that it read."""
        self.calls: Counter[str] = Counter()
        self.launches = 0
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "idm_fast" and (op := func._schema.name.partition("::")[2]) in self._as_reference:
            with self:
                return registry.OPS[op].implementations["reference"][0](*args, **kwargs)
        out = func(*args, **kwargs)
        name = str(func)
        self.calls[name.rpartition(".")[0]] += 1
        formula = flop_registry.get(func._overloadpacket)
        flop = formula(*args, **kwargs, out_val=out) if formula else 0
        self.flop += flop
        if not (func.is_view or name.startswith(_FREE_OF_CHARGE)):
            self.launches += 1
            self.launched((args, kwargs), out, flop)
        written = [self._number(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name.startswith("aten.add"):
            read = {self._number(leaf, born=False) for leaf in args if isinstance(leaf, Tensor)}
            self._parts.setdefault(written[0], set()).update(read)
        if self._threads and func is torch.ops.aten.sum.dim_IntList:
            self._scratch(*args)
        return out

    def _scratch(self, x: Tensor, dims: list[int] | None, *_: Any) -> None:
        """What a sum over all dimensions but the last takes while it runs."""
        if dims and {d % x.ndim for d in dims} == set(range(x.ndim - 1)) and x.is_contiguous():
            columns = x.shape[-1]
            size = column_sum_scratch(x.numel() // max(columns, 1), columns, x.element_size(), self._threads)
            self._sizes.append(size)
            self._events += [(len(self._sizes) - 1, size), (len(self._sizes) - 1, -size)]

    def launched(self, inputs: Any, outputs: Any, flop: int) -> None:
        """Called for every launch, with what it reads and what it returns; for subclasses that count more."""

    def _number(self, tensor: Tensor, born: bool = True) -> int:
        """Number of the tensor's storage; a storage seen first as an output was allocated by this op."""
        storage = tensor.untyped_storage()
        number = self._known.get(storage)
        if number is None:
            number = len(self._sizes)
            size = storage.nbytes() if born else 0
            self._sizes.append(size)
            self._known[storage] = number
            self._events.append((number, size))
            weakref.finalize(storage, self._events.append, (number, -size)).atexit = False
        return number

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Storages that exist before the step and are no activations."""
        for tensor in tensors:
            self._number(tensor, born=False)

    def mark(self) -> int:
        """The present moment, for `live_bytes`."""
        return len(self._events)

    def summarize(self, gradients: Iterable[Tensor], moment: int) -> tuple[int, int]:
        """(peak bytes, bytes alive at `moment`), both without what became `gradients`."""
        excluded = set()
        pending = [self._number(gradient, born=False) for gradient in gradients]
        while pending:
            number = pending.pop()
            if number not in excluded:
                excluded.add(number)
                pending += self._parts.get(number, ())
        live = peak = held = 0
        for position, (number, size) in enumerate(self._events):
            if position == moment:
                held = live
            live += 0 if number in excluded else size
            peak = max(peak, live)
        return peak, held if moment < len(self._events) else live


def count_step(
    forward: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    inputs: Iterable[Tensor] = (),
    as_reference: Collection[str] = (),
    counter: AllocationCounter | None = None,
    threads: int = 0,
) -> StepCount:
    """Count `forward()` (which returns the loss) and its backward, under the fake tensor mode or for real.

    Args:
        parameters: whose gradients are left out. They must have no gradient yet.
        inputs: tensors that exist before the step.
        as_reference, threads: see `AllocationCounter`.
        counter: one that counts more, new, in place of `AllocationCounter(as_reference, threads)`.
    """
    parameters = list(parameters)
    counter = counter or AllocationCounter(as_reference, threads)
    counter.ignore([*parameters, *inputs])
    with counter:
        loss = forward()
        moment = counter.mark()
        loss.backward()
    del loss
    peak, held = counter.summarize([p.grad for p in parameters if p.grad is not None], moment)
    with_gradients, _ = counter.summarize([], moment)
    return StepCount(peak, held, with_gradients, counter.flop, counter.launches, dict(counter.calls))


def count_training_step(
    make_model: Callable[[], torch.nn.Module],
    batch: int,
    size: int | tuple[int, int],
    ratio: float = 0.1,
    autocast: torch.dtype | None = torch.bfloat16,
    as_reference: Collection[str] = (),
    counter: AllocationCounter | None = None,
    threads: int = 0,
) -> StepCount:
    """Count a training step of IDM: L1 loss on `batch` images of `size`², under fake tensors; setting S is (8, 256).

    Args:
        size: a side, or height and width; multiples of 32.
        make_model: builds the IDM; called under the fake tensor mode, so that full size costs no memory.
        autocast: dtype, or None for float32.
        as_reference, counter, threads: see `count_step`.
    """
    from idm_fast.physics import BlockCompressedSensing, measurements_per_block

    N, q = 32 * 32, measurements_per_block(ratio, 32)
    height, width = (size, size) if isinstance(size, int) else size
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = make_model()
        physics = BlockCompressedSensing.__new__(BlockCompressedSensing)
        torch.nn.Module.__init__(physics)
        physics.image_size = (height, width)
        physics.register_buffer("matrix", torch.empty(N, q))
        physics.register_buffer("permutation", torch.empty(height * width, dtype=torch.int64))
        x = torch.rand(batch, 1, height, width)

        def forward() -> Tensor:
            context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
            with context:
                return (model(physics.A(x), physics) - x).abs().mean()

        inputs = x, physics.matrix, physics.permutation
        return count_step(forward, model.parameters(), inputs, as_reference, counter, threads)
