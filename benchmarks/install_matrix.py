"""Does installing end well, whatever the machine has? Installs into fresh environments and says what came of each.

    python -m benchmarks.install_matrix [--only WORD] [--out FILE.md] [--python VERSION=PROGRAM ...]

Run it with a Python that has torch. An environment "with torch" sees this one's packages as its own; nothing but build
requirements is downloaded, and dependencies are not installed. The machine's lacks are simulated: CXX, CUDA_HOME and PATH lead
nowhere, or to a compiler that fails. Other Pythons (--python) build with the headers of this one's torch and cannot load it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = "/nonexistent"
NO_NVCC = {"CUDA_HOME": NOWHERE}
NO_COMPILER = {"CXX": NOWHERE, **NO_NVCC}


@dataclass
class Case:
    """One installation. `expect`: what is built, or "refused"."""

    what: str
    expect: str
    environment: dict[str, str] = field(default_factory=dict)
    torch: bool = True
    isolated: bool = True
    editable: bool = False
    sdist: bool = False
    python: str = sys.executable
    path: str | None = None


@dataclass
class Result:
    """What came of a case; `said` is the line that explains it, `tag` that of the wheel."""

    case: Case
    built: str
    tag: str
    seconds: float
    said: str

    @property
    def holds(self) -> bool:
        return self.built == self.case.expect


def cases(pythons: dict[str, str], broken: Path) -> Iterable[Case]:
    """`broken`: a program that fails whatever it is asked."""
    both = "C++ and CUDA" if shutil.which("nvcc") else "C++"
    this_torch = str(site_packages(Path(sys.prefix)) / "torch")
    yield Case("everything there", both)
    yield Case("no nvcc", "C++", NO_NVCC)
    yield Case("no nvcc; no build isolation: neither ninja nor pybind11", "C++", NO_NVCC, isolated=False)
    yield Case("no nvcc; editable", "C++", NO_NVCC, editable=True)
    yield Case("no nvcc; editable, no build isolation", "C++", NO_NVCC, isolated=False, editable=True)
    yield Case("no nvcc; from the sdist", "C++", NO_NVCC, sdist=True)
    yield Case("an nvcc that fails", "C++", {"CUDACXX": str(broken)})
    yield Case("no compiler", "nothing", NO_COMPILER)
    yield Case("no compiler: an empty PATH", "nothing", NO_NVCC, path="")
    yield Case("no compiler; editable", "nothing", NO_COMPILER, editable=True)
    yield Case("no compiler; no build isolation", "nothing", NO_COMPILER, isolated=False)
    yield Case("a compiler that fails", "nothing", {"CXX": str(broken), **NO_NVCC})
    yield Case("no torch", "nothing", torch=False)
    yield Case("no torch; editable", "nothing", torch=False, editable=True)
    yield Case("no torch; from the sdist", "nothing", torch=False, sdist=True)
    yield Case("python asked for", "nothing", {"IDM_FAST_BUILD": "python"})
    yield Case("cuda asked for, no nvcc", "refused", {"IDM_FAST_BUILD": "cuda", **NO_NVCC})
    yield Case("cuda asked for, an nvcc that fails", "refused", {"IDM_FAST_BUILD": "cuda", "CUDACXX": str(broken)})
    yield Case("cpu asked for, no compiler", "refused", {"IDM_FAST_BUILD": "cpu", **NO_COMPILER})
    yield Case("cpu asked for, no torch", "refused", {"IDM_FAST_BUILD": "cpu"}, torch=False)
    yield Case("cpu asked for, no torch; editable", "refused", {"IDM_FAST_BUILD": "cpu"}, torch=False, editable=True)
    yield Case("an unknown word asked for", "refused", {"IDM_FAST_BUILD": "gpu"})
    for version, program in pythons.items():
        yield Case(f"Python {version}, no torch", "nothing", torch=False, python=program)
        headers = {"IDM_FAST_TORCH": this_torch, **NO_NVCC}
        yield Case(f"Python {version}, torch's headers, no nvcc", "C++", headers, torch=False, python=program)


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def environment_for(case: Case, folder: Path) -> Path:
    """A virtual environment, served by this one's pip; returns its Python."""
    subprocess.run([case.python, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    target = site_packages(folder)
    if case.torch:
        for entry in site_packages(Path(sys.prefix)).iterdir():
            hidden = entry.suffix == ".pth" or re.match(r"(idm_fast|__editable__|ninja|pybind11|pip\b)", entry.name)
            if not hidden and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    return python


def source_copy(folder: Path) -> Path:
    """What git knows of the tree: no leftovers of a build."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(case: Case, scratch: Path) -> Result:
    python = environment_for(case, scratch / "environment")
    source = target = source_copy(scratch / "source")
    if case.sdist:
        subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, check=True, capture_output=True)
        (archive,) = (source / "dist").glob("*.tar.gz")
        target = Path(shutil.copy(archive, scratch))
    inherited = {"HOME", "PATH", "LANG", "TMPDIR", "SSL_CERT_FILE"}
    variables = {name: value for name, value in os.environ.items() if name in inherited or name.startswith("PIP_")}
    variables |= case.environment
    if case.path is not None:
        variables["PATH"] = f"{python.parent}:{case.path}".rstrip(":")
    # A wheel first, so that its tag is seen; editable installs make theirs unseen.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--no-cache-dir"]
    options = ["-v", "--no-deps", *([] if case.isolated else ["--no-build-isolation"])]
    command = [*pip, "install", *options, "-e", str(target)]
    if not case.editable:
        command = [*pip, "wheel", *options, "-w", str(scratch / "wheel"), str(target)]
    started = time.perf_counter()
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip().startswith("idm-fast: ")]
    said = [line for line in said if "not built" in line or "no C++" in line or "no CUDA" in line or "IDM_FAST_BUILD=" in line]
    line = (said[0] if said else "").removeprefix("idm-fast: ").replace(str(scratch), "…")
    if done.returncode:
        return Result(case, "refused" if said else f"pip failed: {done.stdout[-300:]}", "", seconds, line)
    package, tag = source / "idm_fast", "editable"
    if not case.editable:
        (wheel,) = (scratch / "wheel").glob("*.whl")
        tag = wheel.stem.split("-", 2)[2]
        subprocess.run([*pip, "install", "-q", "--no-deps", str(wheel)], env=variables, check=True)
        package = site_packages(scratch / "environment") / "idm_fast"
        names = zipfile.ZipFile(wheel).namelist()
        assert any(name.endswith(".safetensors") for name in names) and any(name.endswith(".csv") for name in names)
    return Result(case, what_works(case, python, package, scratch), tag, seconds, line)


def what_works(case: Case, python: Path, package: Path, scratch: Path) -> str:
    record = json.loads((package / "_build.json").read_text())
    files = {file.name.partition(".")[0] for file in package.iterdir() if file.suffix == ".so"}
    if files != {name for name, made in (("_C", record["cpu"]), ("_cuda", record["cuda"])) if made}:
        return f"the record differs from the files {files}"
    if case.torch:
        # Away from the sources, so that it is the installed package.
        ask = "from idm_fast.ops import native, couple; import torch; t = torch.ones(3); couple(t, t, t[:1]);"
        ask += "print(native.PACKAGE, native.load_cpu() is None)"
        done = subprocess.run([python, "-c", ask], cwd=scratch, capture_output=True, text=True)
        if done.returncode or done.stdout.split() != [str(package), str(record["cpu"])]:
            return f"does not work: {(done.stdout + done.stderr)[-300:]}"
    return " and ".join(name for name, made in (("C++", record["cpu"]), ("CUDA", record["cuda"])) if made) or "nothing"


def table(results: list[Result]) -> str:
    lines = ["| machine | built | wheel | seconds | what it says |", "|---|---|---|---|---|"]
    for r in results:
        verdict = r.built if r.holds else f"**{r.built}**, expected {r.case.expect}"
        lines.append(f"| {r.case.what} | {verdict} | {r.tag} | {r.seconds:.0f} | {r.said.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose description matches this expression")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--python", nargs="*", default=[], metavar="VERSION=PROGRAM", help="other Pythons")
    arguments = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken"
        broken.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_80 && exit\necho "error: broken"; exit 1\n')
        broken.chmod(0o755)
        for number, case in enumerate(cases(pythons, broken)):
            if re.search(arguments.only, case.what):
                scratch = Path(folder) / str(number)
                scratch.mkdir()
                results.append(run(case, scratch))
                print(table(results[-1:]).splitlines()[-1], flush=True)
                shutil.rmtree(scratch)
    if arguments.out:
        arguments.out.write_text(table(results), encoding="utf-8")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
