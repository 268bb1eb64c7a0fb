"""The commands that compile and link the extensions, as jobs.

IDM_FAST_SANITIZE_LEVEL is how an extension with the compiler's checks is optimized.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path

from .decision import Toolchain
from .machine import find_python_headers

STABLE_ABI = "0x020a000000000000"
"""TORCH_TARGET_VERSION: what is built runs with every torch from 2.10 on, whatever torch's headers it was built with."""

INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
"""Compiler flags of each; which one runs is chosen when the extension is loaded (csrc/cpu/choose.cpp)."""

WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-ignored-attributes"]
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG", *WARNINGS]

SANITIZE_LEVEL = "-O1 -fexpensive-optimizations"
"""Products and sums are fused as in the extension that people run, so that its bounds hold. -O0 compiles in half the time."""

PYBIND11 = 20_000
"""`Job.work` of a small file with pybind11's headers, which takes as long as a kernel of this size."""


@dataclass
class Job:
    """One command that makes `output` from `inputs`; `depfile` (of a compilation) says what headers it read.

    Compilations of more `work` (about the bytes of source, times the GPUs) start first, so that none runs alone at the end.
    """

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None
    work: int = 0


@dataclass
class Compile:
    """Compilations of C++ into one folder; collects the jobs."""

    toolchain: Toolchain
    objects: Path
    jobs: list[Job] = field(default_factory=list)

    def cxx(self, source: Path, name: str, *flags: str, work: int = 0) -> None:
        command = [*self.toolchain.cxx, *COMPILE, *_sanitizing(self.toolchain), *flags]
        self._add(source, name, command, "-MMD", work)

    def cuda(self, source: Path) -> None:
        nvcc = str(self.toolchain.nvcc)
        host = [*_host_compiler(self.toolchain), "-Xcompiler=-fPIC,-fvisibility=hidden"]
        architectures = self.toolchain.architectures
        command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", *host, *architecture_flags(architectures)]
        self._add(source, f"{source.stem}.cu", command, "-MD", len(architectures) * source.stat().st_size)

    def _add(self, source: Path, name: str, command: list[str], dependencies: str, work: int) -> None:
        output, depfile = self.objects / f"{name}.o", self.objects / f"{name}.d"
        files = [dependencies, "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        self.jobs.append(Job(output, [source], [*command, *files], depfile, work or source.stat().st_size))

    def link(self, library: Path, command: list[str], *flags: str) -> list[Job]:
        """All the jobs, with the one that makes `library` of the objects."""
        objects = [job.output for job in self.jobs]
        return [*self.jobs, Job(library, objects, [*command, *map(str, objects), *flags, "-o", str(library)])]


def cpu_jobs(toolchain: Toolchain, sources: Path, objects: Path, library: Path) -> list[Job]:
    """What makes `library` (idm_fast._C)."""
    compile, torch = Compile(toolchain, objects), _torch_headers(toolchain)
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
    choose = sources / "cpu" / "choose.cpp"
    for kernel in sorted(set((sources / "cpu").glob("*.cpp")) - {choose}):
        for isa, flags in sets.items():
            compile.cxx(kernel, f"{kernel.stem}.{isa}", f"-DIDM_ISA={isa}", *flags)
    compile.cxx(choose, "choose")
    for source in [*sorted((sources / "register").glob("cpu_*.cpp")), sources / "schemas.cpp"]:
        compile.cxx(source, source.stem, *torch)
    # Without the flags of the stable ABI: with them, pybind11's headers in older torch refuse to be used.
    headers = [*toolchain.torch.includes, toolchain.pybind11, find_python_headers()]
    compile.cxx(sources / "module.cpp", "module", *(f"-isystem{folder}" for folder in headers), work=PYBIND11)
    link = [*toolchain.cxx, *_linking(), *_sanitizing(toolchain)]
    return compile.link(library, link, f"-L{toolchain.torch.folder / 'lib'}", "-ltorch_cpu")


def cuda_jobs(toolchain: Toolchain, sources: Path, objects: Path, library: Path) -> list[Job]:
    """What makes `library` (_cuda.so)."""
    compile, torch = Compile(toolchain, objects), _torch_headers(toolchain)
    for source in sorted((sources / "cuda").glob("*.cu")):
        compile.cuda(source)
    for source in sorted((sources / "register").glob("cuda_*.cpp")):
        compile.cxx(source, source.stem, *torch, "-DUSE_CUDA")
    # The CUDA runtime is linked in, unseen by others: which one torch carries then does not matter. torch's own libraries are
    # only named, by empty ones: so it links beside a CPU build of torch as well, and finds the real ones, loaded before it.
    host = _host_compiler(toolchain)
    named = [objects / f"lib{name}.so" for name in ("torch_cpu", "torch_cuda")]
    empty = [*toolchain.cxx, "-shared", "-nostdlib", "-x", "c++", os.devnull]
    stubs = [Job(stub, [], [*empty, f"-Wl,-soname,{stub.name}", "-o", str(stub)]) for stub in named]
    link = [str(toolchain.nvcc), "-shared", "-cudart=static", *host, "-Xlinker=-s,--exclude-libs=ALL"]
    # The linker drops what gives it no symbol, unless it is told before; nvcc moves a library named otherwise to the front.
    *compilations, last = compile.link(library, link, *(f"-Xlinker={word}" for word in ("--no-as-needed", *map(str, named))))
    return [*compilations, *stubs, replace(last, inputs=[*last.inputs, *named])]


def _torch_headers(toolchain: Toolchain) -> list[str]:
    # As system headers: their warnings are not ours.
    headers = [f"-isystem{path}" for path in toolchain.torch.includes]
    return [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY", *headers]


def _host_compiler(toolchain: Toolchain) -> list[str]:
    program = next(word for word in toolchain.cxx if Path(word).name not in ("ccache", "sccache", "distcc"))
    return ["-ccbin", program]


def _sanitizing(toolchain: Toolchain) -> list[str]:
    if not toolchain.sanitize:
        return []
    level = os.environ.get("IDM_FAST_SANITIZE_LEVEL") or SANITIZE_LEVEL
    return [f"-fsanitize={toolchain.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", *level.split()]


def _linking() -> list[str]:
    if platform.system() == "Darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared", "-Wl,--as-needed", "-s"]


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code=[{codes}]"]
    return flags
