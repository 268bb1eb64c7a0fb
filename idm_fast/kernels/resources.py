"""What each kernel takes of a multiprocessor, from the compiler, without a GPU.

    python -m idm_fast.kernels.resources            compare with resources.csv
    python -m idm_fast.kernels.resources --write    write it

Every launch that the ops make at the shapes of `CASES` (Stable Diffusion 1.5's at batch 8, 256²) is recorded on meta tensors
and compiled to machine code for each architecture of ARCHITECTURES, exactly as it would be launched there.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from idm_fast.kernels import bits, couple, fixed_point, geglu, group_norm_silu, inject, layer_norm, project
from idm_fast.kernels.launch import Launch, recording

ARCHITECTURES = (80, 90, 100)
RECORD = Path(__file__).with_name("resources.csv")

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """One kernel as launched on one architecture: registers a thread, bytes spilled a thread, shared memory a block."""

    kernel: str
    variant: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _couplings(F: torch.dtype, stream: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        body, x, v = meta(8, 320, 128, 128, dtype=F), meta(8, 320, 128, 128, dtype=stream), meta(1)
        couple.couple(body, x, v)
        couple.decouple(x, body, v)
        couple.couple_backward(x, body, x, v)
        couple.uncouple(x, body, x, v)

    return call


def _geglu(dtype: torch.dtype) -> Callable[[], Any]:
    def call() -> None:
        h = meta(8, 16384, 2560, dtype=dtype)
        geglu.geglu_backward(geglu.geglu(h), h)

    return call


def _norm(
    dtype: torch.dtype, out: torch.dtype, silu: bool, memory_format: torch.memory_format, side: int = 128
) -> Callable[[], Any]:
    def call() -> None:
        x, w = meta(8, 320, side, side, dtype=dtype).contiguous(memory_format=memory_format), meta(320)
        w = w.double() if dtype == torch.float64 else w
        y, mean, rstd = group_norm_silu.group_norm_silu(x, w, w, 32, 1e-5, silu, out)
        group_norm_silu.group_norm_silu_backward(y, x, w, w, mean, rstd, 32, silu)

    return call


def _layer_norm(dtype: torch.dtype, out: torch.dtype, C: int = 320) -> Callable[[], Any]:
    def call() -> None:
        x, w = meta(8, 16384, C, dtype=dtype), meta(C, dtype=torch.promote_types(dtype, torch.float32))
        y, mean, rstd = layer_norm.layer_norm(x, w, w, 1e-5, out)
        layer_norm.layer_norm_backward(y, x, w, w, mean, rstd)

    return call


def _fixed(F: torch.dtype, d: torch.dtype, width: int) -> Callable[[], Any]:
    def call() -> None:
        body, d1, v = meta(8, 320, 128, 128, dtype=F), meta(8, 320, 128, 128, dtype=d), meta(1)
        X = fixed_point.to_fixed(d1, 20)
        fixed_point.from_fixed(X, 20, d)
        fixed_point.fixed_add(body, X, 20, -1)
        _, packed = fixed_point.fixed_couple(body, X, v, 20, width)
        fixed_point.fixed_decouple(X, body, packed, v, 20, width)
        fixed_point.fixed_uncouple(X, body, d1, packed, v, 20, width)
        bits.unpack_bits(bits.pack_bits(meta(8, 4096, dtype=torch.uint8), width), width, 8 * 4096)

    return call


def _injector(
    dtype: torch.dtype, stream: torch.dtype, channels: int, side: int, r: int, memory_format: torch.memory_format
) -> Callable[[], Any]:
    def call() -> None:
        h = meta(8, channels, side, side, dtype=dtype).contiguous(memory_format=memory_format)
        image = meta(8, 1, side * r, side * r, dtype=dtype)
        read, write = meta(1, channels // r**2, 1, 1), meta(channels // r**2, 3, 1, 1)
        inject.inject_read(h, read, meta(1), r)
        inject.inject_read_backward(image, h, read, r, None)
        inject.inject_read_backward(image, h, read, r, h)
        inject.inject_write(h, image, image, image, write, meta(channels // r**2), r)
        inject.inject_write_backward(h, image, image, image, write, r)
        x2, v = meta(8, channels, side, side, dtype=stream).contiguous(memory_format=memory_format), meta(1)
        given = (h, image, image, image, write, meta(channels // r**2))
        inject.inject_couple(*given, x2, v, r)
        inject.inject_couple_backward(x2, *given, x2, v, r)
        inject.inject_uncouple(x2, x2, *given, v, r)

    return call


def _projection(dtype: torch.dtype, q: int) -> Callable[[], Any]:
    def call() -> None:
        x, matrix, y = meta(8, 1, 256, 256, dtype=dtype), meta(1024, q, dtype=dtype), meta(8, 64, q, dtype=dtype)
        permutation, abar = meta(65536, dtype=torch.int64), meta(1)
        project.gram(x, matrix, permutation)
        project.measure(x, matrix, permutation)
        project.adjoint(y, matrix, permutation, 256, 256)
        project.project_step(x, x, y, matrix, permutation, abar, abar)
        project.project_step_backward(x, x, x, y, matrix, permutation, abar, abar)

    return call


_BF16, _FP16, _FP32, _FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_NCHW, _NHWC = torch.contiguous_format, torch.channels_last

CASES: dict[str, Callable[[], Any]] = {
    "F bf16": _couplings(_BF16, _FP32),
    "F fp16": _couplings(_FP16, _FP32),
    "F fp32": _couplings(_FP32, _FP32),
    "F bf16, stream fp64": _couplings(_BF16, _FP64),
    "bf16": _geglu(_BF16),
    "fp16": _geglu(_FP16),
    "fp32": _geglu(_FP32),
    "fp64": _geglu(_FP64),
    "fp32 to bf16, silu, NCHW": _norm(_FP32, _BF16, True, _NCHW),
    "fp32 to bf16, NCHW": _norm(_FP32, _BF16, False, _NCHW),
    "bf16, silu, NCHW": _norm(_BF16, _BF16, True, _NCHW),
    "fp16, silu, NCHW": _norm(_FP16, _FP16, True, _NCHW),
    "fp32 to fp16, silu, NCHW": _norm(_FP32, _FP16, True, _NCHW),
    "bf16, silu, NHWC": _norm(_BF16, _BF16, True, _NHWC),
    "fp32, silu, NCHW": _norm(_FP32, _FP32, True, _NCHW),
    "bf16, silu, NCHW, 16²": _norm(_BF16, _BF16, True, _NCHW, 16),
    "bf16, r = 2": _injector(_BF16, _FP32, 320, 128, 2, _NCHW),
    "fp16, r = 2": _injector(_FP16, _FP32, 320, 128, 2, _NCHW),
    "fp32, r = 2": _injector(_FP32, _FP32, 320, 128, 2, _NCHW),
    "fp32, r = 2, NHWC": _injector(_FP32, _FP32, 320, 128, 2, _NHWC),
    "fp32, r = 4, NHWC": _injector(_FP32, _FP32, 640, 64, 4, _NHWC),
    "fp64, r = 2": _injector(_FP64, _FP64, 320, 128, 2, _NCHW),
    "fp32, r = 2, stream fp64": _injector(_FP32, _FP64, 320, 128, 2, _NCHW),
    "bf16, ratio 0.1": _projection(_BF16, 103),
    "fp16, ratio 0.1": _projection(_FP16, 103),
    "fp32, ratio 0.1": _projection(_FP32, 103),
    "fp64, ratio 0.1": _projection(_FP64, 103),
    "F bf16, 2 bits": _fixed(_BF16, _FP32, 2),
    "F fp16, 2 bits": _fixed(_FP16, _FP32, 2),
    "F fp32, stream fp64, 1 bit": _fixed(_FP32, _FP64, 1),
    "bf16, C = 640": _layer_norm(_BF16, _BF16, 640),
    "fp16, C = 640": _layer_norm(_FP16, _FP16, 640),
    "fp32 to bf16, C = 320": _layer_norm(_FP32, _BF16),
    "fp64, C = 320": _layer_norm(_FP64, _FP64),
    "fp64, silu, NCHW": _norm(_FP64, _FP64, True, _NCHW),
}


def recorded_launches(arch: int) -> Iterator[tuple[str, Launch]]:
    """The launches of CASES on `arch`, each different one once, with the name of its case, numbered if one has several."""
    seen: set[str] = set()
    for case, call in CASES.items():
        with recording(arch) as launches:
            call()
        several: Counter[str] = Counter()
        for entry in launches:
            name = entry.kernel.__name__
            key = repr((name, specialization(entry), entry.options))
            if key not in seen:
                seen.add(key)
                several[name] += 1
                yield case if several[name] == 1 else f"{case}, {several[name]}", entry


def specialization(entry: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Signature, constants and attributes with which Triton would compile this launch: its just-in-time rules, in short.

    Tensors from PyTorch's allocator and integers that 16 divides are known as such; None and the integer 1 are constants.
    """
    names = entry.kernel.arg_names
    signature, constants, attributes = dict.fromkeys(names, "constexpr"), dict(entry.constants), {}
    for position, value in enumerate(entry.arguments):
        name = names[position]
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def binary(entry: Launch, arch: int) -> Any:
    """One launch compiled for compute capability `arch`: Triton's kernel, with its listings and its machine code in `asm`."""
    signature, constants, attributes = specialization(entry)
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=entry.options)


def compiled(variant: str, entry: Launch, arch: int) -> Resources:
    """Compile one launch for compute capability `arch` and read what its machine code takes."""
    kernel = binary(entry, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    name = entry.kernel.__name__
    spilled = found["STACK"] + found["LOCAL"]
    return Resources(name, variant, arch, entry.options["num_warps"], found["REG"], spilled, kernel.metadata.shared)


def measure() -> list[Resources]:
    """Compile everything, for every architecture."""
    return [compiled(variant, entry, arch) for arch in ARCHITECTURES for variant, entry in recorded_launches(arch)]


def compiler() -> str:
    """The version of Triton, which decides all figures with the assembler that it carries."""
    return f"triton {triton.__version__}"


def write(rows: list[Resources]) -> None:
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([compiler()])
        writer.writerow([field.name for field in fields(Resources)])
        writer.writerows(astuple(row) for row in sorted(rows, key=lambda row: (row.kernel, row.variant, row.arch)))


def read() -> tuple[str, list[Resources]]:
    """The compiler of the record, and its rows."""
    with RECORD.open(newline="") as file:
        made_by = file.readline().strip()
        next(file)
        rows = [Resources(kernel, variant, *map(int, figures)) for kernel, variant, *figures in csv.reader(file)]
    return made_by, rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of every kernel, without a GPU.")
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name} instead of comparing with it")
    rows = measure()
    if parser.parse_args().write:
        return write(rows)
    made_by, recorded = read()
    print(f"recorded with {made_by}, compiled with {compiler()}")
    for row in sorted(set(rows) ^ set(recorded), key=str):
        print("compiled" if row in rows else "recorded", asdict(row))
    return None


if __name__ == "__main__":
    main()
