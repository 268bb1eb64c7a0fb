"""Runs jobs: with ninja where there is one, which repeats only what changed, else by threads."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .commands import Job
from .machine import CannotBuild, parallel_jobs


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
