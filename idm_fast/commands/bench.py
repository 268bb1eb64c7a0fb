"""`idm-fast bench`: the benchmark suite of the checkout, which is not installed with the package."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import idm_fast
from idm_fast.outputs import InputError


def run(arguments: argparse.Namespace) -> None:
    """Runs `python -m benchmarks` with the arguments, and exits with its code.

    Raises InputError where there is no checkout.
    """
    checkout = find_checkout()
    # The current folder stays, so that --out and the folders to compare mean what the user sees
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *arguments.arguments]
    code = subprocess.run(command, env=dict(os.environ, PYTHONPATH=path), check=False).returncode
    if code:
        sys.exit(code)


def find_checkout() -> Path:
    """The folder that holds `benchmarks`: where idm_fast lies, or the current one. Raises InputError if neither does."""
    for folder in (Path(idm_fast.__file__).resolve().parent.parent, Path.cwd()):
        if (folder / "benchmarks" / "__main__.py").is_file() and (folder / "idm_fast").is_dir():
            return folder
    raise InputError(
        "the benchmarks are not installed with the package; run this in a checkout of the idm-fast repository, or install "
        "from one with pip install --editable '.[bench]'"
    )
