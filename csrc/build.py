"""How setup.py builds the native extension: what it finds, what it decides, and the commands. Needs nothing but Python.

IDM_FAST_BUILD=auto|cpu|cuda|python chooses. auto (the default) builds what this machine can and says why not more; cpu and
cuda build that much or fail with the remedy; python builds nothing. Other variables: CXX; CUDACXX, CUDA_HOME or CUDA_PATH
(one that is set is the only place where nvcc is looked for); TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"); IDM_FAST_TORCH (the folder
of an installed torch); MAX_JOBS; IDM_FAST_SANITIZE=address,undefined (the CPU extension with the compiler's checks, for tests),
and IDM_FAST_SANITIZE_LEVEL, how such an extension is optimized.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
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

SANITIZE_LEVEL = "-O1 -fexpensive-optimizations"
"""Products and sums are fused as in the extension that people run, so that its bounds hold. -O0 compiles in half the time."""

MEMORY_OF_A_JOB = 2 * 2**30

PYBIND11 = 20_000
"""`Job.work` of a small file with pybind11's headers, which takes as long as a kernel of this size."""

AGAIN = "reinstall idm-fast: pip install --force-reinstall --no-deps --no-cache-dir and what it was installed from"
"""pip would otherwise take the wheel that it built and kept when the machine was different."""


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


def built_files(package: Path) -> list[Path]:
    """What a build, this one or an earlier one, has put into the package's folder."""
    return sorted({*package.glob("_C.*"), *package.glob("_cuda.so"), *package.glob("_build.json")})


def mode_from_environment() -> str:
    """IDM_FAST_BUILD; CannotBuild for an unknown word."""
    mode = os.environ.get("IDM_FAST_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise CannotBuild(f"IDM_FAST_BUILD={mode}: expected one of {', '.join(MODES)}")
    return mode


def find_torch() -> Torch:
    """The torch of the environment that is installed into; pip's isolated build hides it from `import`, not from the disk."""
    given = os.environ.get("IDM_FAST_TORCH")
    for folder in [Path(given)] if given else _torch_folders():
        torch = _torch_in(folder)
        if torch is None:
            continue
        if tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2]) < OLDEST_TORCH:
            raise CannotBuild(f"torch {torch.version} is installed; install torch 2.10 or newer, then {AGAIN}")
        if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            raise CannotBuild(f"torch {torch.version} has no C++ headers here; install PyTorch's own wheel, then {AGAIN}")
        return torch
    if given:
        raise CannotBuild(f"IDM_FAST_TORCH={given} is not the folder of an installed torch (the one that has version.py)")
    raise CannotBuild(f"no torch is installed here; install it, then {AGAIN}")


def _torch_in(folder: Path) -> Torch | None:
    version_file = folder / "version.py"
    if not version_file.is_file():
        return None
    text = version_file.read_text(encoding="utf-8")
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda[^=]*= '([^']+)'", text, re.MULTILINE)
    return Torch(folder, version.group(1), cuda.group(1) if cuda else None) if version else None


def _torch_folders() -> list[Path]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    bases = [path for path in sys.path if path]
    bases += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            bases.append(f"{os.environ[variable]}/lib/{version}/site-packages")
    # A virtual environment cannot import the user's packages, unless it was made with --system-site-packages.
    if sys.base_prefix in site.PREFIXES:
        bases.append(site.getusersitepackages())
    return [Path(base) / "torch" for base in bases]


def find_compiler() -> list[str]:
    """The command CXX, or the first C++ compiler on the path."""
    given = os.environ.get("CXX")
    candidates = [given] if given else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    if given:
        raise CannotBuild(f"CXX={given} is not on the path")
    raise CannotBuild("no C++ compiler was found (c++, g++, clang++); install one (Debian: apt-get install g++), or set CXX")


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
    """nvcc; a variable that names a place is an explicit choice, and nothing else is looked at."""
    for variable, folder in (("CUDACXX", ""), ("CUDA_HOME", "/bin/nvcc"), ("CUDA_PATH", "/bin/nvcc")):
        given = os.environ.get(variable)
        if given:
            found = shutil.which(given + folder)
            if found is None:
                raise CannotBuild(f"{variable}={given}: there is no nvcc; correct it or unset it")
            return found
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise CannotBuild("no nvcc was found; install the CUDA toolkit, or set CUDA_HOME or CUDACXX")
    return found


def architectures_for(nvcc: str) -> list[str]:
    """As TORCH_CUDA_ARCH_LIST has them ("8.0", "9.0+PTX"), or the default as far as this nvcc knows them."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        chosen = [arch for arch in re.split(r"[;,\s]+", given) if arch]
        if all(map(too_old, chosen)):
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST={given}: the kernels need compute capability 8.0 or later")
        return chosen
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    supported = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known.split()]
    if not supported:
        raise CannotBuild(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return [*supported[:-1], supported[-1] + "+PTX"]


def too_old(architecture: str) -> bool:
    """Whether these GPUs lack bfloat16 and TF32: "7.5", say, which images of containers name beside later ones."""
    return re.match(r"[1-7]\.", architecture) is not None


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


def parallel_jobs() -> int:
    """MAX_JOBS, or as many as there are cores and 2 GiB of free memory for each."""
    given = os.environ.get("MAX_JOBS", "")
    if given:
        if not given.isdigit():
            raise CannotBuild(f"MAX_JOBS={given}: expected a number of compilers to run at once")
        return max(int(given), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = free_memory(Path("/"))
    return cores if memory is None else max(min(cores, memory // MEMORY_OF_A_JOB), 1)


def free_memory(root: Path) -> int | None:
    """Bytes that new programs can have: the kernel's estimate, and no more than a container is allowed; None if unknown."""
    limits = []
    meminfo = _text(root / "proc" / "meminfo")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
    if available:
        limits.append(int(available.group(1)) * 1024)
    # The group of this process and all above it (cgroup v2); in a container, and with v1, the limit stands at the mount.
    group = re.search(r"^0::/(.*)$", _text(root / "proc" / "self" / "cgroup"), re.MULTILINE)
    mount = root / "sys" / "fs" / "cgroup"
    inner = mount / (group.group(1) if group else "")
    folders = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount)]
    for file in [*(folder / "memory.max" for folder in folders), mount / "memory" / "memory.limit_in_bytes"]:
        text = _text(file).strip()
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def run_jobs(jobs: list[Job], objects: Path) -> None:
    """Run them, with ninja where there is one (it repeats only what changed), else by threads. CannotBuild: the first error."""
    for folder in {objects, *(job.output.parent for job in jobs)}:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = sorted(jobs, key=lambda job: -job.work)
    ninja = _ninja()
    if ninja:
        (objects / "build.ninja").write_text(_ninja_file(jobs), encoding="utf-8")
        _run([ninja, "-C", str(objects), "-j", str(parallel_jobs())])
        return
    with ThreadPoolExecutor(parallel_jobs()) as pool:
        compilations = [pool.submit(_run, job.command) for job in jobs if job.depfile]
        try:
            for compilation in compilations:
                compilation.result()
        except CannotBuild:
            pool.shutdown(cancel_futures=True)
            raise
    for job in jobs:
        if not job.depfile:
            _run(job.command)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode:
        raise CannotBuild(_first_error(done.stdout))


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
    errors = [line for line in lines if re.search(r"\berror\b:?|cannot find|undefined reference|not found", line)]
    sys.stderr.write(output[-8000:] + "\n")
    return (errors or lines or ["the compiler failed without a word"])[0].strip()


def build(sources: Path, objects: Path, package: Path, module: str, toolchain: Toolchain, record: Record) -> None:
    """Build into the folder `package`, the C++ extension under the file name `module`, and complete `record`.

    What an earlier build left there goes. In mode auto a failure is recorded; in others CannotBuild is raised, and the folder
    is as it was.
    """
    started = time.perf_counter()
    sources = sources.resolve()
    # A folder for each: objects do not mention torch's headers as something that they depend on.
    objects = objects.resolve() / "-".join(filter(None, ["native", toolchain.torch.version, toolchain.sanitize]))
    parts = {"C++": cpu_jobs(toolchain, sources, objects / "cpu", objects / "cpu" / "_C.so")}
    if toolchain.nvcc:
        parts["CUDA"] = cuda_jobs(toolchain, sources, objects / "cuda", objects / "cuda" / "_cuda.so")
    failed = _run_parts(parts, objects)
    if failed and record.mode != "auto":
        part, reason = next(iter(failed.items()))
        raise CannotBuild(f"IDM_FAST_BUILD={record.mode}: compiling the {part} extension failed: {reason}")
    record.why_not |= {part: f"compiling failed: {reason}" for part, reason in failed.items()}
    record.cpu, record.cuda = "C++" not in failed, bool(toolchain.nvcc) and not failed
    if not record.cpu:
        record.why_not.setdefault("CUDA", "it needs the C++ extension")
    made = {module: objects / "cpu" / "_C.so"} if record.cpu else {}
    if record.cuda:
        made["_cuda.so"] = objects / "cuda" / "_cuda.so"
    record.seconds = round(time.perf_counter() - started, 1)
    install(package, made, record)


def _run_parts(parts: dict[str, list[Job]], objects: Path) -> dict[str, CannotBuild]:
    """All jobs at once, which keeps every core busy; those that fail by their part, each part by itself when one did."""
    try:
        run_jobs([job for jobs in parts.values() for job in jobs], objects)
    except CannotBuild as reason:
        if len(parts) == 1:
            return {next(iter(parts)): reason}
        for part, jobs in parts.items():
            try:
                run_jobs(jobs, objects)
            except CannotBuild as reason:
                return {part: reason}
    return {}


def install(package: Path, made: dict[str, Path], record: Record) -> None:
    """Put the files `made` (by their names there) and the record into the package's folder, in place of an earlier build's."""
    for file in built_files(package):
        file.unlink()
    package.mkdir(parents=True, exist_ok=True)
    for name, file in made.items():
        shutil.copy2(file, package / name)
    record.write(package)  # last: it says what is there
