"""Build of idm-fast; metadata, dependencies and tools stand in pyproject.toml, the native build in csrc/build.py."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"

_spec = importlib.util.spec_from_file_location("idm_fast_native_build", SOURCES / "build.py")
native = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = native
_spec.loader.exec_module(native)


class BuildPackage(build_py):
    """Ships the record of the build; the extension's build completes it."""

    def run(self) -> None:
        super().run()
        RECORD.write(ROOT / "idm_fast" if self.editable_mode else Path(self.build_lib) / "idm_fast")
        for line in RECORD.lines() if TOOLCHAIN is None else ():
            print(line)


class BuildNative(build_ext):
    """idm_fast._C and, with nvcc, idm_fast/_cuda.so, by csrc/build.py instead of setuptools."""

    def run(self) -> None:
        module = Path(self.get_ext_fullpath("idm_fast._C")).resolve()
        try:
            native.build(SOURCES, Path(self.build_temp) / "native", module, TOOLCHAIN, RECORD)
        except native.CannotBuild as reason:
            sys.exit(f"idm-fast: {reason}")
        RECORD.write(module.parent)
        for line in RECORD.lines():
            print(line)

    def get_outputs(self) -> list[str]:
        return []


try:
    TOOLCHAIN, RECORD = native.decide(native.mode_from_environment())
except native.CannotBuild as reason:
    sys.exit(f"idm-fast: {reason}")

setup(
    ext_modules=[Extension("idm_fast._C", sources=[])] if TOOLCHAIN else [],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative},
)
