"""What this machine has: torch, compilers, their headers, GPUs that nvcc knows, cores and memory. Needs nothing but Python.

Variables: CXX; CUDACXX, CUDA_HOME or CUDA_PATH (one that is set is the only place where nvcc is looked for);
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"); IDM_FAST_TORCH (the folder of an installed torch); MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)

ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
"""GPUs for which code is compiled by default, as far as nvcc knows them; the newest as PTX as well."""

MEMORY_OF_A_JOB = 2 * 2**30

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


def version_of(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


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
