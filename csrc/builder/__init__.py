"""How setup.py builds the native extension: `decide` what this machine can, then `build` it. Needs nothing but Python.

machine.py finds, decision.py decides, commands.py has the compilers' commands, run.py runs them.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from .commands import Job, cpu_jobs, cuda_jobs
from .decision import Record, Toolchain, decide, mode_from_environment
from .machine import CannotBuild
from .run import run_jobs

__all__ = ["CannotBuild", "Record", "Toolchain", "build", "built_files", "decide", "install", "mode_from_environment"]


def built_files(package: Path) -> list[Path]:
    """What a build, this one or an earlier one, has put into the package's folder."""
    return sorted({*package.glob("_C.*"), *package.glob("_cuda.so"), *package.glob("_build.json")})


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
