"""What `pip install` and `import` promise: metadata, build requirements, import time and directions, the wheel."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import idm_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(idm_fast.__file__).parent
ROOT = Path(__file__).parent.parent
FORBIDDEN = {"torchvision", "cv2", "transformers"}


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def requirements() -> dict[str, Requirement]:
    """Unconditional dependencies and those with a platform marker, without the extras, by lower-case name."""
    parsed = [Requirement(line) for line in metadata("idm-fast").get_all("Requires-Dist") or []]
    return {r.name.lower(): r for r in parsed if "extra ==" not in str(r.marker)}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_metadata_names_version_licence_and_python():
    data = metadata("idm-fast")
    assert data["Version"] == idm_fast.__version__ == "0.1.0"
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] == ">=3.10"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_any_torch_from_2_10_satisfies_the_metadata():
    torch = requirements()["torch"].specifier
    assert torch.contains("2.10.0") and torch.contains("2.13.0+cpu") and torch.contains("2.15.0")
    assert not torch.contains("2.9.1")


def test_triton_is_required_only_where_it_exists():
    marker = requirements()["triton"].marker
    assert marker is not None
    for machine in ("x86_64", "aarch64"):
        assert marker.evaluate({"platform_system": "Linux", "platform_machine": machine})
    assert not marker.evaluate({"platform_system": "Darwin", "platform_machine": "arm64"})
    assert not marker.evaluate({"platform_system": "Windows", "platform_machine": "AMD64"})


def test_torch_is_never_a_build_requirement():
    names = {Requirement(line).name for line in pyproject()["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "ninja"}


def test_forbidden_packages_are_neither_required_nor_imported():
    lines = metadata("idm-fast").get_all("Requires-Dist") or []
    required = {Requirement(line).name.lower() for line in lines}
    assert not required & (FORBIDDEN | {"opencv-python", "opencv-python-headless"})
    imported = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            imported.update({name.split(".")[0]: path for name in names})
    assert not FORBIDDEN & imported.keys()


def test_console_script_runs_the_cli():
    (script,) = entry_points(group="console_scripts", name="idm-fast")
    assert script.value == "idm_fast.cli:main"
    assert callable(script.load())


def test_import_adds_at_most_one_second_to_torch():
    code = "import time, torch; t = time.perf_counter(); import idm_fast; print(time.perf_counter() - t)"
    # The least of three: what another process does in the meantime isn't the package's.
    assert min(float(run_python(code)) for _ in range(3)) <= 1.0


@pytest.mark.parametrize("module", ["idm_fast", "idm_fast.reversible", "idm_fast.physics", "idm_fast.ops"])
def test_the_lower_layers_do_not_import_diffusers(module: str):
    heavy = "{'diffusers', 'accelerate', 'skimage', 'PIL'}"
    assert run_python(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_public_names_are_listed_and_load():
    for name in idm_fast.__all__:
        assert getattr(idm_fast, name) is not None
    assert set(idm_fast.__all__) <= set(dir(idm_fast))
    with pytest.raises(AttributeError, match="no_such_name"):
        idm_fast.no_such_name  # noqa: B018


def test_makefile_installs_the_torch_that_ci_tests():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "TORCH_VERSION  ?= 2.13.0\n" in makefile and "TRITON_VERSION ?= 3.7.1\n" in makefile


@pytest.mark.slow
def test_wheel_from_the_sdist_holds_the_package_and_what_was_built(tmp_path: Path):
    source = tmp_path / "source"
    for folder in ("idm_fast", "csrc"):
        # What an earlier build left in the tree must get into neither.
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
        (source / folder / "_cuda.so").write_text("an earlier build")
    (source / "idm_fast" / "_build.json").write_text("{}")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    weights = source / "idm_fast" / "weights" / "nested"
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "model.safetensors").write_bytes(b"0")
    # Whether it compiles is other tests' matter.
    environment = os.environ | {"IDM_FAST_BUILD": "auto", "CXX": "/nonexistent"}

    def run(*command: str, cwd: Path) -> None:
        done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    files = [path for folder in ("idm_fast", "csrc") for path in (source / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(source).as_posix() for path in files}
    run("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("idm_fast-*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    built = {"idm_fast/_cuda.so", "csrc/_cuda.so", "idm_fast/_build.json"}
    assert expected - built <= names and not built & names
    assert not [name for name in names if name.endswith(".pyc")]  # building imports csrc/builder
    # Without isolation nothing is downloaded; that it works also shows that building needs setuptools alone.
    wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(tmp_path))
    run(*wheel, str(sdist), cwd=tmp_path)
    (wheel,) = tmp_path.glob("idm_fast-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "nothing native was built"
    inside = zipfile.ZipFile(wheel)
    assert {name for name in expected if name.startswith("idm_fast/")} - built <= set(inside.namelist())
    assert {"idm_fast/py.typed", "idm_fast/weights/nested/model.safetensors"} <= set(inside.namelist())
    assert "idm_fast/_cuda.so" not in inside.namelist()
    assert not any(name.startswith(("tests/", "docs/", "build/", "csrc/")) for name in inside.namelist())
    assert "CXX=/nonexistent" in json.loads(inside.read("idm_fast/_build.json"))["why_not"]["C++"]
