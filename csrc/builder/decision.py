"""What is built here, and why not more: by IDM_FAST_BUILD and what the machine has.

IDM_FAST_BUILD=auto|cpu|cuda|python chooses. auto (the default) builds what this machine can and says why not more; cpu and
cuda build that much or fail with the remedy; python builds nothing. IDM_FAST_SANITIZE=address,undefined builds the CPU
extension with the compiler's checks, for tests.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .machine import (
    CannotBuild,
    Torch,
    architectures_for,
    find_compiler,
    find_nvcc,
    find_pybind11,
    find_python_headers,
    find_torch,
    too_old,
    version_of,
)

MODES = ("auto", "cpu", "cuda", "python")


@dataclass
class Record:
    """What a build made and why not more; `idm_fast/_build.json`, which `idm-fast doctor` reads."""

    mode: str
    cpu: bool = False
    cuda: bool = False
    why_not: dict[str, str] = field(default_factory=dict)
    python: str = "{}.{}".format(*sys.version_info)
    torch: str | None = None
    torch_cuda: str | None = None
    compiler: str | None = None
    nvcc: str | None = None
    architectures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    sanitize: str | None = None
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The record for people."""
        built = [name for name, made in (("C++ (CPU) extension", self.cpu), ("CUDA extension", self.cuda)) if made]
        lines = [f"idm-fast: built {' and '.join(built) or 'no native extension'} ({self.mode})"]
        lines += [f"idm-fast: no {name} extension: {reason}" for name, reason in self.why_not.items()]
        if self.left_out:
            lines.append(f"idm-fast: no CUDA kernels for {', '.join(self.left_out)}: they need compute capability 8.0 or later")
        return lines

    def write(self, package: Path) -> None:
        """Into the package's folder."""
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


@dataclass
class Toolchain:
    """What a build uses. `cxx` and `nvcc` are commands; `nvcc` None builds no CUDA."""

    torch: Torch
    cxx: list[str]
    pybind11: Path
    nvcc: str | None
    architectures: list[str]
    sanitize: str | None = None


def mode_from_environment() -> str:
    """IDM_FAST_BUILD; CannotBuild for an unknown word."""
    mode = os.environ.get("IDM_FAST_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise CannotBuild(f"IDM_FAST_BUILD={mode}: expected one of {', '.join(MODES)}")
    return mode


def decide(mode: str) -> tuple[Toolchain | None, Record]:
    """What will be built. CannotBuild when `mode` demands what this machine cannot."""
    record = Record(mode)
    if mode == "python":
        record.why_not = dict.fromkeys(("C++", "CUDA"), "IDM_FAST_BUILD=python")
        return None, record
    try:
        if platform.system() not in ("Linux", "Darwin"):
            raise CannotBuild(f"it builds on Linux and macOS, and this is {platform.system()}")
        torch = find_torch()
        record.torch, record.torch_cuda = torch.version, torch.cuda
        toolchain = Toolchain(torch, find_compiler(), find_pybind11(torch), None, [])
        toolchain.sanitize = record.sanitize = os.environ.get("IDM_FAST_SANITIZE") or None
        find_python_headers()
        record.compiler = version_of(toolchain.cxx)
    except CannotBuild as reason:
        if mode != "auto":
            raise CannotBuild(f"IDM_FAST_BUILD={mode}: {reason}") from None
        record.why_not = dict.fromkeys(("C++", "CUDA"), str(reason))
        return None, record
    try:
        if mode == "cpu":
            raise CannotBuild("IDM_FAST_BUILD=cpu")
        if toolchain.sanitize:
            raise CannotBuild("IDM_FAST_SANITIZE is for the CPU extension")
        toolchain.nvcc = find_nvcc()
        chosen = architectures_for(toolchain.nvcc)
        record.left_out = [arch for arch in chosen if too_old(arch)]
        toolchain.architectures = record.architectures = [arch for arch in chosen if not too_old(arch)]
        record.nvcc = version_of([toolchain.nvcc])
    except CannotBuild as reason:
        if mode == "cuda":
            raise CannotBuild(f"IDM_FAST_BUILD=cuda: {reason}") from None
        record.why_not["CUDA"] = str(reason)
    return toolchain, record
