"""What each CUDA kernel of csrc/cuda takes of a multiprocessor, from nvcc, without a GPU.

    python tests/native/cuda_resources.py            compare with csrc/cuda/resources.csv
    python tests/native/cuda_resources.py --write    write it
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

SOURCES = Path(__file__).parent.parent.parent / "csrc" / "cuda"
RECORD = SOURCES / "resources.csv"
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, order=True)
class Resources:
    """One kernel on one architecture: registers a thread, bytes spilled or on the stack a thread, shared memory a block."""

    source: str
    kernel: str
    arch: int
    registers: int
    spilled: int
    shared: int


def compiler() -> str:
    """The version of nvcc, which decides all figures."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", version)
    return f"nvcc {found.group(1) if found else version}"


def compiled(source: Path) -> list[Resources]:
    """The kernels of one file on every architecture."""
    flags = [flag for arch in ARCHITECTURES for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    with tempfile.TemporaryDirectory() as folder:
        # The GPU's half alone: what the host runs takes none of these.
        options = ["-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v", "-fatbin", "-o", f"{folder}/kernels.fatbin"]
        command = ["nvcc", *options, *flags, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stderr}")
    return [_resources(source.name, entry) for entry in done.stderr.split("Compiling entry function '")[1:]]


def _resources(source: str, entry: str) -> Resources:
    figures = [re.search(pattern, entry) for pattern in (r"for 'sm_(\d+)", r"Used (\d+) registers", r"(\d+) bytes smem")]
    arch, registers, shared = (int(found.group(1)) if found else 0 for found in figures)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", entry))
    return Resources(source, _name(entry.partition("'")[0]), arch, registers, spilled, shared)


def _name(mangled: str) -> str:
    """The kernel and the types it is compiled for; the arguments of its function follow from them."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(anonymous namespace\)::|idm::cuda::|idm::|^void ", "", plain)
    return _template(plain)


def _template(plain: str) -> str:
    """`kernel<…>` of `kernel<…>(…)`."""
    depth = 0
    for place, letter in enumerate(plain):
        depth += (letter == "<") - (letter == ">")
        if letter == ">" and depth == 0:
            return plain[: place + 1]
    return plain


def measure() -> list[Resources]:
    """Compile everything, for every architecture."""
    with ThreadPoolExecutor(2) as pool:
        largest_first = sorted(SOURCES.glob("*.cu"), key=lambda source: -source.stat().st_size)
        return sorted(row for rows in pool.map(compiled, largest_first) for row in rows)


def write(rows: list[Resources]) -> None:
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([[compiler()], [field.name for field in fields(Resources)], *map(astuple, rows)])


def read() -> tuple[str, list[Resources]]:
    """The compiler of the record, and its rows."""
    with RECORD.open(newline="") as file:
        made_by = file.readline().strip()
        next(file)
        return made_by, [Resources(source, kernel, *map(int, figures)) for source, kernel, *figures in csv.reader(file)]


def main() -> None:
    if not shutil.which("nvcc"):
        sys.exit("nvcc is not on the path")
    rows = measure()
    if "--write" in sys.argv[1:]:
        return write(rows)
    made_by, recorded = read()
    print(f"recorded with {made_by}, compiled with {compiler()}")
    for row in sorted(set(rows) ^ set(recorded)):
        print("compiled" if row in rows else "recorded", row)
    return None


if __name__ == "__main__":
    main()
