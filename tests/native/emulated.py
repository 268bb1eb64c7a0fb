"""Builds the CUDA sources for the CPU, on the emulation of a GPU in emulation/, and puts them behind the ops.

The same kernels, launchers, checks and registration as in idm_fast/_cuda.so, compiled by the C++ compiler with IDM_EMULATED;
they serve CPU tensors as implementation "cuda". `python tests/native/emulated.py FOLDER` builds the library with
AddressSanitizer and UBSan, which a test does in a process of its own.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from idm_fast.ops.registry import OPS, add_implementation

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def build_script() -> ModuleType:
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("idm_fast_native_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile into `folder`; CannotBuild without a compiler or where this torch has no headers."""
    script = build_script()
    compiler, found = script.find_compiler(), script.find_torch()
    headers = [f"-isystem{path}" for path in found.includes]
    abi = [f"-DTORCH_TARGET_VERSION={script.STABLE_ABI}", "-DTORCH_STABLE_ONLY"]
    common = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-DIDM_EMULATED", f"-I{HERE / 'emulation'}", *flags]
    sources = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "register").glob("cuda_*.cpp"), HERE / "emulation" / "emulation.cpp"]

    def compiled(source: Path) -> str:
        output = str(folder / f"{source.stem}{source.suffix}.o")
        command = [*compiler, *common, *abi, *headers, "-x", "c++", "-c", str(source), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the emulation:\n{done.stderr}")
        return output

    with ThreadPoolExecutor(script.parallel_jobs()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "emulated.so"
    libraries = [f"-L{found.folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*compiler, "-shared", *flags, *objects, *libraries, "-o", str(library)], check=True)
    return library


def load(library: Path) -> None:
    """Register the kernels of `library` as implementation "cuda" of CPU tensors."""
    schemas = torch.library.Library("idm_fast_emulated", "DEF")
    for name, op in OPS.items():
        schemas.define(str(op.overload._schema).replace("idm_fast::", "").replace(".default", ""))
    KEPT.append(schemas)
    torch.ops.load_library(str(library))
    prefix = "idm_fast_emulated::"
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        if name.startswith(prefix):
            op = name.removeprefix(prefix)
            add_implementation(op, "cuda", getattr(torch.ops.idm_fast_emulated, op).default, ("cpu",))


KEPT: list[torch.library.Library] = []
"""A library's schemas live as long as it does."""


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), SANITIZED))
