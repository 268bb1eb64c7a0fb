"""Builds the CUDA sources for the CPU, on the emulation of a GPU in emulation/.

The same kernels, launchers, checks and registration as in idm_fast/_cuda.so, compiled by the C++ compiler with IDM_EMULATED.
They serve CPU tensors. `python tests/native/emulated.py FOLDER` builds the library with
AddressSanitizer and UBSan, for tests with IDM_FAST_EMULATED naming it and libasan.so preloaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from idm_fast.ops import native
from idm_fast.ops.registry import OPS

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
sys.path.insert(0, str(CSRC))
from builder.commands import STABLE_ABI  # noqa: E402
from builder.machine import find_compiler, find_torch, parallel_jobs  # noqa: E402

SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile into `folder`; CannotBuild without a compiler or where this torch has no headers."""
    compiler, found = find_compiler(), find_torch()
    headers = [f"-isystem{path}" for path in found.includes]
    abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]
    common = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-DIDM_EMULATED", f"-I{HERE / 'emulation'}", *flags]
    sources = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "register").glob("cuda_*.cpp"), HERE / "emulation" / "emulation.cpp"]

    def compiled(source: Path) -> str:
        output = str(folder / f"{source.stem}{source.suffix}.o")
        command = [*compiler, *common, *abi, *headers, "-x", "c++", "-c", str(source), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the emulation:\n{done.stderr}")
        return output

    with ThreadPoolExecutor(parallel_jobs()) as pool:
        objects = list(pool.map(compiled, sorted(sources, key=lambda source: -source.stat().st_size)))
    library = folder / "emulated.so"
    libraries = [f"-L{found.folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*compiler, "-shared", *flags, *objects, *libraries, "-o", str(library)], check=True)
    return library


def functions(library: Path) -> dict[str, Callable[..., Any]]:
    """The ops of `library` by name, registered for CPU tensors as torch.ops.idm_fast_emulated."""
    schemas = torch.library.Library("idm_fast_emulated", "DEF")
    for op in OPS.values():
        schema = str(op.overload._schema).removeprefix("idm_fast::")
        schemas.define(schema)
        if op.name in IN_TF32:
            schemas.define(schema.replace("(", ".tf32(", 1))
    KEPT.append(schemas)
    torch.ops.load_library(str(library))
    return native.kernels("idm_fast_emulated", "CPU")


IN_TF32 = ("measure", "adjoint", "gram", "project_step", "project_step_backward")
"""Ops that have products with Φ."""

KEPT: list[torch.library.Library] = []
"""A library's schemas live as long as it does."""


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), SANITIZED))
