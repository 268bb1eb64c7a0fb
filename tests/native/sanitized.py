"""Runs the native tests on an extension compiled with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

    python tests/native/sanitized.py [arguments of pytest]

The first wrong read, write or arithmetic ends the run with its place. torch itself is not compiled so: what is seen is ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitized"


def main() -> int:
    environment = os.environ | {"IDM_FAST_BUILD": "cpu", "IDM_FAST_SANITIZE": "address,undefined"}
    build = [sys.executable, "setup.py", "-q", "build", f"--build-base={FOLDER}"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    (package,) = FOLDER.glob("lib.*")
    compiler = os.environ.get("CXX", "c++").split()[-1]
    libraries = ["libasan.so", "libstdc++.so"]
    runtime = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in libraries]
    environment |= {
        # The interpreter is compiled without it, so it has to come first; and C++ with it, whose throw it stands in for.
        "LD_PRELOAD": ":".join(runtime),
        # Python frees little at its end.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(package),
    }
    tests = sys.argv[1:] or [str(ROOT / "tests" / "native"), "-m", "not slow"]
    # From another folder: this one's idm_fast would be found first.
    # What the sanitizers say as they end the run must not be caught.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=package, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
