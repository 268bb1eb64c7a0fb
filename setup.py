"""Build of idm-fast; metadata, dependencies and tools stand in pyproject.toml, the native build in csrc/builder."""

import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # without build isolation nobody has looked at pyproject.toml's requirement
    sys.exit(f"idm-fast: setuptools {__version__} is too old to build it: pip install 'setuptools>=77'")

ROOT = Path(__file__).resolve().parent

sys.path.insert(0, str(ROOT / "csrc"))
import builder  # noqa: E402


class BuildPackage(build_py):
    """Where nothing native is built, no later command runs: the record of that is written here."""

    def run(self) -> None:
        super().run()
        if TOOLCHAIN is None:
            finish_without_extension(ROOT if self.editable_mode else Path(self.build_lib))


class BuildNative(build_ext):
    """idm_fast._C and, with nvcc, idm_fast/_cuda.so, by csrc/builder instead of setuptools."""

    def run(self) -> None:
        if TOOLCHAIN is None:
            finish_without_extension(self._folder())
            return
        package, module = self._folder() / "idm_fast", Path(self.get_ext_filename("idm_fast._C")).name
        # Editable installs are given a folder that does not last, and would compile all of it each time.
        objects = Path(self.get_finalized_command("build").build_base if self.editable_mode else self.build_temp)
        try:
            builder.build(ROOT / "csrc", objects, package, module, TOOLCHAIN, RECORD)
        except builder.CannotBuild as reason:
            sys.exit(f"idm-fast: {reason}")
        print(*RECORD.lines(), sep="\n")

    def _folder(self) -> Path:
        return ROOT if self.inplace else Path(self.build_lib)

    def get_outputs(self) -> list[str]:
        return [str(file) for file in builder.built_files(Path(self.build_lib) / "idm_fast")]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        package = Path(self.build_lib) / "idm_fast"
        return {str(package / file.name): str(file) for file in builder.built_files(ROOT / "idm_fast")}


class Wheel(bdist_wheel):
    """A wheel without an extension, though one was tried, serves every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not RECORD.cpu
        return super().get_tag() if RECORD.cpu else ("py3", "none", "any")


def finish_without_extension(folder: Path) -> None:
    if REFUSED:
        sys.exit(f"idm-fast: {REFUSED}")
    builder.install(folder / "idm_fast", {}, RECORD)
    print(*RECORD.lines(), sep="\n")


TOOLCHAIN, RECORD, REFUSED = None, builder.Record("none"), None
try:
    TOOLCHAIN, RECORD = builder.decide(builder.mode_from_environment())
except builder.CannotBuild as reason:
    # An sdist is made without building: only a build is refused.
    REFUSED = reason

setup(
    ext_modules=[Extension("idm_fast._C", sources=[])] if TOOLCHAIN else [],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
