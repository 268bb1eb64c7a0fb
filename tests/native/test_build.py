"""What csrc/builder finds and decides, without compiling; and that this machine's build made all that it can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import builder
import pytest
import torch
from builder import commands, run
from builder import machine as finding

from idm_fast.ops import native

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name for name in os.environ if name.startswith("IDM_FAST_")}
    others = {"CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "VIRTUAL_ENV", "CONDA_PREFIX"}
    for name in ours | (others & os.environ.keys()):
        monkeypatch.delenv(name)


def program(path: Path, output: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


def torch_in(folder: Path, version: str = "2.12.0", cuda: str | None = "12.8", headers: bool = True) -> Path:
    """A folder that looks like an installed torch."""
    torch = folder / "torch"
    torch.mkdir(parents=True)
    (torch / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n")
    if headers:
        header = torch / "include" / "torch" / "csrc" / "stable" / "library.h"
        header.parent.mkdir(parents=True)
        header.touch()
    return torch


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with torch for CUDA 12.8, a compiler and an nvcc."""
    program(tmp_path / "bin" / "g++", "g++ 12.2.0")
    program(tmp_path / "cuda" / "bin" / "nvcc", "release 13.0\ncompute_80\ncompute_90\ncompute_100")
    monkeypatch.setenv("IDM_FAST_TORCH", str(torch_in(tmp_path)))
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "g++"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path


def test_a_machine_with_everything_builds_everything(machine: Path) -> None:
    toolchain, record = builder.decide("auto")
    assert record.why_not == {} and toolchain.nvcc == str(machine / "cuda" / "bin" / "nvcc")
    assert (record.torch, record.torch_cuda) == ("2.12.0", "12.8")
    assert toolchain.architectures == ["8.0", "9.0", "10.0+PTX"], "of the default ones those that this nvcc knows"


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDM_FAST_BUILD", "gpu")
    with pytest.raises(builder.CannotBuild, match="IDM_FAST_BUILD=gpu: expected one of auto, cpu, cuda, python"):
        builder.mode_from_environment()


@pytest.mark.parametrize(
    ("variable", "value", "missing", "remedy"),
    [
        ("CUDA_HOME", "/nonexistent", {"CUDA"}, "correct it or unset it"),
        ("CUDACXX", "/nonexistent", {"CUDA"}, "correct it or unset it"),
        ("CXX", "/nonexistent", {"C++", "CUDA"}, "not on the path"),
        ("IDM_FAST_TORCH", "/nonexistent", {"C++", "CUDA"}, "not the folder of an installed torch"),
    ],
)
def test_what_is_missing_is_left_out_or_refused_when_it_was_demanded(
    machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, missing: set[str], remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    toolchain, record = builder.decide("auto")
    assert record.why_not.keys() == missing
    assert all(f"{variable}={value}" in reason and remedy in reason for reason in record.why_not.values())
    assert (toolchain is None) == ("C++" in missing)
    with pytest.raises(builder.CannotBuild, match=f"IDM_FAST_BUILD=cuda: {variable}={value}") as error:
        builder.decide("cuda")
    assert "\n" not in str(error.value)
    if "C++" in missing:
        with pytest.raises(builder.CannotBuild, match="IDM_FAST_BUILD=cpu"):
            builder.decide("cpu")


def test_no_compiler_and_no_nvcc_on_the_path_name_their_remedy(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX")
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(builder.CannotBuild, match="no C.. compiler was found .*install one"):
        finding.find_compiler()
    with pytest.raises(builder.CannotBuild, match="no nvcc was found; install the CUDA toolkit, or set CUDA_HOME"):
        finding.find_nvcc()


def test_cpu_leaves_cuda_out_and_python_everything(machine: Path) -> None:
    toolchain, record = builder.decide("cpu")
    assert toolchain.nvcc is None and record.why_not == {"CUDA": "IDM_FAST_BUILD=cpu"}
    toolchain, record = builder.decide("python")
    assert toolchain is None and record.why_not.keys() == {"C++", "CUDA"}


@pytest.mark.parametrize(
    ("version", "headers", "reason"),
    [("2.9.1", True, "torch 2.9.1 is installed; install torch 2.10"), ("2.11.0", False, "torch 2.11.0 has no C.. headers")],
)
def test_a_torch_that_cannot_be_built_with_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, headers: bool, reason: str
) -> None:
    monkeypatch.setenv("IDM_FAST_TORCH", str(torch_in(tmp_path, version, headers=headers)))
    with pytest.raises(builder.CannotBuild, match=reason):
        finding.find_torch()


def test_torch_is_found_on_the_path_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = torch_in(tmp_path / "site-packages", "2.10.0+cpu", cuda=None)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), str(tmp_path / "site-packages")])
    torch = finding.find_torch()
    assert (torch.folder, torch.version, torch.cuda) == (folder, "2.10.0+cpu", None)


def test_given_architectures_become_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert commands.architecture_flags(finding.architectures_for("nvcc")) == [
        "-gencode",
        "arch=compute_80,code=[sm_80]",
        "-gencode",
        "arch=compute_90a,code=[sm_90a]",
        "-gencode",
        "arch=compute_120,code=[sm_120,compute_120]",
    ]


def test_gpus_without_tensor_cores_for_bfloat16_are_left_out_and_said_to_be(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5 8.0 9.0+PTX")
    toolchain, record = builder.decide("cuda")
    assert toolchain.architectures == record.architectures == ["8.0", "9.0+PTX"]
    assert "idm-fast: no CUDA kernels for 7.0, 7.5: they need compute capability 8.0 or later" in record.lines()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(builder.CannotBuild, match="TORCH_CUDA_ARCH_LIST=7.5: the kernels need compute capability 8.0"):
        builder.decide("cuda")


def test_registration_keeps_to_the_names_of_torch_2_10() -> None:
    sources = [*(Path(native.PACKAGE).parent / "csrc" / "register").glob("*.*")]
    assert len(sources) > 10
    # Since 2.13; TORCH_ERROR_CODE_CHECK is the same.
    assert not [source.name for source in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in source.read_text()]


@pytest.mark.parametrize(
    ("capability", "architectures", "serves"),
    [
        ((9, 0), ["8.0", "9.0"], True),
        ((8, 6), ["8.0"], True),
        ((10, 3), ["9.0", "10.0"], True),
        ((11, 0), ["10.0", "12.0+PTX"], False),
        ((11, 0), ["10.0+PTX"], True),
        ((7, 5), ["8.0+PTX"], False),
        ((8, 0), ["8.6"], False),
    ],
)
def test_a_gpu_that_the_build_does_not_serve_is_named(
    capability: tuple[int, int], architectures: list[str], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    reason = native._not_built_for(architectures)
    assert reason is None if serves else "TORCH_CUDA_ARCH_LIST={}.{} in".format(*capability) in reason


def test_free_memory_is_the_least_of_the_kernels_and_the_containers(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert finding.free_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal: 64 kB\nMemAvailable:   16000000 kB\n")
    assert finding.free_memory(tmp_path) == 16_000_000 * 1024
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/memory.max", str(4 * 2**30))
    assert finding.free_memory(tmp_path) == 4 * 2**30


def test_jobs_are_capped_by_memory_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "free_memory", lambda root: 3 * 2**30)
    assert finding.parallel_jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert finding.parallel_jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(builder.CannotBuild, match="MAX_JOBS=many"):
        finding.parallel_jobs()


def fails_on(monkeypatch: pytest.MonkeyPatch, broken: str | None) -> None:
    """Compilers that make empty files, or fail in the part `broken`."""

    def run_jobs(jobs: list, objects: Path) -> None:
        if any(job.output.parent.name == broken for job in jobs):
            raise builder.CannotBuild("x.cpp:1: error: no such thing")
        for job in jobs:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            job.output.write_text("new")

    monkeypatch.setattr(builder, "run_jobs", run_jobs)


@pytest.mark.parametrize(
    ("broken", "left", "why_not"),
    [(None, {"_C.abi.so", "_cuda.so"}, set()), ("cuda", {"_C.abi.so"}, {"CUDA"}), ("cpu", set(), {"C++", "CUDA"})],
)
def test_a_build_replaces_all_of_an_earlier_one(
    machine: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None, left: set[str], why_not: set[str]
) -> None:
    package = machine / "package"
    package.mkdir()
    for name in ("_C.cpython-39.so", "_C.abi.so", "_cuda.so", "_build.json", "cli.py"):
        (package / name).write_text("old")
    fails_on(monkeypatch, broken)
    builder.build(ROOT / "csrc", machine / "objects", package, "_C.abi.so", *builder.decide("auto"))
    assert {file.name for file in package.iterdir()} == left | {"_build.json", "cli.py"}
    assert all((package / name).read_text() == "new" for name in left)
    record = json.loads((package / "_build.json").read_text())
    assert (record["cpu"], record["cuda"]) == ("_C.abi.so" in left, "_cuda.so" in left)
    assert record["why_not"].keys() == why_not
    if broken:
        assert "no such thing" in record["why_not"]["C++" if broken == "cpu" else "CUDA"]


def test_a_demanded_build_that_does_not_compile_is_refused_and_leaves_the_old_one(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = machine / "package"
    package.mkdir()
    (package / "_cuda.so").write_text("old")
    fails_on(monkeypatch, "cuda")
    with pytest.raises(builder.CannotBuild, match="IDM_FAST_BUILD=cuda: compiling the CUDA extension failed: x.cpp:1: error"):
        builder.build(ROOT / "csrc", machine / "objects", package, "_C.abi.so", *builder.decide("cuda"))
    assert [file.name for file in package.iterdir()] == ["_cuda.so"]


def test_threads_build_as_ninja_does_and_report_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(name: str, script: str, depfile: bool) -> object:
        (tmp_path / "source").touch()
        return commands.Job(tmp_path / name, [tmp_path / "source"], ["sh", "-c", script], tmp_path / "x.d" if depfile else None)

    (tmp_path / "x.d").write_text("")
    monkeypatch.setattr(run, "_ninja", lambda: None)
    link = job("c", f"cat '{tmp_path}/a' > '{tmp_path}/c'", False)
    run.run_jobs([job("a", f"echo 1 > '{tmp_path}/a'", True), link], tmp_path)
    assert (tmp_path / "c").read_text() == "1\n"
    with pytest.raises(builder.CannotBuild, match="a.cpp:3:1: error: expected"):
        run.run_jobs([job("a", "echo context; echo 'a.cpp:3:1: error: expected'; exit 1", True), link], tmp_path)


def test_this_machine_built_all_that_it_can() -> None:
    record = native.build_record()
    if record is None and not os.environ.get("CI"):
        pytest.skip("this checkout was never built; pip install -e .")
    assert record is not None, "in CI the package is installed, and so built"
    if record["mode"] != "auto":
        pytest.skip(f"built with IDM_FAST_BUILD={record['mode']}")
    toolchain, expected = builder.decide("auto")
    assert record["cpu"] == (toolchain is not None), record["why_not"]
    assert record["cuda"] == (toolchain is not None and toolchain.nvcc is not None), record["why_not"]
    assert native.load_cpu() is None or not record["cpu"], native.load_cpu()


def test_notes_name_another_torch_and_another_cuda() -> None:
    nvcc = "Cuda compilation tools, release 13.0, V13.0.88"
    record = {"cpu": True, "cuda": True, "torch": "2.10.0", "nvcc": nvcc, "sanitize": None}
    assert native.notes(record, "2.10.0", "13.0") == []
    torch, cuda = native.notes(record, "2.13.0", "12.8")
    assert "built with torch 2.10.0, in use with 2.13.0: fine" in torch and "CUDA 13, torch has 12.8" in cuda


def test_refusal_is_one_line_for_the_user(tmp_path: Path) -> None:
    environment = os.environ | {"IDM_FAST_BUILD": "cuda", "CUDA_HOME": "/nonexistent", "CUDACXX": "", "IDM_FAST_SANITIZE": ""}
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("idm-fast: IDM_FAST_BUILD=cuda: ")
    assert "Traceback" not in done.stderr
