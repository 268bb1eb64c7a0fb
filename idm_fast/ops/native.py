"""The C++ and CUDA implementations of the ops, from the extension that `pip install` builds (csrc/).

Importing `idm_fast._C` registers its kernels as `torch.ops.idm_fast_native`; `load_cpu` and `load_cuda` put
them behind the ops of the same name. `idm_fast/_build.json` is what the build recorded: what was built, with what, and why
not more.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idm_fast.ops.registry import OPS, add_implementation

PACKAGE = Path(__file__).parent.parent
REINSTALL = "reinstall idm-fast: pip install --force-reinstall --no-deps --no-cache-dir and what it was installed from"


@functools.cache
def load_cpu() -> str | None:
    """Put the C++ kernels behind the ops, once; returns None, or why they are not there."""
    try:
        importlib.import_module("idm_fast._C")
    except ImportError as error:
        return _why_not("C++", error)
    _add("cpu", "CPU")
    return None


@functools.cache
def load_cuda() -> str | None:
    """Put the CUDA kernels behind the ops, once; returns None, or why they are not there. Asks the driver for GPUs."""
    library = PACKAGE / "_cuda.so"
    if load_cpu() or not library.is_file():
        return load_cpu() or _why_not("CUDA", None)
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    if reason := _not_built_for((build_record() or {}).get("architectures", [])):
        return reason
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}; {REINSTALL}"
    _add("cuda", "CUDA")
    return None


def _not_built_for(architectures: list[str]) -> str | None:
    """None if a library for `architectures` ("8.0", "12.0+PTX") runs on every GPU here; else why not.

    Machine code serves later GPUs of the same major number, PTX all later ones.
    """
    built = [(tuple(map(int, re.findall(r"\d+", arch))), "+PTX" in arch) for arch in architectures]
    for index in range(torch.cuda.device_count()):
        here = torch.cuda.get_device_capability(index)
        if not any(arch <= here and (ptx or arch[0] == here[0]) for arch, ptx in built):
            wanted = "{}.{}".format(*here)
            return (
                f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability {wanted}, and the CUDA kernels were "
                f"built for {', '.join(architectures)}; with TORCH_CUDA_ARCH_LIST={wanted} in the environment, {REINSTALL}"
            )
    return None


def _add(name: str, key: str) -> None:
    for op, function in kernels("idm_fast_native", key).items():
        add_implementation(op, name, function, (name,))


def kernels(library: str, key: str) -> dict[str, Callable[..., Any]]:
    """The ops that `library` has kernels for under a dispatch key, by name.

    One with an overload "tf32" (a product with Φ on the tensor cores) takes that for float32 while PyTorch is told to use TF32
    for matrix products.
    """
    prefix = f"{library}::"
    registered = {
        name.removeprefix(prefix)
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
        if name.startswith(prefix)
    }
    functions = {}
    for op in OPS.keys() & registered:
        packet = getattr(getattr(torch.ops, library), op)
        functions[op] = _in_asked_precision(packet) if f"{op}.tf32" in registered else packet.default
    return functions


def _in_asked_precision(packet: Any) -> Callable[..., Any]:
    exact, rounded = packet.default, packet.tf32

    def product(*args: Any) -> Any:
        # Asked for in any way: torch.set_float32_matmul_precision, allow_tf32 and fp32_precision of this backend or of all.
        asked = args[0].dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return rounded(*args) if asked else exact(*args)

    return product


def build_record() -> dict[str, Any] | None:
    """What the build wrote; None for a checkout that was never built."""
    record = PACKAGE / "_build.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None


def instruction_set() -> str:
    """The CPU kernels in use: portable, avx2 or avx512. ImportError without the extension."""
    return importlib.import_module("idm_fast._C").instruction_set()


def notes(record: dict[str, Any] | None, torch_version: str, torch_cuda: str | None) -> list[str]:
    """What in a build differs from the torch in use, and what that means."""
    if not record or not record["cpu"]:
        return []
    found = []
    if record["torch"] != torch_version:
        found.append(f"built with torch {record['torch']}, in use with {torch_version}: fine, the ABI is the same from 2.10 on")
    nvcc = re.search(r"release (\d+)\.", record["nvcc"] or "")
    if record["cuda"] and nvcc and torch_cuda and nvcc[1] != torch_cuda.partition(".")[0]:
        found.append(f"built by CUDA {nvcc[1]}, torch has {torch_cuda}: fine if the driver (nvidia-smi) knows CUDA {nvcc[1]}")
    if record["sanitize"]:
        found.append(f"built with the sanitizers {record['sanitize']}: slow, for tests")
    return found


def _why_not(extension: str, error: ImportError | None) -> str:
    record = build_record()
    if record is None:
        return "this checkout was never built; in its folder: pip install -e ."
    reason = record["why_not"].get(extension)
    if reason:
        return f"it was not built: {reason}"
    running = "{}.{}".format(*sys.version_info)
    if record["python"] != running:
        return f"it was built for Python {record['python']}, and this is {running}; {REINSTALL}"
    return f"it was built with torch {record['torch']} and does not load: {error}; {REINSTALL}"
