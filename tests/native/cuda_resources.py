"""What each CUDA kernel of the built extension takes of a multiprocessor, without a GPU.

    python tests/native/cuda_resources.py            compare with csrc/cuda/resources.csv
    python tests/native/cuda_resources.py --write    write it

Read from idm_fast/_cuda.so, so from the machine code that a GPU gets: build it first, for the architectures of the record.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import triton

import idm_fast

RECORD = Path(__file__).parent.parent.parent / "csrc" / "cuda" / "resources.csv"
LIBRARY = Path(idm_fast.__file__).parent / "_cuda.so"
ARCHITECTURES = (80, 90, 100)
RESERVED = 1024
"""Bytes of shared memory that a block with any takes for the system on sm_90 and later."""


@dataclass(frozen=True, order=True)
class Resources:
    """One kernel on one architecture: registers a thread, bytes of a thread in local memory, shared memory a block.

    Local memory holds what is spilled, and arrays on the stack.
    """

    source: str
    kernel: str
    arch: int
    registers: int
    spilled: int
    shared: int


def compiler() -> str:
    """The version of the nvcc that the extension was built with, which decides all figures."""
    built = json.loads(LIBRARY.with_name("_build.json").read_text())
    found = re.search(r"V([\d.]+)", built["nvcc"])
    return f"nvcc {found.group(1) if found else built['nvcc']}"


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    if not LIBRARY.is_file():
        return "the CUDA extension is not built; idm-fast doctor says why"
    built = set(json.loads(LIBRARY.with_name("_build.json").read_text())["architectures"])
    lacks = [arch for arch in (f"{arch // 10}.{arch % 10}" for arch in ARCHITECTURES) if not built & {arch, f"{arch}+PTX"}]
    return f"the CUDA extension is built for {', '.join(sorted(built))} alone" if lacks else None


def measure() -> list[Resources]:
    """Every kernel on every one of ARCHITECTURES."""
    cuobjdump = shutil.which("cuobjdump") or triton.knobs.nvidia.cuobjdump.path
    command = [cuobjdump, "--dump-resource-usage", str(LIBRARY)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # One ELF for each source and architecture.
    rows = [row for elf in dump.split("Fatbin elf code:") for row in _of_elf(elf)]
    return sorted(row for row in rows if row.arch in ARCHITECTURES)


def _of_elf(listing: str) -> list[Resources]:
    found = re.findall(r"^ Function (\w+):\n\s*(.*)$", listing, re.MULTILINE)
    if not found:
        return []
    arch = int(re.search(r"arch = sm_(\d+)", listing).group(1))
    # nvcc names a file's anonymous namespace after the file.
    (source,) = set(re.findall(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", listing))
    mangled = "\n".join(name for name, _ in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = []
    for name, (_, line) in zip(names, found, strict=True):
        figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        shared = figures["SHARED"] - (RESERVED if arch >= 90 and figures["SHARED"] else 0)
        rows.append(Resources(f"{source}.cu", _name(name), arch, figures["REG"], figures["STACK"] + figures["LOCAL"], shared))
    return rows


def _name(plain: str) -> str:
    """`kernel<types>` of a function; its arguments follow from the types."""
    plain = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+?::|idm::cuda::|idm::|^void ", "", plain)
    depth = 0
    for place, letter in enumerate(plain):
        depth += (letter == "<") - (letter == ">")
        if letter == ">" and depth == 0:
            return plain[: place + 1]
    return plain


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
    if reason := missing():
        sys.exit(reason)
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
