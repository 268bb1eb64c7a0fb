"""Runs the CPU extension's tests on one compiled with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

    python tests/native/sanitized.py [--quick] [arguments of pytest]

The first wrong read, write or arithmetic ends the run with its place. torch itself is not compiled so: what is seen is ours.
All tests of the C++ kernels run: every op, dtype, layout and tail under every instruction set of this machine, and the fuzzing.
Left out is opcheck, which calls no kernel with other arguments and takes longer than all the rest. --quick compiles
without optimization and runs what depends on no rounding: fuzzing, with every instruction set, and large arguments on threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "native"
ALL = [*sorted(str(file) for file in TESTS.glob("test_cpu*.py")), str(TESTS / "test_fuzz.py"), "-k", "not opcheck"]
QUICK = [str(TESTS / "test_cpu.py"), str(TESTS / "test_fuzz.py"), "-k", "fuzz or threads"]
LIBRARIES = ("libasan.so", "libstdc++.so")
"""The interpreter is compiled without the first, so it has to come first; and C++ with it, whose throw it stands in for."""


def runtime() -> list[Path]:
    """Where the compiler has LIBRARIES; FileNotFoundError names what it lacks."""
    compiler = os.environ.get("CXX", "c++").split()[-1]
    found = []
    for name in LIBRARIES:
        file = Path(subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip())
        if not file.is_absolute():  # the name alone, where it has none
            raise FileNotFoundError(f"{compiler} has no {name}")
        found.append(file)
    return found


def main() -> int:
    quick = sys.argv[1:2] == ["--quick"]
    given = sys.argv[2:] if quick else sys.argv[1:]
    libraries = runtime()
    folder = ROOT / "build" / ("sanitized_quick" if quick else "sanitized")
    environment = os.environ | {"IDM_FAST_BUILD": "cpu", "IDM_FAST_SANITIZE": "address,undefined"}
    environment["IDM_FAST_SANITIZE_LEVEL"] = "-O0" if quick else ""
    subprocess.run([sys.executable, "setup.py", "-q", "build", f"--build-base={folder}"], cwd=ROOT, env=environment, check=True)
    version = "{}{}".format(*sys.version_info)
    (package,) = folder.glob(f"lib.*-{version}")
    environment |= {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        # Python frees little at its end.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(package),
    }
    # From another folder: this one's idm_fast would be found first.
    # What the sanitizers say as they end the run must not be caught.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *(given or (QUICK if quick else ALL))], cwd=package, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
