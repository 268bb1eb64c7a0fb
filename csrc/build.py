"""How setup.py builds the native extension: what it finds, what it decides, and the commands. Needs nothing but Python.

IDM_FAST_BUILD=auto|cpu|cuda|python chooses. auto (the default) builds what this machine can and says why not more; cpu and
cuda build that much or fail with the remedy; python builds nothing. Other variables: CXX, CUDACXX or CUDA_HOME,
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), IDM_FAST_TORCH (the folder of an installed torch), MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "python")
OLDEST_TORCH = (2, 10)
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
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
"""GPUs for which code is compiled by default, as far as nvcc knows them; the newest as PTX as well."""

MEMORY_OF_A_JOB = 2 * 2**30


class CannotBuild(Exception):
    """Why something was not built, and what to do; one line."""


@dataclass
class Torch:
    """An installed torch: its folder, its version and the CUDA version that it was built for (None: CPU build)."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def includes(self) -> list[Path]:
        return [self.folder / "include", self.folder / "include" / "torch" / "csrc" / "api" / "include"]


@dataclass
class Record:
    """What a build made and why not more; `idm_fast/_build.json`, which `idm-fast doctor` reads."""

    mode: str
    cpu: bool = False
    cuda: bool = False
    why_not: dict[str, str] = field(default_factory=dict)
    torch: str | None = None
    torch_cuda: str | None = None
    compiler: str | None = None
    nvcc: str | None = None
    architectures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The record for people."""
        built = [name for name, made in (("C++ (CPU) extension", self.cpu), ("CUDA extension", self.cuda)) if made]
        lines = [f"idm-fast: built {' and '.join(built) or 'no native extension'} ({self.mode})"]
        lines += [f"idm-fast: no {name} extension: {reason}" for name, reason in self.why_not.items()]
        return lines

    def write(self, package: Path) -> None:
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


def mode_from_environment() -> str:
    """IDM_FAST_BUILD; CannotBuild for an unknown word."""
    mode = os.environ.get("IDM_FAST_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise CannotBuild(f"IDM_FAST_BUILD={mode}: expected one of {', '.join(MODES)}")
    return mode


def find_torch() -> Torch:
    """The torch of the environment that is installed into; pip's isolated build hides it from `import`, not from the disk."""
    for folder in _torch_folders():
        version_file = folder / "version.py"
        if version_file.is_file():
            text = version_file.read_text(encoding="utf-8")
            version = re.search(r"__version__ = '([^']+)'", text)
            cuda = re.search(r"^cuda: [^=]*= '([^']+)'", text, re.MULTILINE)
            if version:
                torch = Torch(folder, version.group(1), cuda.group(1) if cuda else None)
                if tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2]) < OLDEST_TORCH:
                    raise CannotBuild(f"torch {torch.version} is installed; install torch 2.10 or newer")
                return torch
    raise CannotBuild("no torch is installed here; install it, then idm-fast again with --force-reinstall --no-deps")


def _torch_folders() -> list[Path]:
    given = os.environ.get("IDM_FAST_TORCH")
    if given:
        return [Path(given)]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    bases = [Path(path) for path in sys.path if path]
    bases += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            bases.append(Path(os.environ[variable]) / "lib" / version / "site-packages")
    import site

    bases += [Path(path) for path in [*site.getsitepackages(), site.getusersitepackages()]]
    return [base / "torch" for base in bases]


def find_compiler() -> list[str]:
    """CXX, or the first C++ compiler on the path; it must compile C++17 for this Python."""
    given = os.environ.get("CXX")
    candidates = [given] if given else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    if given:
        raise CannotBuild(f"CXX={given} is not on the path")
    raise CannotBuild("no C++ compiler was found (c++, g++, clang++); on Debian: apt-get install g++")


def find_python_headers() -> Path:
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise CannotBuild(f"Python.h of Python {version} was not found; on Debian: apt-get install python{version}-dev")
    return folder


def find_pybind11(torch: Torch) -> Path:
    """pybind11's headers: the package's, else the copy that torch carries."""
    try:
        import pybind11
    except ImportError:
        return torch.folder / "include"
    return Path(pybind11.get_include())


def find_nvcc() -> str:
    given = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [given, f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        found = candidate and shutil.which(candidate)
        if found:
            return found
        if candidate and candidate == given:
            raise CannotBuild(f"CUDACXX={given} is not there")
    raise CannotBuild("no nvcc was found; install the CUDA toolkit, or set CUDA_HOME or CUDACXX")


def architectures_for(nvcc: str) -> list[str]:
    """As TORCH_CUDA_ARCH_LIST has them ("8.0", "9.0+PTX"), or the default as far as this nvcc knows them."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return [arch for arch in re.split(r"[;,\s]+", given) if arch]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    supported = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known.split()]
    if not supported:
        raise CannotBuild(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return [*supported[:-1], supported[-1] + "+PTX"]


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code=[{codes}]"]
    return flags


def version_of(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


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
        toolchain.nvcc = find_nvcc()
        toolchain.architectures = architectures_for(toolchain.nvcc)
        record.nvcc, record.architectures = version_of([toolchain.nvcc]), toolchain.architectures
    except CannotBuild as reason:
        if mode == "cuda":
            raise CannotBuild(f"IDM_FAST_BUILD=cuda: {reason}") from None
        record.why_not["CUDA"] = str(reason)
    return toolchain, record


@dataclass
class Job:
    """One command that makes `output` from `inputs`; `depfile` says what headers it read."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


def jobs_of(toolchain: Toolchain, sources: Path, objects: Path, module: Path) -> list[Job]:
    """Everything that makes `module` (idm_fast._C) and, with nvcc, `_cuda.so` beside it."""
    torch = toolchain.torch
    abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]
    torch_headers = [f"-isystem{path}" for path in torch.includes]
    python_headers = [f"-isystem{toolchain.pybind11}", f"-isystem{find_python_headers()}"]
    jobs: list[Job] = []

    def compile_cxx(source: Path, name: str, *flags: str) -> Path:
        output, depfile = objects / f"{name}.o", objects / f"{name}.d"
        command = [*toolchain.cxx, *COMPILE, *flags, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        jobs.append(Job(output, [source], command, depfile))
        return output

    on_x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS if on_x86 else {"portable": []}
    kernels = sorted(set((sources / "cpu").glob("*.cpp")) - {sources / "cpu" / "choose.cpp"})
    cpu = [compile_cxx(k, f"{k.stem}.{isa}", f"-DIDM_ISA={isa}", *flags) for k in kernels for isa, flags in sets.items()]
    cpu.append(compile_cxx(sources / "cpu" / "choose.cpp", "choose"))
    cpu += [compile_cxx(s, s.stem, *abi, *torch_headers) for s in sorted((sources / "register").glob("cpu_*.cpp"))]
    cpu.append(compile_cxx(sources / "schemas.cpp", "schemas", *abi, *torch_headers))
    cpu.append(compile_cxx(sources / "module.cpp", "module", *abi, *torch_headers, *python_headers))
    jobs.append(Job(module, cpu, [*toolchain.cxx, *_linking(torch), *map(str, cpu), "-ltorch_cpu", "-o", str(module)]))

    if toolchain.nvcc:
        cuda = []
        gpu_flags = architecture_flags(toolchain.architectures)
        for source in sorted((sources / "cuda").glob("*.cu")):
            output, depfile = objects / f"{source.stem}.cu.o", objects / f"{source.stem}.cu.d"
            nvcc = [toolchain.nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", *gpu_flags]
            command = [*nvcc, "-ccbin", toolchain.cxx[0], "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
            jobs.append(Job(output, [source], command, depfile))
            cuda.append(output)
        for source in sorted((sources / "register").glob("cuda_*.cpp")):
            cuda.append(compile_cxx(source, source.stem, *abi, "-DUSE_CUDA", *torch_headers))
        library = module.with_name("_cuda.so")
        runtime = Path(toolchain.nvcc).resolve().parent.parent / "lib64"
        # The runtime is linked in: it then does not matter which one torch carries.
        libraries = [f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        # torch_cuda's symbols are found when the library is loaded; so it links beside a CPU build of torch as well.
        jobs.append(Job(library, cuda, [*toolchain.cxx, *_linking(torch), *map(str, cuda), *libraries, "-o", str(library)]))
    return jobs


def _linking(torch: Torch) -> list[str]:
    library = [f"-L{torch.folder / 'lib'}"]
    if platform.system() == "Darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *library]
    return ["-shared", "-Wl,--as-needed", "-s", *library]


def parallel_jobs() -> int:
    """MAX_JOBS, or as many as there are cores and 2 GiB of free memory for each."""
    given = os.environ.get("MAX_JOBS")
    if given:
        return max(int(given), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(min(cores, available // MEMORY_OF_A_JOB), 1)


def run_jobs(jobs: list[Job], objects: Path) -> None:
    """Run them, with ninja where there is one (it repeats only what changed), else by threads. CannotBuild: the first error."""
    objects.mkdir(parents=True, exist_ok=True)
    ninja = _ninja()
    if ninja:
        (objects / "build.ninja").write_text(_ninja_file(jobs), encoding="utf-8")
        command = [ninja, "-C", str(objects), "-j", str(parallel_jobs())]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise CannotBuild(_first_error(done.stdout))
        return

    def run(job: Job) -> None:
        done = subprocess.run(job.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise CannotBuild(_first_error(done.stdout))

    links = [job for job in jobs if job.depfile is None]
    with ThreadPoolExecutor(parallel_jobs()) as pool:
        list(pool.map(run, [job for job in jobs if job.depfile is not None]))
    for job in links:
        run(job)


def _ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def _ninja_file(jobs: list[Job]) -> str:
    lines = ["rule run", "  command = $command", "  description = $out", "  depfile = $depfile", "  deps = gcc"]
    lines += ["rule link", "  command = $command", "  description = $out"]
    for job in jobs:
        inputs = " ".join(map(_ninja_path, job.inputs))
        lines.append(f"build {_ninja_path(job.output)}: {'run' if job.depfile else 'link'} {inputs}")
        lines.append(f"  command = {shlex.join(job.command).replace('$', '$$')}")
        if job.depfile:
            lines.append(f"  depfile = {job.depfile}")
    return "\n".join(lines) + "\n"


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _first_error(output: str) -> str:
    lines = output.splitlines()
    errors = [line for line in lines if re.search(r"\berror\b|cannot find|undefined reference", line)]
    sys.stderr.write(output[-8000:] + "\n")
    return (errors or lines or ["the compiler failed without a word"])[0].strip()


def build(sources: Path, objects: Path, module: Path, toolchain: Toolchain, record: Record) -> None:
    """Build into `module`'s folder and complete `record`. In mode auto a failure is recorded, not raised."""
    started = time.perf_counter()
    module.parent.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(toolchain, sources.resolve(), objects.resolve(), module.resolve())
    try:
        run_jobs(jobs, objects)
        record.cpu, record.cuda = True, toolchain.nvcc is not None
    except CannotBuild as reason:
        if record.mode == "cuda" or (record.mode == "cpu"):
            raise CannotBuild(f"IDM_FAST_BUILD={record.mode}: compiling failed: {reason}") from None
        if toolchain.nvcc:
            toolchain.nvcc = None
            record.why_not["CUDA"] = f"compiling failed: {reason}"
            build(sources, objects, module, toolchain, record)
        else:
            record.why_not["C++"] = f"compiling failed: {reason}"
    record.seconds = round(time.perf_counter() - started, 1)
