"""Runs a module on a GPU that is not there: `python tests/hollow_gpu MODULE [ARGUMENT ...]`.

PyTorch built for CUDA 13 does on the host what it does with an H100 of 80 GiB: its allocator, its dispatch, autocast, what
cuBLAS and cuDNN are asked, Triton's compiler and launcher, the CUDA extension's checks and launches. The kernels themselves do
nothing (hollow_gpu.cpp), so results are arbitrary and times are those of the host. What it shows:

    python tests/hollow_gpu benchmarks.memory_against_prediction   # counted memory against PyTorch's allocator
    python tests/hollow_gpu pytest -m gpu --assert=plain           # of GPU tests, what fails other than by a value

Not seen this way: workspaces of cuDNN, its attention (flash attention runs instead), and what a kernel does. A model's α and v
are not checked, for they cannot be read (sitecustomize.py). The CUDA extension takes part when it was built with
NVCC_APPEND_FLAGS=-cudart=shared. Wanted: a CUDA toolkit (CUDA_HOME) and a C++ compiler (CXX).
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "hollow_gpu"
INSIDE = "HOLLOW_GPU"


def build() -> Path:
    """The library to preload, in a folder of its own, where Triton looks for the driver by its name."""
    source, library = HERE / "hollow_gpu.cpp", BUILT / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        BUILT.mkdir(parents=True, exist_ok=True)
        include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
        compiler = os.environ.get("CXX", "c++")
        flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{include}"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library), "-ldl"], check=True)
        link = BUILT / "libcuda.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)
    return library


def start(arguments: list[str]) -> None:
    """Begin again with the library in front of the real ones."""
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != "13":
        sys.exit(f"this PyTorch is built for CUDA {torch.version.cuda}, expected 13; install it from the default index")
    if not arguments:
        sys.exit(__doc__)
    library = build()
    environment = os.environ | {
        INSIDE: "1",
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "HOLLOW_GPU_CUDNN": str(torch.backends.cudnn.version()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH")])),
        "NVCC_APPEND_FLAGS": "-cudart=shared",  # for a CUDA extension that is built within
    }
    os.execve(sys.executable, [sys.executable, str(HERE), *arguments], environment)


def main() -> None:
    if os.environ.get(INSIDE) is None:
        start(sys.argv[1:])
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
