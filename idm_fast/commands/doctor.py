"""`idm-fast doctor`: what this machine has and what of idm-fast runs on it. A broken part is reported, not raised."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder

import idm_fast

PACKAGES = (
    "torch", "triton", "diffusers", "accelerate", "numpy", "Pillow", "scikit-image", "safetensors", "tensorboard",
)

PLANNED = {
    "idm_fast.kernels": "Triton kernels",
    "idm_fast.physics.inpainting": "inpainting",
    "idm_fast.physics.mri": "MRI",
    "idm_fast.physics.ct": "CT",
}
"""Parts of the design by the module that will hold them; those that cannot be found are listed as not there yet."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the report."""
    sections: list[tuple[str, Callable[[], Iterable[str]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("native extension", _native),
        ("operations", _operations),
        ("default weights", _weights),
        ("not there yet", _planned),
    ]
    for title, lines in sections:
        print(title)
        try:
            for line in lines():
                print(f"  {line}")
        except BrokenPipeError:
            raise
        except Exception as error:  # the point of a doctor is to go on and say what is broken
            print(f"  broken: {type(error).__name__}: {error}")
        print()


def _versions() -> Iterable[str]:
    yield f"{'idm-fast':13} {idm_fast.__version__}"
    yield f"{'python':13} {platform.python_version()} ({platform.platform()})"
    for name in PACKAGES:
        try:
            yield f"{name:13} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name:13} not installed"


def _devices() -> Iterable[str]:
    import torch

    yield f"cpu           {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in PyTorch"
    yield f"CUDA          {torch.version.cuda or 'this PyTorch is built without CUDA'}"
    yield f"driver        {_driver()}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index:<8} {device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
    yield f"--device auto uses {'cuda' if torch.cuda.is_available() else 'cpu'}"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none found (no nvidia-smi)"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if done.returncode or not done.stdout.strip():
        return f"nvidia-smi fails: {(done.stderr or done.stdout).strip()[:100]}"
    return done.stdout.split()[0]


def _native() -> Iterable[str]:
    import torch

    from idm_fast.ops import native

    record = native.build_record()
    if record:
        built = [name for name, made in (("C++ (CPU)", record["cpu"]), ("CUDA", record["cuda"])) if made]
        yield f"built         {' and '.join(built) or 'nothing'} (IDM_FAST_BUILD={record['mode']}, {record['seconds']:.0f} s)"
        yield f"with          torch {record['torch']}, {record['compiler']}" if record["cpu"] else "with          nothing"
        if record["cuda"]:
            left_out = record.get("left_out")
            without = f"; not for {', '.join(left_out)}: they need compute capability 8.0 or later" if left_out else ""
            yield f"              {record['nvcc']}, for {', '.join(record['architectures'])}{without}"
    reason = native.load_cpu()
    yield f"C++           {reason or f'in use, {native.instruction_set()} kernels'}"
    yield f"CUDA          {native.load_cuda() or 'loaded'}"
    for note in native.notes(record, torch.__version__, torch.version.cuda):
        yield f"note          {note}"


def _operations() -> Iterable[str]:
    yield f"IDM_FAST_IMPL is {os.environ.get('IDM_FAST_IMPL') or 'not set'}"
    import torch

    from idm_fast.ops import missing, report
    from idm_fast.ops.registry import current_choice

    for name, reason in missing().items():
        yield f"{name} is missing: {reason}"
    if torch.cuda.is_available() and current_choice() is None:
        yield (
            "cuda runs as plain PyTorch unasked; `idm-fast bench --device cuda --quick --only kernels --out DIR` finds what is "
            "fastest on this GPU, IDM_FAST_IMPL=DIR/fastest.json runs by it"
        )
    for row in report():
        others = [name for name in row.available if name != row.implementation]
        also = f"; also here: {', '.join(others)}" if others else ""
        yield f"{row.op:25} {row.device:5} {row.implementation:10} {row.reason}{also}"


def _weights() -> Iterable[str]:
    from idm_fast.pretrained import load_weights

    try:
        model = load_weights()
    except ValueError as error:
        yield str(error)
        return
    steps, trained = model.config["steps"], model.config["trained_ratios"] or []
    ratios = ", ".join(f"{ratio:g}" for ratio in trained) or "unknown"
    size = sum(parameter.numel() for parameter in model.parameters())
    yield f"{size / 1e6:.2f} M parameters, T = {steps}, trained for ratio {ratios}"


def _planned() -> Iterable[str]:
    for module, what in PLANNED.items():
        if not _found(module):
            yield f"{what} ({module})"


def _found(module: str) -> bool:
    """Whether a module exists, without importing what holds it, which may be what is broken."""
    parent = importlib.util.find_spec(module.rpartition(".")[0])
    if parent is None:
        return False
    return PathFinder.find_spec(module, parent.submodule_search_locations) is not None
